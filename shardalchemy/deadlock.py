"""The error of a statement that was cancelled to end a deadlock between shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from shardalchemy.errors import DeadlockDetected, ShardAlchemyError

if TYPE_CHECKING:
    from sqlalchemy import exc as sa_exc

    from shardalchemy.session import ShardedSession

__all__ = ["raise_deadlock"]


def raise_deadlock(session: ShardedSession, error: sa_exc.OperationalError) -> None:
    """Raise DeadlockDetected in place of *error* if a deadlock is what it comes of."""
    deadlock = session._deadlock
    if (
        deadlock is None
        or isinstance(error, ShardAlchemyError)
        or not isinstance(error.orig, psycopg.errors.QueryCanceled)
    ):
        return
    session._deadlock = None
    found = DeadlockDetected(
        error.statement,
        error.params,
        psycopg.errors.DeadlockDetected(str(deadlock)),
        hide_parameters=error.hide_parameters,
        connection_invalidated=error.connection_invalidated,
        ismulti=error.ismulti,
    )
    found.add_detail("roll back, and run the transaction again")
    raise found from error
