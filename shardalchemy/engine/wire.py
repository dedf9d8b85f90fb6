"""Single round trips on a connection, below SQLAlchemy.

The commit protocol sends ``PREPARE TRANSACTION`` behind a marker row in one message,
and ``COMMIT PREPARED`` outside any transaction block. psycopg's ``execute`` would
begin a transaction for the second, and SQLAlchemy knows neither.
"""

from __future__ import annotations

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
    "is_lost",
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


def in_failed_transaction(driver: Driver) -> bool:
    """Return whether the server will answer ROLLBACK to a COMMIT."""
    return driver.pgconn.transaction_status == TransactionStatus.INERROR


def exchange(driver: Driver, sql: bytes) -> PQGen[list[PGresult]]:
    """Send *sql* as one message and yield until its results are there."""
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
    return tags(_results(connection, sql))


def simple_rows(connection: Connection, sql: str) -> list[tuple[str | None, ...]]:
    """Do the same; return the rows of all results, each value as PostgreSQL's text."""
    return [row for result in _results(connection, sql) for row in rows(result)]


def _results(connection: Connection, sql: str) -> list[PGresult]:
    driver = driver_of(connection)
    running = exchange(driver, sql.encode())
    results: list[PGresult]
    try:
        if isinstance(driver, psycopg.AsyncConnection):
            results = await_only(_awaited(driver, running))
        else:
            with driver.lock:
                results = driver.wait(running)
    except psycopg.Error as error:
        raise translated(connection, sql, error) from error
    return results


def rows(result: PGresult) -> Iterator[tuple[str | None, ...]]:
    """Yield the rows of a result, each value as PostgreSQL's text."""
    columns = range(result.nfields)
    for number in range(result.ntuples):
        values = (result.get_value(number, column) for column in columns)
        yield tuple(None if value is None else value.decode() for value in values)


def tags(results: list[PGresult]) -> list[str]:
    """Return the command tags of results, such as ``PREPARE TRANSACTION``."""
    return [(result.command_status or b"").decode() for result in results]


def translated(connection: Connection, sql: str, error: psycopg.Error) -> Exception:
    """Return the SQLAlchemy error that ``execute`` would raise for *error*."""
    found: Exception = sa_exc.DBAPIError.instance(
        sql, None, error, psycopg.Error, dialect=connection.dialect
    )
    return found


async def _awaited(
    driver: psycopg.AsyncConnection[object], exchange: PQGen[list[PGresult]]
) -> list[PGresult]:
    async with driver.lock:
        results: list[PGresult] = await driver.wait(exchange)
    return results
