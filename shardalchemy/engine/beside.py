"""A connection to each shard beside those of the sessions.

For what has to get through when sessions have every connection of the pools, because
they all wait. Statements on it are psycopg's own: no event and no echo tells of them.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
from psycopg.rows import tuple_row

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

__all__ = ["Beside"]

_IDLE = 10.0  # seconds after which a connection that nobody has used is closed
_AWAY = 5.0  # seconds for which a shard that did not answer is not asked again
_INTERVAL = 0.1  # seconds between looks at the clock


class Beside:
    """Connections for one thread, each opened by *connect* when it is first used.

    A server that takes more than *patience* seconds over an answer counts as away.
    """

    def __init__(
        self,
        connect: Callable[[str], psycopg.Connection[Any]],
        patience: float = 2.0,
    ) -> None:
        self._connect = connect
        self._patience = patience
        self._open: dict[str, tuple[psycopg.Connection[Any], float]] = {}
        self._away: dict[str, tuple[psycopg.Error, float]] = {}

    def ask(
        self, shard: str, sql: LiteralString, parameters: Mapping[str, Any]
    ) -> list[Any]:
        """Execute one statement in a transaction of its own; return its rows.

        Raises psycopg's error, and does so for a while without asking where a shard
        did not answer.
        """
        known = self._away.get(shard)
        if known is not None and time.monotonic() < known[1]:
            raise known[0]
        try:
            connection = self._opened(shard)
            with connection.cursor(row_factory=tuple_row) as cursor:
                # Behind a pooler another connection may get the prepared statement.
                cursor.execute(sql, parameters, prepare=False)
                return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            if shard not in self._open or self._open[shard][0].closed:
                self._drop(shard)
                self._away[shard] = (error, time.monotonic() + _AWAY)
            raise

    def _opened(self, shard: str) -> psycopg.Connection[Any]:
        connection, _ = self._open.get(shard, (None, 0.0))
        if connection is None:
            connection = self._connected(shard)
            connection.autocommit = True
            vars(connection)["wait"] = self._waiter(connection)
        self._open[shard] = (connection, time.monotonic())
        return connection

    def _connected(self, shard: str) -> psycopg.Connection[Any]:
        """Open a connection, in another thread: that may take no end."""
        opened: Future[psycopg.Connection[Any]] = Future()

        def connect() -> None:
            try:
                connection = self._connect(shard)
            except Exception as error:
                if opened.set_running_or_notify_cancel():
                    opened.set_exception(error)
                return
            if opened.set_running_or_notify_cancel():
                opened.set_result(connection)
            else:
                connection.close()

        threading.Thread(
            target=connect, name="shardalchemy-connect", daemon=True
        ).start()
        try:
            return opened.result(self._patience)
        except TimeoutError as error:
            if not opened.cancel():
                return opened.result()
            raise psycopg.OperationalError("the server did not answer") from error
        except psycopg.Error:
            raise
        except Exception as error:
            raise psycopg.OperationalError(str(error)) from error

    def _waiter(self, connection: psycopg.Connection[Any]) -> Callable[..., Any]:
        """Return what stands in for ``Connection.wait``, and gives up in time."""

        def watched(gen: Any, until: float) -> Generator[Any, Any, Any]:
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    if not ready and time.monotonic() > until:
                        connection.pgconn.finish()
                        raise psycopg.OperationalError("the server did not answer")
                    wanted = gen.send(ready)
            except StopIteration as stop:
                return stop.value

        def wait(gen: Any, *_: object, **__: object) -> Any:
            running = watched(gen, time.monotonic() + self._patience)
            return psycopg.Connection.wait(connection, running, _INTERVAL)

        return wait

    def _drop(self, shard: str) -> None:
        connection, _ = self._open.pop(shard, (None, 0.0))
        if connection is not None:
            # A reference to itself would leave the connection to the collector.
            vars(connection).pop("wait", None)
            connection.close()

    def close_idle(self) -> None:
        """Close the connections that nothing has used for a while."""
        before = time.monotonic() - _IDLE
        for shard in [s for s, (_, used) in self._open.items() if used < before]:
            self._drop(shard)

    def close(self) -> None:
        """Close all connections."""
        for shard in list(self._open):
            self._drop(shard)
