"""What a server means by refusing to prepare, said so that a person can act on it.

A refusal is definite: the participant holds nothing, and can never prepare. What
PostgreSQL cannot prepare at all becomes the UnsupportedQueryError that a session raises
of itself where it knows before the commit.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc

from shardalchemy.commit.gid import Gid
from shardalchemy.engine.wire import driver_of, in_failed_transaction, simple_rows
from shardalchemy.errors import (
    PreparedSlotsExhausted,
    TransactionAborted,
    UnsupportedQueryError,
)
from shardalchemy.obstacles import refused_by

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["explained"]

_OLD = 60  # seconds; what is prepared for longer was left behind

_TAKEN = """
SELECT gid, database, owner, extract(epoch FROM clock_timestamp() - prepared)::bigint
  FROM pg_catalog.pg_prepared_xacts ORDER BY prepared
"""


def explained(
    shard: str, connection: Connection, gid: Gid, error: Exception
) -> Exception:
    """Return what to raise for *shard*'s refusal to commit or prepare *gid*.

    That is *error* itself where it says all there is to say.
    """
    found = error
    orig = error.orig if isinstance(error, sa_exc.DBAPIError) else None
    if not isinstance(orig, psycopg.Error):
        return error
    function = orig.diag.source_function
    if (
        isinstance(orig, psycopg.errors.UniqueViolation)
        and orig.diag.schema_name == "shardalchemy"
    ):
        # A tombstone stands there.
        found = TransactionAborted(
            f"the commit took so long to reach shard {shard} that recovery, which found"
            " it half prepared, has rolled it back on every shard. Run it again."
        )
    elif isinstance(orig, psycopg.errors.FeatureNotSupported):
        obstacle = refused_by(function, str(orig))
        if obstacle is not None:
            found = UnsupportedQueryError(
                f"the transaction {obstacle.what} on shard {shard}, and it has written"
                " on others: it has to be prepared on each of them, which PostgreSQL"
                f" refuses after that ({str(orig).strip()}). It was rolled back on"
                f" every shard. {obstacle.way_out}"
            )
    elif function == "MarkAsPreparing" and isinstance(
        orig,
        psycopg.errors.OutOfMemory | psycopg.errors.ObjectNotInPrerequisiteState,
    ):
        found = _exhausted(shard, connection, gid, orig)
    if found is not error:
        found.__cause__ = error
    return found


def _exhausted(
    shard: str, connection: Connection, gid: Gid, orig: psycopg.Error
) -> PreparedSlotsExhausted:
    found = PreparedSlotsExhausted(f"PREPARE TRANSACTION '{gid}/…'", None, orig)
    found.add_detail(
        f"shard {shard} has no room for another prepared transaction; the transaction"
        f" was rolled back on every shard. {_usage(connection, gid)}"
    )
    return found


def _usage(connection: Connection, gid: Gid) -> str:
    """Return who has taken the places of a server for prepared transactions."""
    if in_failed_transaction(driver_of(connection)):
        return "Set max_prepared_transactions higher."
    try:
        ((limit,),) = simple_rows(connection, "SHOW max_prepared_transactions")
        rows = simple_rows(connection, _TAKEN)
    except sa_exc.DBAPIError:
        return "Set max_prepared_transactions higher."
    if limit == "0":
        return (
            "Its max_prepared_transactions is 0: set it to at least max_connections and"
            " restart the server."
        )
    whose: Counter[str] = Counter()
    old = 0
    for name, _, _, age in rows:
        other = Gid.parse(name or "")
        ours = other is not None and other.cluster == gid.cluster
        whose["of this cluster" if ours else "foreign"] += 1
        old += ours and int(age or 0) >= _OLD
    taken = ", ".join(f"{count} {who}" for who, count in sorted(whose.items()))
    message = (
        f"Of its max_prepared_transactions = {limit} are taken: {taken or 'none'}. Set"
        " it to at least max_connections (it needs a restart)"
    )
    if old:
        message += (
            f"; {old} of this cluster are older than {_OLD} s: finish them with"
            " cluster.recover() or `shardalchemy recover`"
        )
    if whose["foreign"]:
        name, database, owner, age = next(
            row
            for row in rows
            if (g := Gid.parse(row[0] or "")) is None or g.cluster != gid.cluster
        )
        message += (
            f"; the oldest foreign one is {name!r} of {owner} in database {database},"
            f" {age} s old, to be ended by those whose it is"
        )
    return message
