"""The isolation level of a transaction, the same on every shard that it touches.

In a plain ``Session`` the options of its one connection hold for the whole transaction.
Here the first connection's are given to all that follow, also to those of shards that
the transaction meets later. psycopg puts the level in the BEGIN that it sends anyway,
and the pool resets it, so this costs no round trip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.util import EMPTY_DICT, warn

from shardalchemy.errors import ConfigurationError, UnsupportedQueryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Engine

    from shardalchemy.transaction import ShardedTransaction

__all__ = ["checked_level", "connection_options"]

_LEVELS = (
    "READ UNCOMMITTED",
    "READ COMMITTED",
    "REPEATABLE READ",
    "SERIALIZABLE",
    "AUTOCOMMIT",
)

# What PostgreSQL fixes for a transaction when it begins.
_OF_A_TRANSACTION = ("isolation_level", "postgresql_readonly", "postgresql_deferrable")


def checked_level(level: object) -> str:
    """Return *level* as PostgreSQL spells it; raise ConfigurationError if it is none.

    >>> checked_level("repeatable_read")
    'REPEATABLE READ'
    """
    spelled = _spelled(level) if isinstance(level, str) else None
    if spelled not in _LEVELS:
        raise ConfigurationError(
            f"isolation_level is {level!r}; it is one of {', '.join(_LEVELS)}."
        )
    return spelled


def _spelled(level: str) -> str:
    return level.replace("_", " ").upper()


def connection_options(
    transaction: ShardedTransaction,
    bind: Engine | Connection,
    given: Mapping[str, Any] | None,
) -> Mapping[str, Any] | None:
    """Return the execution options with which *transaction* connects to *bind*.

    *given* are those of the call that needs it first. Raises UnsupportedQueryError
    where a transaction without COMMIT would reach a second shard.
    """
    session = transaction.session
    if not transaction._connections:
        level = session._isolation_level
        options: dict[str, Any] = {} if level is None else {"isolation_level": level}
        options.update(given or EMPTY_DICT)
        transaction._options = options or None
        return transaction._options
    whole = transaction._options or EMPTY_DICT
    if whole.get("isolation_level"):
        _check_not_autocommit(whole["isolation_level"], session._names.get(bind.engine))
    if not given:
        return transaction._options
    differing = {
        name
        for name in _OF_A_TRANSACTION
        if name in given and given[name] != whole.get(name)
    }
    if differing:
        # As a Session says it of its one connection.
        warn(
            "The transaction has begun on another shard; execution_options"
            f" {', '.join(sorted(differing))} ignored"
        )
    return {**whole, **{k: v for k, v in given.items() if k not in differing}}


def _check_not_autocommit(level: str, shard: str | None) -> None:
    if _spelled(level) == "AUTOCOMMIT":
        raise UnsupportedQueryError(
            f"the transaction has isolation_level AUTOCOMMIT and would go on on shard"
            f" {shard}: without a COMMIT nothing makes what it does on several shards"
            " one. Leave AUTOCOMMIT out, or use a session for each shard."
        )
