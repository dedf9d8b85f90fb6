"""A moment by which statements must be done, on any number of connections.

psycopg leaves all waiting for a server to ``Connection.wait``. On each connection that
a `Deadline` covers that is shadowed by one which also looks at the clock: when the
moment has passed it has the server cancel the statement, and waits for it to say so. A
fan-out waits for all its connections in one place, and keeps the same moment there.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import psycopg

from shardalchemy.engine.wire import driver_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy import Connection

__all__ = ["CANCEL_TIMEOUT", "BoundedWait", "Deadline", "earliest"]

CANCEL_TIMEOUT = 5.0
"""Seconds a cancelled statement may take to end before its connection is closed."""

_INTERVAL = 0.1  # seconds between looks at the clock, which are psycopg's own
_SHORTEST = 0.001


class Deadline:
    """The moment *seconds* from now, or that of the one *within* which it is made.

    ``late`` has the shards that were still at work when it passed.
    """

    def __init__(self, seconds: float, within: Deadline | None = None) -> None:
        self.seconds = seconds
        self.at = time.monotonic() + seconds
        if within is not None and within.at < self.at:
            self.seconds, self.at = within.seconds, within.at
        self.late: list[str] = []
        self._covered: list[tuple[Any, Any]] = []

    @property
    def left(self) -> float:
        """The seconds that are left; none or less once it has passed."""
        return self.at - time.monotonic()

    def cover(self, shard: str, connection: Connection) -> None:
        """Bound what *connection* waits for, until `end`."""
        driver = driver_of(connection)
        if all(driver is not other for other, _ in self._covered):
            self._covered.append((driver, vars(driver).get("wait")))
            vars(driver)["wait"] = BoundedWait(self, shard, driver)

    def end(self) -> None:
        """Let the connections wait as they did before."""
        while self._covered:
            driver, before = self._covered.pop()
            if before is None:
                vars(driver).pop("wait", None)
            else:
                vars(driver)["wait"] = before


def earliest(waits: list[Any]) -> Deadline | None:
    """Return the first deadline of what connections have in place of their wait."""
    bounds = [wait.deadline for wait in waits if isinstance(wait, BoundedWait)]
    return min(bounds, key=lambda bound: bound.at, default=None)


class BoundedWait:
    """Stands in for the ``wait`` of a connection, sync or async, until a deadline."""

    def __init__(self, deadline: Deadline, shard: str, driver: Any) -> None:
        self.deadline = deadline
        self._shard = shard
        self._driver = driver
        self._cancelling: asyncio.Future[None] | None = None

    def __call__(self, gen: Any, *_: object, **__: object) -> Any:
        driver = self._driver
        interval = max(_SHORTEST, min(_INTERVAL, self.deadline.left))
        if isinstance(driver, psycopg.AsyncConnection):
            return self._wait_in_loop(gen, interval)
        return psycopg.Connection.wait(driver, self._watched(gen), interval)

    async def _wait_in_loop(self, gen: Any, interval: float) -> Any:
        driver = self._driver
        try:
            return await psycopg.AsyncConnection.wait(
                driver, self._watched(gen), interval
            )
        finally:
            # A cancellation under way would hit the connection's next statement.
            if self._cancelling is not None:
                await self._cancelling
                self._cancelling = None

    def _watched(self, gen: Any) -> Generator[Any, Any, Any]:
        """Yield what *gen* waits for; cancel it when the deadline has passed."""
        cancelled_at: float | None = None
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if cancelled_at is None:
                    if now >= self.deadline.at:
                        cancelled_at = now
                        self.deadline.late.append(self._shard)
                        self._cancel()
                elif now - cancelled_at > CANCEL_TIMEOUT:
                    raise self._given_up()
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value

    def _cancel(self) -> None:
        if isinstance(self._driver, psycopg.AsyncConnection):
            self._cancelling = asyncio.ensure_future(self._cancel_in_loop())
            return
        try:
            self._driver.cancel_safe(timeout=CANCEL_TIMEOUT)
        except psycopg.Error as error:
            raise self._given_up() from error

    async def _cancel_in_loop(self) -> None:
        try:
            await self._driver.cancel_safe(timeout=CANCEL_TIMEOUT)
        except psycopg.Error:
            return  # who waits for the statement gives the connection up in time

    def _given_up(self) -> psycopg.Error:
        """Close the connection, in a state that nobody knows; return the error."""
        self._driver.pgconn.finish()
        return psycopg.OperationalError(
            f"shard {self._shard} did not answer a cancellation"
        )
