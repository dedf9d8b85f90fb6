"""One command to each of several connections, all sent before any reply is read.

What `fanout` does for any step, without its greenlets, for the one step that is
nothing but a message and its answer: the two rounds of a cross-shard commit, and those
by which a snapshot is opened.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any

import psycopg

from shardalchemy.engine.fanout import CANCEL_TIMEOUT, EVENTS, attempt_all, ready_state
from shardalchemy.engine.wire import (
    driver_of,
    exchange,
    is_busy,
    results_of,
    rows,
    tags,
    translated,
    unanswered,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg.pq.abc import PGresult
    from sqlalchemy import Connection

__all__ = ["ask_all", "broadcast"]

Rows = list[tuple[str | None, ...]]


def broadcast(
    connections: Mapping[str, Connection],
    commands: Mapping[str, str | None],
    *,
    until: float | None = None,
) -> dict[str, list[str] | Exception]:
    """Send each shard its command; return its command tags, or its error.

    None instead of a command waits for the answer to one that `wire.send` has sent.
    *until* is a moment of ``time.monotonic()``: a connection on which there is no
    answer by then is closed. A Ctrl-C cancels the commands and is raised once every
    server has answered.
    """
    return {
        shard: outcome if isinstance(outcome, Exception) else tags(outcome)
        for shard, outcome in _results(connections, commands, until).items()
    }


def ask_all(
    connections: Mapping[str, Connection],
    commands: Mapping[str, str],
    *,
    until: float | None = None,
) -> dict[str, Rows | Exception]:
    """Do what `broadcast` does; return the rows of all its statements, as text."""
    return {
        shard: outcome if isinstance(outcome, Exception) else rows(outcome)
        for shard, outcome in _results(connections, commands, until).items()
    }


def _results(
    connections: Mapping[str, Connection],
    commands: Mapping[str, str | None],
    until: float | None,
) -> dict[str, list[PGresult] | Exception]:
    asked = {s: c for s, c in connections.items() if s in commands}
    if any(c.dialect.is_async for c in asked.values()):
        return attempt_all(
            lambda shard, connection: results_of(connection, commands[shard], until),
            asked,
        )
    return _Broadcast(asked, commands, until).run()


class _Broadcast:
    def __init__(
        self,
        connections: Mapping[str, Connection],
        commands: Mapping[str, str | None],
        until: float | None,
    ) -> None:
        self._connections = connections
        self._commands = commands
        self._until = until
        self._outcomes: dict[str, list[PGresult] | Exception] = {}
        self._drivers: dict[str, Any] = {}
        self._waiting: dict[int, tuple[str, Any, Any]] = {}
        self._poll = select.poll()

    def run(self) -> dict[str, list[PGresult] | Exception]:
        try:
            for shard, connection in self._connections.items():
                driver: Any = driver_of(connection)
                self._drivers[shard] = driver
                command = self._commands[shard]
                running = exchange(
                    driver, None if command is None else command.encode()
                )
                # Not while another thread cancels what this connection did before.
                with driver.lock:
                    self._advance(shard, driver, running, None)
            while self._waiting:
                left = None
                if self._until is not None:
                    left = self._until - time.monotonic()
                    if left <= 0:
                        self._give_up()
                        break
                self._answer_ready(left)
        except BaseException:  # a Ctrl-C, or what another signal's handler raises
            self._cancel()
            raise
        return self._outcomes

    def _advance(self, shard: str, driver: Any, running: Any, ready: Any) -> None:
        """Let one exchange go on until it waits again or is done."""
        try:
            wanted = running.send(ready)
        except StopIteration as stop:
            self._outcomes[shard] = stop.value
        except psycopg.Error as error:
            connection = self._connections[shard]
            command = self._commands[shard] or ""
            self._outcomes[shard] = translated(connection, command, error)
        else:
            descriptor = driver.pgconn.socket
            self._poll.register(descriptor, EVENTS[int(wanted)])
            self._waiting[descriptor] = (shard, driver, running)

    def _answer_ready(self, timeout: float | None) -> None:
        milliseconds = None if timeout is None else timeout * 1000
        for descriptor, events in self._poll.poll(milliseconds):
            shard, driver, running = self._waiting.pop(descriptor)
            self._poll.unregister(descriptor)
            self._advance(shard, driver, running, ready_state(events))

    def _give_up(self) -> None:
        """Close the connections that are still waited for."""
        for shard, driver, _ in self._waiting.values():
            driver.pgconn.finish()
            connection = self._connections[shard]
            command = self._commands[shard] or ""
            self._outcomes[shard] = translated(connection, command, unanswered())

    def _cancel(self) -> None:
        """Cancel what is waited for; close what does not say so in time."""
        for _, driver, _ in self._waiting.values():
            try:
                driver.cancel_safe(timeout=CANCEL_TIMEOUT)
            except psycopg.Error:
                driver.pgconn.finish()
        deadline = time.monotonic() + CANCEL_TIMEOUT
        while self._waiting and time.monotonic() < deadline:
            if any(driver.closed for _, driver, _ in self._waiting.values()):
                break
            self._answer_ready(0.1)
        # What is still under way did not answer, or was interrupted in the middle.
        for shard, driver in self._drivers.items():
            if shard not in self._outcomes and is_busy(driver):
                driver.pgconn.finish()
