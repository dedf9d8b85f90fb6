"""What a transaction may do that PostgreSQL then refuses to prepare.

A transaction that has written on several shards is prepared on each before it commits.
PostgreSQL does not prepare one that has sent or asked for notifications, worked on
temporary objects, exported a snapshot, or left a cursor ``WITH HOLD``: all of these
belong to the connection, and a prepared transaction has none. On one shard each of them
goes on working, for that transaction is not prepared.

`obstacle_in_sql` says what is certain of plain SQL. What is not, a trigger that
notifies for example, PostgreSQL itself says when it is asked to prepare: `refused_by`
tells from its message what it was.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache

__all__ = ["FUNCTIONS", "Obstacle", "obstacle_in_sql", "refused_by"]


class Obstacle(Enum):
    """What keeps a transaction from being prepared: what was done, and the way out."""

    NOTIFICATION = (
        "has executed LISTEN, UNLISTEN or NOTIFY (pg_notify(), perhaps in a trigger)",
        "Send notifications after the commit, in a transaction of their own or on a"
        " connection with isolation_level='AUTOCOMMIT', or add them to an outbox table"
        " in the transaction; LISTEN on a connection of its own.",
    )
    TEMPORARY = (
        "has created, read or changed temporary objects",
        "Fill temporary tables in a transaction of its own that writes on one shard, or"
        " use an ordinary (UNLOGGED) table, or a CTE.",
    )
    SNAPSHOT = (
        "has exported a snapshot with pg_export_snapshot()",
        "Export it in a transaction that only reads.",
    )
    CURSOR = (
        "has left a cursor WITH HOLD open",
        "CLOSE it before the commit, or declare it in a transaction of its own.",
    )
    LOCKS = (
        "holds one advisory lock twice, for the session (pg_advisory_lock) and for the"
        " transaction (pg_advisory_xact_lock)",
        "Take the lock for the transaction only: pg_advisory_xact_lock().",
    )
    OTHER = (
        "has done what a prepared transaction cannot keep",
        "Do it in a transaction of its own, which writes on one shard.",
    )

    @property
    def what(self) -> str:
        """What the transaction has done, as it goes on after its subject."""
        return self.value[0]

    @property
    def way_out(self) -> str:
        """What to do instead."""
        return self.value[1]


# What raises feature_not_supported in PostgreSQL's sources while it prepares. These are
# the same whatever the language of its messages is.
_REFUSALS = {
    "AtPrepare_Notify": Obstacle.NOTIFICATION,
    "PrepareTransaction": Obstacle.TEMPORARY,
    "PreCommit_Portals": Obstacle.CURSOR,
    "CheckForSessionAndXactLocks": Obstacle.LOCKS,
    "AtPrepare_Locks": Obstacle.LOCKS,
    "AtPrepare_RelationMap": Obstacle.OTHER,
}


def refused_by(function: str | None, message: str) -> Obstacle | None:
    """Return what PostgreSQL's *function* means by refusing to prepare (0A000).

    None if it is not one that prepares: a deferred trigger may say the same.
    """
    if function == "PrepareTransaction" and "snapshot" in message:
        return Obstacle.SNAPSHOT
    if message.startswith("cannot PREPARE"):
        return _REFUSALS.get(function or "", Obstacle.OTHER)
    return _REFUSALS.get(function or "")


_MAY_MATTER = re.compile(r"notify|listen|temp|export_snapshot", re.IGNORECASE)
# Strings and comments become a space, so that what they say is not taken for SQL; names
# in quotes keep their place.
_SET_ASIDE = re.compile(
    r"""
      --[^\r\n]* | /\*.*?\*/
    | [eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*'
    | \$(?P<tag>(?:[A-Za-z_]\w*)?)\$.*?\$(?P=tag)\$
    | (?P<name>"(?:[^"]|"")+")
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDS = re.compile(r"\w+|\S")
# UNLISTEN does nothing on a connection that does not listen.
_NOTIFIES = re.compile(r"(?:notify|listen) ")
_CALLS = re.compile(r"select (?:pg_catalog \. )?(pg_notify|pg_export_snapshot) \(")
# Words by which a call may turn out not to be made.
_CONDITIONS = frozenset({"from", "where", "case", "coalesce", "limit", "having"})
_TEMPORARY = re.compile(
    r"create (?:or replace )?(?:local |global )?(?:temp|temporary) "
    r"|create .*?\bpg_temp \. "
    r"|select .*?\binto (?:temp|temporary) "
    r"|.*?\b(?:from|join|into|update|truncate|alter table) (?:only )?pg_temp \. "
)

FUNCTIONS = {
    "pg_notify": Obstacle.NOTIFICATION,
    "pg_export_snapshot": Obstacle.SNAPSHOT,
}
"""Functions that are certain to keep the transaction that calls them from it."""


@lru_cache(1024)
def obstacle_in_sql(sql: str) -> Obstacle | None:
    """Return what in *sql*, one or more statements, is certain to keep from preparing.

    A cursor ``WITH HOLD`` is not, for it may be closed again.

    >>> obstacle_in_sql("NOTIFY orders, 'paid'").name
    'NOTIFICATION'
    >>> obstacle_in_sql("SELECT pg_notify('orders', 'paid') WHERE false")
    """
    if not _MAY_MATTER.search(sql):
        return None
    plain = _SET_ASIDE.sub(lambda match: " q " if match["name"] else " ", sql)
    found = (_in_one(statement.lower()) for statement in plain.split(";"))
    return next((obstacle for obstacle in found if obstacle is not None), None)


def _in_one(statement: str) -> Obstacle | None:
    words = _WORDS.findall(statement)
    said = " ".join(words) + " "
    if _NOTIFIES.match(said):
        return Obstacle.NOTIFICATION
    call = _CALLS.match(said)
    if call and not _CONDITIONS & set(words):
        return FUNCTIONS[call[1]]
    return Obstacle.TEMPORARY if _TEMPORARY.match(said) else None
