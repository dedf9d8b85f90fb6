"""Every error of shardalchemy, as one flat tree.

Each error also subclasses the SQLAlchemy error that a caller of a plain ``Session``
would already catch in that place, where there is one. A message says what was asked,
why it cannot be, and what to write instead.
"""

from __future__ import annotations

from sqlalchemy import exc as sa_exc

__all__ = [
    "CatalogVersionError",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "DeadlockDetected",
    "DeclarationError",
    "LocalServerError",
    "LockTimeout",
    "PreparedSlotsExhausted",
    "ScatterWarning",
    "ShardAlchemyError",
    "ShardKeyError",
    "SnapshotOver",
    "SnapshotReadOnly",
    "SnapshotUnavailable",
    "StatementTimeout",
    "TopologyChanged",
    "TransactionAborted",
    "TransactionFailed",
    "UnknownShardError",
    "UnsupportedQueryError",
]


class ShardAlchemyError(Exception):
    """The root of all errors that shardalchemy raises on its own account."""


class DeclarationError(ShardAlchemyError, sa_exc.ArgumentError):
    """A model's ``sharded_by`` or ``reference_table`` cannot be honoured."""


class ConfigurationError(ShardAlchemyError, sa_exc.ArgumentError):
    """A cluster's shards, or a server's settings, do not fit together."""


class CatalogVersionError(ConfigurationError):
    """A shard's catalog was written by another version of this library."""


class UnknownShardError(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A shard was named that the cluster does not have."""


class ShardKeyError(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A row's shard key is missing, of the wrong type, or was changed."""


class UnsupportedQueryError(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A statement cannot be answered exactly over several shards."""


class ScatterWarning(ShardAlchemyError, sa_exc.SAWarning):
    """A statement runs on every shard; the one of these errors that only warns."""


class TopologyChanged(ShardAlchemyError, sa_exc.InvalidRequestError):
    """Rows moved between shards while the transaction ran; run it again."""


class TransactionAborted(ShardAlchemyError, sa_exc.InvalidRequestError):
    """The transaction could not commit; no shard holds any of its writes."""


class CommitOutcomeUnknown(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A reply was lost and a participant cannot be asked; recovery will decide.

    ``gid`` names the transaction; every shard ends in the same state.
    """

    def __init__(self, message: str, gid: str) -> None:
        super().__init__(message)
        self.gid = gid


class PreparedSlotsExhausted(ShardAlchemyError, sa_exc.OperationalError):
    """A shard has no room for another prepared transaction; nothing was committed.

    ``orig`` is what PostgreSQL said to PREPARE TRANSACTION.
    """

    code = ""  # no page of SQLAlchemy's says more


class LockTimeout(ShardAlchemyError, sa_exc.TimeoutError):
    """A lock was not obtained within its timeout."""


class SnapshotUnavailable(ShardAlchemyError, sa_exc.TimeoutError):
    """A snapshot could not be opened on every shard within its timeout."""


class SnapshotOver(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A snapshot's transactions have ended; what it showed cannot be had again."""


class SnapshotReadOnly(ShardAlchemyError, sa_exc.InvalidRequestError):
    """A write was asked of a snapshot."""


class StatementTimeout(ShardAlchemyError, sa_exc.OperationalError):
    """A statement was not done within its timeout, and was cancelled on every shard.

    ``orig`` is psycopg's ``QueryCanceled``, as with PostgreSQL's own statement_timeout.
    """

    code = ""  # no page of SQLAlchemy's says more


class DeadlockDetected(ShardAlchemyError, sa_exc.OperationalError):
    """Transactions on several shards waited for each other; this one was cancelled.

    It was the youngest of them. Roll it back, and run it again. ``orig`` is psycopg's
    ``DeadlockDetected``, as it is where one PostgreSQL has found a deadlock.
    """

    code = ""  # no page of SQLAlchemy's says more


class TransactionFailed(ShardAlchemyError, sa_exc.InternalError):
    """A statement has failed on another shard in this transaction; roll it back.

    ``orig`` is psycopg's ``InFailedSqlTransaction``: what PostgreSQL says of a
    transaction that has failed on one server.
    """

    code = ""  # no page of SQLAlchemy's says more


class LocalServerError(ShardAlchemyError, RuntimeError):
    """A local PostgreSQL or Valkey server could not be found, started or stopped."""
