"""A Valkey or Redis server, kept in memory only."""

from __future__ import annotations

import re
import signal
import socket
from typing import TYPE_CHECKING, ClassVar

from shardalchemy.local.ports import LOOPBACK
from shardalchemy.local.server import Server

if TYPE_CHECKING:
    from pathlib import Path

    from shardalchemy.local.account import Account
    from shardalchemy.local.watchdog import Watchdog

__all__ = ["RedisServer"]


class RedisServer(Server):
    """One Valkey or Redis server; what it holds is gone when it stops."""

    stop_signal: ClassVar = signal.SIGTERM
    urgent_signal: ClassVar = signal.SIGKILL
    port_taken: ClassVar = "Failed listening on port"

    def __init__(
        self,
        directory: Path,
        *,
        program: Path,
        account: Account,
        watchdog: Watchdog,
    ) -> None:
        super().__init__("redis", directory, account, watchdog)
        self._program = program
        if not directory.exists():
            directory.mkdir(mode=0o700)
            account.own([directory])

    @property
    def url(self) -> str:
        """The server's URL for redis-py, database 0."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def command(self) -> list[str | Path]:
        """Return the command line: no files, no daemon, loopback only."""
        return [
            self._program,
            *("--bind", LOOPBACK),
            *("--port", str(self.port)),
            *("--dir", self.directory),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--daemonize", "no"),
        ]

    def answers(self) -> bool:
        """Say whether the server on our port is this process, and not another's."""
        try:
            # A stranger on our port may listen and never answer.
            with socket.create_connection((LOOPBACK, self.port), timeout=0.5) as client:
                client.sendall(b"INFO server\r\n")
                reply = client.recv(65536)
        except OSError:
            return False
        found = re.search(rb"process_id:(\d+)", reply)
        return found is not None and int(found[1]) == self.pid
