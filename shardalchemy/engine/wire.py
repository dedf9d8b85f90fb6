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


def simple_rows(connection: Connection, sql: str) -> list[tuple[str | None, ...]]:
    """Send *sql* as `simple_query` does; return its rows, as PostgreSQL writes them."""
    (result,) = _results(connection, sql)[-1:]
    encoding = driver_of(connection).info.encoding

    def text(row: int, column: int) -> str | None:
        value = result.get_value(row, column)
        return None if value is None else value.decode(encoding)

    return [
        tuple(text(row, column) for column in range(result.nfields))
        for row in range(result.ntuples)
    ]


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
