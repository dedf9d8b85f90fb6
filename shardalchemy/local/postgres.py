"""A PostgreSQL server: its data directory, its settings, its process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import psycopg

from shardalchemy.errors import LocalServerError
from shardalchemy.local.ports import LOOPBACK
from shardalchemy.local.server import Server, stop_all
from shardalchemy.local.watchdog import look_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardalchemy.local.account import Account
    from shardalchemy.local.binaries import PostgresBinaries
    from shardalchemy.local.watchdog import Watchdog

__all__ = ["SETTINGS", "PostgresServer", "create_data"]

SETTINGS: Mapping[str, str] = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",
    "max_prepared_transactions": "100",
    "wal_level": "logical",
    "shared_buffers": "64MB",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "log_destination": "stderr",
    "logging_collector": "off",
}
"""What every server is started with, unless LocalCluster's ``settings`` differ."""

_NO_PID = str(2**31 - 1)
_UNFINISHED = "data.unfinished."
_CONF = "shardalchemy.conf"
_STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


class PostgresServer(Server):
    """One PostgreSQL server of a LocalCluster, user and database ``postgres``."""

    stop_signal: ClassVar = signal.SIGINT
    urgent_signal: ClassVar = signal.SIGQUIT
    port_taken: ClassVar = "could not create any TCP/IP sockets"

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        binaries: PostgresBinaries,
        password: str,
        settings: Mapping[str, str],
        account: Account,
        watchdog: Watchdog,
    ) -> None:
        super().__init__(name, directory, account, watchdog)
        self.data_directory = directory / "data"
        self._binaries = binaries
        self._password = password
        self._settings = settings

    @property
    def url(self) -> str:
        """The server's URL for SQLAlchemy, with its password."""
        return (
            f"postgresql+psycopg://postgres:{self._password}"
            f"@{LOOPBACK}:{self.port}/postgres"
        )

    @property
    def crashed(self) -> bool:
        """Whether the server ended without cleaning up after itself."""
        return not self.running and bool(self._pid_file_lines())

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server; ``mode`` is as in pg_ctl, "immediate" leaves recovery."""
        stop_all([self], _STOP_SIGNALS[mode])

    def command(self) -> list[str | Path]:
        """Return the command line; all but the port is in configuration files."""
        return [
            self._binaries.postgres,
            *("-D", self.data_directory),
            *("-p", str(self.port)),
        ]

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self._check_data()
        self._write_settings()
        self._check_pid_file()
        super().launch()

    def answers(self) -> bool:
        """Say whether the postmaster is ready and one query has been answered."""
        lines = self._pid_file_lines()
        # Line 1 is the postmaster's pid, line 8 its status (PostgreSQL's pidfile.h).
        if len(lines) < 8 or lines[0] != str(self.pid) or lines[7].strip() != "ready":
            return False
        try:
            with psycopg.connect(
                host=LOOPBACK,
                port=self.port,
                user="postgres",
                password=self._password,
                dbname="postgres",
                connect_timeout=10,
            ) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise self.failure("does not accept the recorded password") from error
            return False
        return True

    def _check_data(self) -> None:
        try:
            found = (self.data_directory / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise LocalServerError(
                f"{self.data_directory} holds no data of PostgreSQL (any more)."
            ) from None
        if found != str(self._binaries.major):
            raise LocalServerError(
                f"{self.data_directory} holds data of PostgreSQL {found}, but "
                f"{self._binaries.directory} is version {self._binaries.major}; name "
                f"the bin folder of version {found} in postgres=, or use another "
                "directory."
            )

    def _write_settings(self) -> None:
        lines = ["# Written anew at each start; use ALTER SYSTEM or settings=.\n"]
        for name, value in {**SETTINGS, **self._settings}.items():
            if re.fullmatch(r"[A-Za-z_][\w$.]*", name) is None or "\n" in str(value):
                raise LocalServerError(f"{name!r} = {value!r} is not a valid setting.")
            quoted = str(value).replace("\\", "\\\\").replace("'", "''")
            lines.append(f"{name} = '{quoted}'\n")
        conf = self.data_directory / _CONF
        conf.write_text("".join(lines), encoding="utf-8")
        self._account.own([conf])

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self.data_directory / "postmaster.pid").read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return []

    def _check_pid_file(self) -> None:
        """See to it that a crashed server's pid file does not stop the next start.

        PostgreSQL takes the file for that of a running server if its pid has since
        been given to another process of the same user, as to another shard's after a
        reboot. The file is kept, with a pid that cannot be: its other lines lead
        PostgreSQL to backends that may have outlived the crash.
        """
        pid_file = self.data_directory / "postmaster.pid"
        pid, *others = self._pid_file_lines() or ["0"]
        if not pid.isdigit() or look_up(int(pid)) is None:
            return
        try:
            runs_here = Path(f"/proc/{pid}/cwd").resolve(strict=True)
        except OSError:
            return
        if runs_here == self.data_directory:
            raise LocalServerError(
                f"{self.name} still runs as process {pid}, left behind when its "
                f"LocalCluster was killed; stop it with 'kill -INT {pid}'."
            )
        pid_file.write_text("\n".join([_NO_PID, *others, ""]))


def create_data(
    servers: Sequence[PostgresServer],
    *,
    binaries: PostgresBinaries,
    password: str,
    account: Account,
    durable: bool,
) -> None:
    """Make the data directories of servers that have none yet.

    ``initdb`` runs once and its result is copied for the others, which is quicker; so
    all of them have one system identifier. With ``durable`` everything is flushed to
    disk. A directory gets its name when it is whole, so one that was interrupted is
    made again.
    """
    new = [server for server in servers if not server.data_directory.exists()]
    if not new:
        return
    for server in new:
        if not server.directory.exists():
            server.directory.mkdir(mode=0o700)
            account.own([server.directory])
        for leftover in server.directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    first, *others = [_unfinished(server) for server in new]
    _initdb(first, binaries, password, account)
    with ExitStack() as copies:
        copying = [
            copies.enter_context(
                account.spawn(["cp", "-Rp", first, other], output=subprocess.PIPE)
            )
            for other in others
        ]
        outputs = [process.communicate()[0] for process in copying]
    for process, output in zip(copying, outputs, strict=True):
        if process.returncode != 0:
            raise LocalServerError(
                f"Copying {first} failed:\n{output.decode(errors='replace')}"
            )
    for server in new:
        if durable:
            _run(account, binaries.initdb, "--sync-only", "-D", _unfinished(server))
        _unfinished(server).rename(server.data_directory)


def _unfinished(server: PostgresServer) -> Path:
    # Ours by its name: the initdb of a cluster that was killed may still be running.
    return server.data_directory.with_name(f"{_UNFINISHED}{os.getpid()}")


def _initdb(
    target: Path, binaries: PostgresBinaries, password: str, account: Account
) -> None:
    locale = ["--locale=C"]
    if binaries.major >= 17:
        locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    password_file = target.with_name("password")
    password_file.touch(mode=0o600)
    try:
        password_file.write_text(password)
        account.own([password_file])
        _run(
            account,
            binaries.initdb,
            *("-D", target),
            *("--username=postgres", "--auth=scram-sha-256"),
            f"--pwfile={password_file}",
            *("--encoding=UTF8", "--no-sync", *locale),
        )
    finally:
        password_file.unlink()
    with (target / "postgresql.conf").open("a", encoding="utf-8") as conf:
        conf.write(f"\ninclude '{_CONF}'\n")


def _run(account: Account, *arguments: str | Path) -> None:
    result = account.run(arguments, timeout=120)
    if result.returncode != 0:
        raise LocalServerError(f"{arguments[0]} failed:\n{result.stdout}")
