"""One command to each of several connections, all sent before any reply is read.

What `fanout` does for any step, without its greenlets, for the one step that is
nothing but a message and its answer: the two rounds of a cross-shard commit.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any

import psycopg

from shardalchemy.engine.fanout import CANCEL_TIMEOUT, EVENTS, attempt_all, ready_state
from shardalchemy.engine.wire import driver_of, exchange, simple_query, tags, translated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

__all__ = ["broadcast"]


def broadcast(
    connections: Mapping[str, Connection], commands: Mapping[str, str]
) -> dict[str, list[str] | Exception]:
    """Send each shard its command; return its command tags, or its error.

    A Ctrl-C cancels the commands and is raised once every server has answered.
    """
    if any(c.dialect.is_async for c in connections.values()):
        return attempt_all(
            lambda shard, connection: simple_query(connection, commands[shard]),
            connections,
        )
    return _Broadcast(connections, commands).run()


class _Broadcast:
    def __init__(
        self, connections: Mapping[str, Connection], commands: Mapping[str, str]
    ) -> None:
        self._connections = connections
        self._commands = commands
        self._outcomes: dict[str, list[str] | Exception] = {}
        self._waiting: dict[int, tuple[str, Any, Any]] = {}
        self._poll = select.poll()

    def run(self) -> dict[str, list[str] | Exception]:
        try:
            for shard, connection in self._connections.items():
                driver: Any = driver_of(connection)
                # Not while another thread cancels what this connection did before.
                with driver.lock:
                    running = exchange(driver, self._commands[shard].encode())
                    self._advance(shard, driver, running, None)
            while self._waiting:
                self._answer_ready(None)
        except (KeyboardInterrupt, SystemExit):
            self._cancel()
            raise
        return self._outcomes

    def _advance(self, shard: str, driver: Any, running: Any, ready: Any) -> None:
        """Let one exchange go on until it waits again or is done."""
        try:
            wanted = running.send(ready)
        except StopIteration as stop:
            self._outcomes[shard] = tags(stop.value)
        except psycopg.Error as error:
            connection = self._connections[shard]
            self._outcomes[shard] = translated(connection, self._commands[shard], error)
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
        for _, driver, _ in self._waiting.values():
            driver.pgconn.finish()
