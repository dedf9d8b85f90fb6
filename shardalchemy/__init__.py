"""A drop-in SQLAlchemy session over many PostgreSQL servers.

    from shardalchemy import Cluster, sharded_by

    class Order(Base):
        __tablename__ = "orders"
        __table_args__ = {"info": sharded_by("customer_id")}

    cluster = Cluster({"s1": "postgresql+psycopg://…", "s2": "…"})
    cluster.create_all(Base.metadata)
    Session = cluster.sessionmaker()

An application goes on as it was: the session sends each statement and each row to the
shard it belongs to, commits over several with ``PREPARE TRANSACTION``, and refuses a
statement that it cannot answer exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardalchemy.cluster import Cluster
from shardalchemy.errors import (
    CatalogVersionError,
    CommitOutcomeUnknown,
    ConfigurationError,
    DeadlockDetected,
    DeclarationError,
    LockTimeout,
    PreparedSlotsExhausted,
    ScatterWarning,
    ShardAlchemyError,
    ShardKeyError,
    SnapshotOver,
    SnapshotReadOnly,
    SnapshotUnavailable,
    StatementTimeout,
    TopologyChanged,
    TransactionAborted,
    TransactionFailed,
    UnknownShardError,
    UnsupportedQueryError,
)
from shardalchemy.ids import locator_id
from shardalchemy.schema import reference_table, sharded_by
from shardalchemy.session import ShardedSession

if TYPE_CHECKING:
    from shardalchemy.asyncio import AsyncShardedSession

__all__ = [
    "AsyncShardedSession",
    "CatalogVersionError",
    "Cluster",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "DeadlockDetected",
    "DeclarationError",
    "LockTimeout",
    "PreparedSlotsExhausted",
    "ScatterWarning",
    "ShardAlchemyError",
    "ShardKeyError",
    "ShardedSession",
    "SnapshotOver",
    "SnapshotReadOnly",
    "SnapshotUnavailable",
    "StatementTimeout",
    "TopologyChanged",
    "TransactionAborted",
    "TransactionFailed",
    "UnknownShardError",
    "UnsupportedQueryError",
    "locator_id",
    "reference_table",
    "sharded_by",
]


def __getattr__(name: str) -> Any:
    # sqlalchemy.ext.asyncio is not imported before an application wants it.
    if name == "AsyncShardedSession":
        from shardalchemy.asyncio import AsyncShardedSession

        return AsyncShardedSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
