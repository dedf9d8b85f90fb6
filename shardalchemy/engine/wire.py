"""Single round trips on a connection, below SQLAlchemy.

The commit protocol sends ``PREPARE TRANSACTION`` behind a marker row in one message,
and ``COMMIT PREPARED`` outside any transaction block. psycopg's ``execute`` would
begin a transaction for the second, and SQLAlchemy knows neither.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import psycopg
from psycopg import generators
from psycopg.pq import ExecStatus, TransactionStatus
from sqlalchemy import exc as sa_exc
from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult
    from sqlalchemy import Connection

__all__ = [
    "driver_of",
    "in_failed_transaction",
    "in_transaction",
    "is_busy",
    "is_lost",
    "kept_if_sound",
    "rows",
    "simple_query",
    "simple_rows",
]

Driver = psycopg.Connection[object] | psycopg.AsyncConnection[object]


def driver_of(connection: Connection) -> Driver:
    """Return the psycopg connection under a SQLAlchemy one."""
    return cast("Driver", connection.connection.driver_connection)


def is_lost(driver: Driver) -> bool:
    """Return whether the connection to the server is known to be gone."""
    return driver.closed


@contextmanager
def kept_if_sound(connection: Connection) -> Iterator[Connection]:
    """Close *connection* at the end of a ``with`` block, for good if it was lost.

    It must not go back to a pool then, nor be rolled back.
    """
    with connection:
        try:
            yield connection
        finally:
            if not connection.invalidated and is_lost(driver_of(connection)):
                connection.invalidate()


def is_busy(driver: Driver) -> bool:
    """Return whether an answer of the server is still to be read."""
    return driver.pgconn.transaction_status == TransactionStatus.ACTIVE


def in_failed_transaction(driver: Driver) -> bool:
    """Return whether the server will answer ROLLBACK to a COMMIT."""
    return driver.pgconn.transaction_status == TransactionStatus.INERROR


def in_transaction(driver: Driver) -> bool:
    """Return whether the server is in a transaction block, failed or not."""
    return driver.pgconn.transaction_status in (
        TransactionStatus.INTRANS,
        TransactionStatus.INERROR,
    )


def exchange(driver: Driver, sql: bytes | None) -> PQGen[list[PGresult]]:
    """Send *sql* as one message and yield until its results are there.

    None waits for those of a message that has been sent before, by `send`.
    """
    if sql is not None:
        driver.pgconn.send_query(sql)
    results: list[PGresult] = yield from generators.execute(driver.pgconn)
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(
                result, encoding=driver.info.encoding
            )
    return results


def simple_query(connection: Connection, sql: str) -> list[str]:
    """Send *sql*, one or more statements, as one message; return the command tags.

    Raises the SQLAlchemy error of the first statement that fails, as ``execute`` would.
    On an async connection it must be called within SQLAlchemy's greenlet.
    """
    return tags(results_of(connection, sql))


def simple_rows(connection: Connection, sql: str) -> list[tuple[str | None, ...]]:
    """Do the same; return the rows of all results, each value as PostgreSQL's text."""
    return rows(results_of(connection, sql))


def send(connection: Connection, sql: str) -> None:
    """Send *sql*, a short message, and do not wait for anything."""
    try:
        driver_of(connection).pgconn.send_query(sql.encode())
    except psycopg.Error as error:
        raise translated(connection, sql, error) from error


def results_of(
    connection: Connection, sql: str | None, until: float | None = None
) -> list[PGresult]:
    """Do what `simple_query` does, and return the results as libpq has them.

    *until* is a moment of ``time.monotonic()``, for async connections alone: one on
    which the server has not answered by then is closed.
    """
    driver = driver_of(connection)
    running = exchange(driver, None if sql is None else sql.encode())
    results: list[PGresult]
    try:
        if isinstance(driver, psycopg.AsyncConnection):
            results = await_only(_awaited(driver, running, until))
        else:
            with driver.lock:
                results = driver.wait(running)
    except psycopg.Error as error:
        raise translated(connection, sql or "", error) from error
    return results


def tags(results: list[PGresult]) -> list[str]:
    """Return the command tags of results, such as ``PREPARE TRANSACTION``."""
    return [(result.command_status or b"").decode() for result in results]


def rows(results: list[PGresult]) -> list[tuple[str | None, ...]]:
    """Return the rows of all results, one after another's, as PostgreSQL wrote them."""
    return [
        tuple(
            None if value is None else value.decode()
            for value in (result.get_value(row, n) for n in range(result.nfields))
        )
        for result in results
        for row in range(result.ntuples)
    ]


def translated(connection: Connection, sql: str, error: psycopg.Error) -> Exception:
    """Return the SQLAlchemy error that ``execute`` would raise for *error*."""
    found: Exception = sa_exc.DBAPIError.instance(
        sql, None, error, psycopg.Error, dialect=connection.dialect
    )
    return found


def unanswered() -> psycopg.Error:
    """Return the error of a connection that was closed for want of an answer."""
    return psycopg.OperationalError("the server has not answered in time")


async def _awaited(
    driver: psycopg.AsyncConnection[object],
    exchange: PQGen[list[PGresult]],
    until: float | None,
) -> list[PGresult]:
    loop = asyncio.get_running_loop()
    hanging_up = None
    if until is not None:
        left = max(0.0, until - time.monotonic())
        hanging_up = loop.call_later(left, _hang_up, driver)
    try:
        async with driver.lock:
            results: list[PGresult] = await driver.wait(exchange)
    except psycopg.Error:
        if until is not None and driver.closed and time.monotonic() >= until:
            raise unanswered() from None
        raise
    finally:
        if hanging_up is not None:
            hanging_up.cancel()
    return results


def _hang_up(driver: Driver) -> None:
    """Have what waits for the server find the connection at its end.

    The event loop waits for the descriptor, which must not be closed under it.
    """
    if not driver.closed:
        with socket.socket(fileno=os.dup(driver.pgconn.socket)) as line:
            line.shutdown(socket.SHUT_RDWR)
