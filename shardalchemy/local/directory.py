"""The directory of a LocalCluster: whose it is, and what has to outlive a start.

It holds ``cluster.json`` (the servers' names and their password), ``cluster.lock``, a
folder ``servers/<name>`` for each PostgreSQL server, and ``redis``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardalchemy.errors import LocalServerError
from shardalchemy.local.watchdog import look_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardalchemy.local.account import Account

__all__ = ["ClusterDirectory", "Record"]

# As long as a watchdog may take to stop the servers of a process that was killed.
_WATCHDOG_TIME = 12.0


@dataclass(frozen=True, slots=True)
class Record:
    """What ``cluster.json`` remembers."""

    servers: tuple[str, ...]
    password: str


class ClusterDirectory:
    """A directory that this process alone uses, from its making to ``close``."""

    def __init__(self, path: Path | None) -> None:
        """Make or open the directory and lock it; None makes a temporary one.

        Raises LocalServerError if another LocalCluster uses it, or if it holds
        something else.
        """
        self.temporary = path is None
        # The user that root's servers run as has to pass through, not to look around.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        if path is None:
            self.path = Path(tempfile.mkdtemp(prefix="shardalchemy-")).resolve()
            self.path.chmod(mode)
        else:
            self.path = path.resolve()
            with _explained(self.path):
                if not self.path.exists():
                    self.path.mkdir(mode=0o755, parents=True)
                    self.path.chmod(mode)
        with _explained(self.path):
            strangers = {entry.name for entry in self.path.iterdir()} - {"cluster.lock"}
            if strangers and not self._record.exists():
                raise LocalServerError(
                    f"{self.path} is not empty and was not made by a LocalCluster; "
                    "name an empty or a new directory."
                )
            self.lock_descriptor = self._lock()

    @property
    def servers(self) -> Path:
        """The folder of the PostgreSQL servers."""
        return self.path / "servers"

    @property
    def owner(self) -> int | None:
        """The uid that the servers' data belongs to, or None if there is none yet."""
        return self.servers.stat().st_uid if self.servers.exists() else None

    def prepare(self, account: Account) -> None:
        """Let ``account`` reach its folders; LocalServerError if it cannot."""
        if not self.servers.exists():
            self.servers.mkdir(mode=0o700)
            account.own([self.servers])
        if account.switches and (closed := account.first_closed(self.path)):
            advice = "set TMPDIR" if self.temporary else "name another directory"
            raise LocalServerError(
                f"{self.path} cannot be reached by user {account.name!r}, which the "
                f"servers run as because PostgreSQL does not run as root: {closed} is "
                f"closed to it. Open it with 'chmod o+x {closed}', or {advice}."
            )

    def record(self, new: tuple[str, ...]) -> Record:
        """Return what is remembered, or remember ``new`` names and a new password."""
        if self._record.exists():
            with _explained(self._record):
                content = json.loads(self._record.read_text(encoding="utf-8"))
                return Record(tuple(content["servers"]), content["password"])
        record = Record(new, secrets.token_hex(16))
        self._save(record)
        return record

    def add(self, record: Record, name: str) -> Record:
        """Remember one more server."""
        record = replace(record, servers=(*record.servers, name))
        self._save(record)
        return record

    def close(self) -> None:
        """Give the directory up; remove it if it is a temporary one."""
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        # Said aloud, because a forked child and the watchdog share the descriptor.
        fcntl.flock(self.lock_descriptor, fcntl.LOCK_UN)
        os.close(self.lock_descriptor)

    @property
    def _record(self) -> Path:
        return self.path / "cluster.json"

    def _save(self, record: Record) -> None:
        unfinished = self._record.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        content = {"servers": record.servers, "password": record.password}
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self._record)

    def _lock(self) -> int:
        descriptor = os.open(self.path / "cluster.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + _WATCHDOG_TIME
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    text = os.pread(descriptor, 20, 0)
                    owner = int(text) if text.isdigit() else 0
                    # A dead owner's watchdog is still at work: wait for its end.
                    if look_up(owner) is not None or time.monotonic() > deadline:
                        raise LocalServerError(
                            f"{self.path} is in use by the LocalCluster of process "
                            f"{owner}; stop that one, or name another directory."
                        ) from None
                time.sleep(0.05)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalServerError(f"{path} cannot be used: {error}.") from error
