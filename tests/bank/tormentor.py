"""Carry out faults on a bank, and undo them: some overlap."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

import psycopg

from shardalchemy.local.postgres import PostgresServer
from tests.bank.faults import Fault
from tests.bank.processes import Bank, ClientProcess

__all__ = ["Tormentor"]


class _Undoing:
    """Something that is undone once: when its time has come, or before."""

    def __init__(self, seconds: float, undo: Callable[[], None]) -> None:
        self._undo = undo
        self._lock = threading.Lock()
        self.is_done = False
        self.error: Exception | None = None
        self._timer = threading.Timer(seconds, self.now)
        self._timer.daemon = True
        self._timer.start()

    def now(self) -> None:
        self._timer.cancel()
        with self._lock:
            if not self.is_done:
                try:
                    self._undo()
                except Exception as error:
                    self.error = error
                self.is_done = True


class Tormentor:
    """One fault after another, each on a process that no other fault holds."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._held: dict[str, _Undoing] = {}
        self.counts: Counter[str] = Counter()
        self.log: list[tuple[float, str]] = []
        """When each fault came, and what it was."""
        self.errors: list[str] = []

    def run(self, faults: Iterable[Fault], seconds: float) -> None:
        """Carry out faults for so long."""
        end = time.monotonic() + seconds
        for fault in faults:
            self._carry_out(fault)
            if time.monotonic() + fault.pause > end:
                return
            time.sleep(fault.pause)

    def heal(self) -> None:
        """Undo everything that is not undone yet."""
        self._bank.proxy.heal()
        for target in [*self._held]:
            self._is_free(target, at_once=True)
        self._note("all is healed")

    def _carry_out(self, fault: Fault) -> None:
        proxy = self._bank.proxy
        match fault.kind:
            case "cut":
                proxy.cut_next(fault.target, fault.message, fault.moment)
            case "cut all":
                proxy.cut_all(fault.target)
            case "deaf":
                proxy.be_deaf(fault.target, fault.seconds)
            case "slow":
                proxy.be_slow(fault.target, fault.seconds, delay=0.05)
            case _:
                self._hold(fault)
                return
        self._note(str(fault))
        self.counts[fault.kind] += 1

    def _hold(self, fault: Fault) -> None:
        """Do something to a process that no other fault holds."""
        spared = fault.target == self._bank.reader and fault.kind == "kill client"
        if spared or not self._is_free(fault.target):
            # One process lives through all: recovery and housekeeping are its as well.
            self._note(f"({fault} is left out)")
            return
        # Noted before: the fault itself may take its time.
        self._note(str(fault))
        self.counts[fault.kind] += 1
        if fault.target in self._bank.clients:
            client = self._bank.clients[fault.target]
            process: ClientProcess | PostgresServer = client
        else:
            process = server = self._bank.local.servers[fault.target]
        match fault.kind.split():
            case "kill", _:
                process.kill()
                self._held[fault.target] = _Undoing(fault.seconds, process.start)
            case "pause", _:
                process.pause()
                self._held[fault.target] = _Undoing(fault.seconds, process.resume)
            case "restart", _:
                # In a thread of its own: it waits for the server.
                self._held[fault.target] = _Undoing(0.0, server.restart)
            case "crash", _:
                _crash_backend(server)

    def _is_free(self, target: str, *, at_once: bool = False) -> bool:
        held = self._held.get(target)
        if held is None:
            return True
        if at_once:
            held.now()
        if not held.is_done:
            return False
        del self._held[target]
        if held.error is not None:
            self.errors.append(f"{target} could not be healed: {held.error}")
        return True

    def _note(self, what: str) -> None:
        self.log.append((time.time(), what))


def _crash_backend(server: PostgresServer) -> None:
    """Kill one backend, so that the server ends all others and recovers."""
    with contextlib.suppress(psycopg.Error), _connect(server) as connection:
        connection.execute("SET statement_timeout = '2s'")
        rows = connection.execute(_BACKENDS).fetchall()
        if rows:
            os.kill(rows[0][0], signal.SIGKILL)


_BACKENDS = """
    SELECT pid FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
    ORDER BY state = 'active' DESC, state_change DESC LIMIT 1
"""


def _connect(server: PostgresServer) -> psycopg.Connection:
    url = server.url.replace("+psycopg", "")
    return psycopg.connect(url, autocommit=True, connect_timeout=2)
