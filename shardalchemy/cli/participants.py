"""On how many shards a session's transaction wrote, as SQLAlchemy's events tell it.

Each flushed row is reported with the connection that it was written on, so this counts
what the session did, not what the ring says that it should do; the audit compares it
with where the rows are. It does not see statements, only flushes: right for the sale,
whose one DELETE statement is on a shard that the same transaction inserts on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import object_session

if TYPE_CHECKING:
    from sqlalchemy.orm import DeclarativeBase, Session

__all__ = ["count", "forget", "observe"]

_KEY = "shardalchemy.cli.participants"


def observe(base: type[DeclarativeBase]) -> None:
    """Take note of the rows that sessions flush of *base*'s classes from now on."""
    for name in ("after_insert", "after_update", "after_delete"):
        event.listen(base, name, _written, propagate=True)


def _written(mapper: object, connection: Any, target: object) -> None:
    session = object_session(target)
    assert session is not None
    session.info.setdefault(_KEY, set()).add(connection.engine)


def forget(session: Session) -> None:
    """Forget the rows of the transactions before."""
    session.info.pop(_KEY, None)


def count(session: Session) -> int:
    """Return on how many shards *session* has written since it was told to forget."""
    return len(session.info.get(_KEY, ()))
