"""A server process: started, watched until it is ready, stopped, killed, paused."""

from __future__ import annotations

import contextlib
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from shardalchemy.errors import LocalServerError
from shardalchemy.local import ports
from shardalchemy.local.watchdog import look_up, send_signal

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Collection
    from pathlib import Path

    from shardalchemy.local.account import Account
    from shardalchemy.local.watchdog import Watchdog

__all__ = ["Server", "start_all", "stop_all"]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
_PORT_ATTEMPTS = 10
_POLL = 0.005


class Server(ABC):
    """One server of a LocalCluster; it keeps its port for as long as it exists."""

    stop_signal: ClassVar[signal.Signals]
    urgent_signal: ClassVar[signal.Signals]
    port_taken: ClassVar[str]

    def __init__(
        self, name: str, directory: Path, account: Account, watchdog: Watchdog
    ) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / "server.log"
        self._account = account
        self._watchdog = watchdog
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._port_is_known = False
        self._attempts = 0
        self._log_start = 0
        self._paused = False

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "stopped"
        return f"<{type(self).__name__} {self.name} on port {self._port}, {state}>"

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL that clients connect to."""

    @abstractmethod
    def command(self) -> list[str | Path]:
        """Return the command line that runs the server in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Say whether this very process answers to clients; do not wait for it."""

    @property
    def port(self) -> int:
        """The port on 127.0.0.1, the same from the first start to the last stop."""
        if self._port is None:
            raise LocalServerError(f"{self.name} has no port yet: start it first.")
        return self._port

    @property
    def pid(self) -> int | None:
        """The pid of the server's main process, or None if it does not run."""
        if self._process is not None and self._process.poll() is not None:
            self._ended()
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's main process exists, paused or not."""
        return self.pid is not None

    def start(self) -> None:
        """Start the server and wait until it answers; nothing if it runs already."""
        if self.running:
            return
        try:
            start_all([self])
        except BaseException:
            self.kill()
            raise

    def restart(self) -> None:
        """Stop the server cleanly and start it again on the same port."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Stop the server cleanly; nothing if it does not run."""
        stop_all([self])

    def kill(self) -> None:
        """End the server as a crash would: SIGKILL to it and all its children."""
        self._freeze()
        if (pid := self.pid) is None:
            return
        children = send_signal(pid, signal.SIGKILL, children=True)
        assert self._process is not None
        self._process.wait()
        self._ended()
        deadline = time.monotonic() + STOP_TIMEOUT
        while any(look_up(child) for child in children) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def pause(self) -> None:
        """Make the server deaf and mute, its connections open (SIGSTOP)."""
        self._freeze()
        if (pid := self.pid) is not None:
            send_signal(pid, signal.SIGSTOP, children=True)
            self._paused = True

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
        if self._paused and (pid := self.pid) is not None:
            send_signal(pid, signal.SIGCONT, children=True)
        self._paused = False

    def logs_tail(self, n: int = 20) -> str:
        """Return the last ``n`` lines of the server's log."""
        with (
            contextlib.suppress(FileNotFoundError),
            self.log.open(encoding="utf-8", errors="replace") as log,
        ):
            return "".join(deque(log, maxlen=n)).rstrip()
        return ""

    def launch(self) -> None:
        """Start the process without waiting for it."""
        if self._port is None:
            self._port = ports.free_port()
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = self._account.spawn(
                self.command(), output=log, cwd=self.directory
            )
        self._watchdog.watch(self._process.pid, self.stop_signal)

    def is_ready(self) -> bool:
        """Look once whether a launched server is ready.

        Another port is tried if the chosen one was taken in the meantime and nobody
        knows it yet. Raises LocalServerError if the server has ended otherwise.
        """
        if self.running:
            if not self.answers():
                return False
            self._port_is_known = True
            return True
        if self.port_taken in self._output() and not self._port_is_known:
            self._attempts += 1
            if self._attempts < _PORT_ATTEMPTS:
                self._port = None
                self.launch()
                return False
        raise self.failure("ended while it was starting")

    def ask_to_stop(self, number: signal.Signals | None = None) -> None:
        """Send the signal for a clean stop, or another, without waiting."""
        self.resume()
        if (pid := self.pid) is not None:
            send_signal(pid, number or self.stop_signal)

    def failure(self, what: str) -> LocalServerError:
        """Return an error that says what happened, with the end of the log."""
        return LocalServerError(
            f"{self.name} {what}. The end of {self.log}:\n{self.logs_tail()}"
        )

    def _output(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _freeze(self) -> None:
        # A main process that is certainly stopped starts no child behind our back.
        if (pid := self.pid) is None:
            return
        send_signal(pid, signal.SIGSTOP)
        while (process := look_up(pid)) is not None and process.state not in "Tt":
            time.sleep(0.001)

    def _ended(self) -> None:
        if self._process is not None:
            self._watchdog.forget(self._process.pid)
        self._process = None
        self._paused = False


def start_all(servers: Collection[Server], timeout: float = START_TIMEOUT) -> None:
    """Start servers at once and wait until every one of them answers.

    Raises LocalServerError, with the end of the log, for the first that does not.
    """
    for server in servers:
        server.launch()
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while waiting := [server for server in waiting if not server.is_ready()]:
        if time.monotonic() > deadline:
            raise waiting[0].failure(f"was not ready after {timeout:.0f} s")
        time.sleep(_POLL)


def stop_all(
    servers: Collection[Server],
    number: signal.Signals | None = None,
    timeout: float = STOP_TIMEOUT,
) -> None:
    """Stop servers at once: politely, after ``timeout`` seconds at any price."""
    for server in servers:
        server.ask_to_stop(number)
    if _all_ended(servers, timeout):
        return
    for server in servers:
        server.ask_to_stop(server.urgent_signal)
    if _all_ended(servers, timeout / 4):
        return
    for server in servers:
        server.kill()


def _all_ended(servers: Collection[Server], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while any(server.running for server in servers):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
