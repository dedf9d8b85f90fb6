"""Which user the servers run as.

PostgreSQL refuses to run as root, so root gives its servers to another user. Anybody
else runs them as themselves.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from shardalchemy.errors import LocalServerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Account", "server_account"]

_CANDIDATES = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    """A user that programs are run as; ``switches`` if that is not our own user."""

    name: str
    uid: int
    gid: int
    switches: bool

    def spawn(
        self,
        arguments: Sequence[str | Path],
        *,
        output: int | IO[bytes],
        cwd: str | Path = "/",
    ) -> subprocess.Popen[bytes]:
        """Start a program as this user, out of reach of the terminal's Ctrl-C.

        Not in our own working directory, which may be closed to this user.
        """
        try:
            return subprocess.Popen(
                [os.fspath(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=_environment(),
                start_new_session=True,
                umask=0o077,
                user=self.uid if self.switches else None,
                group=self.gid if self.switches else None,
                extra_groups=[] if self.switches else None,
            )
        except OSError as error:
            raise LocalServerError(
                f"{os.fspath(arguments[0])} cannot be run as user {self.name!r}: "
                f"{error}."
            ) from error

    def run(
        self, arguments: Sequence[str | Path], *, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end as this user; stderr is part of ``stdout``."""
        process = self.spawn(arguments, output=subprocess.PIPE)
        with process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        text = output.decode(errors="replace")
        return subprocess.CompletedProcess(process.args, process.returncode, text)

    def can(self, test: str, path: Path) -> bool:
        """Say whether ``test -r`` (or ``-x``, ``-w``) holds on a path for this user."""
        return (
            self.run(["/bin/sh", "-c", f'test -{test} "$1"', "sh", path]).returncode
            == 0
        )

    def first_closed(self, path: Path) -> Path | None:
        """Return the outermost folder on the way to ``path`` that is closed to us."""
        folders = [*reversed(path.parents), path]
        script = 'for d in "$@"; do test -x "$d" || { printf %s "$d"; exit 1; }; done'
        result = self.run(["/bin/sh", "-c", script, "sh", *folders])
        return None if result.returncode == 0 else path.__class__(result.stdout)

    def own(self, paths: Iterable[Path]) -> None:
        """Give files that we made to this user."""
        if self.switches:
            for path in paths:
                os.chown(path, self.uid, self.gid, follow_symlinks=False)


def server_account(owner: int | None = None) -> Account:
    """Return the user that servers run as.

    ``owner`` is the uid that existing data belongs to; root keeps to it. Raises
    LocalServerError if we are root and there is nobody to give the servers to.
    """
    uid = os.geteuid()
    if uid != 0:
        return Account(_name(uid), uid, os.getegid(), switches=False)
    if owner:
        try:
            entry = pwd.getpwuid(owner)
        except KeyError:
            return Account(str(owner), owner, owner, switches=True)
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, switches=True)
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid, switches=True)
    raise LocalServerError(
        "PostgreSQL does not run as root, and there is no user "
        f"{' or '.join(map(repr, _CANDIDATES))} to run it as; add one with "
        "'useradd --system postgres', or run as an ordinary user."
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _environment() -> dict[str, str]:
    # PGDATA, PGPORT and their kind would change what the programs do, and the log is
    # read for one message, so it has to be in English.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_", "LANG"))
    }
    environment["LC_ALL"] = "C"
    return environment
