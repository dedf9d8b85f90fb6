"""A session's transaction over several shards.

SQLAlchemy commits a session's connections one after another. Here the commit is made
when the session transaction *prepares*: flushed, with all its connections still open.
What SQLAlchemy then does to each connection finds nothing left to send, so its own
states and events stay as they are in a plain ``Session``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy.engine import RootTransaction
from sqlalchemy.orm.session import (
    SessionTransaction,
    SessionTransactionOrigin,
    SessionTransactionState,
)
from sqlalchemy.orm.state_changes import _StateChange, _StateChangeStates

from shardalchemy.engine import attempt_all, ended, fanout
from shardalchemy.engine.wire import (
    driver_of,
    in_failed_transaction,
    in_transaction,
    is_lost,
    simple_query,
)
from shardalchemy.errors import TransactionAborted, TransactionFailed
from shardalchemy.flush import RowConnections
from shardalchemy.isolation import connection_options
from shardalchemy.rows import row_placement
from shardalchemy.schema import Kind
from shardalchemy.secondary import SecondaryRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from shardalchemy.session import ShardedSession

__all__ = ["ShardedTransaction", "check_not_failed"]

logger = logging.getLogger(__name__)


class _Routed(SessionTransaction):
    """A transaction whose flushes send each row of a secondary table to its shard."""

    session: ShardedSession
    _settings_before: tuple[int, dict[str, int]] = (0, {})
    _unpreparable_before: int = 0

    def connection(self, bindkey: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the connection for *bindkey*; in a flush what stands for several."""
        if self.session._copies is not None:
            return self.session._copies
        rows = self.session.connection_callable
        if (
            isinstance(rows, RowConnections)
            and bindkey is not None
            and row_placement(bindkey).kind is not Kind.HOME
        ):
            return SecondaryRows(rows)
        return super().connection(bindkey, *args, **kwargs)

    @_StateChange.declare_states(
        (SessionTransactionState.ACTIVE,), _StateChangeStates.NO_CHANGE
    )
    def _begin(self, nested: bool = False) -> SessionTransaction:
        origin = (
            SessionTransactionOrigin.BEGIN_NESTED
            if nested
            else SessionTransactionOrigin.SUBTRANSACTION
        )
        made = _Routed(self.session, origin, self)
        made._settings_before = self.session._settings.mark()
        made._unpreparable_before = self.session._unpreparable.mark()
        return made

    def _restore_snapshot(self, dirty_only: bool = False) -> None:
        if self.nested:
            self.session._settings.back_to(self._settings_before)
            self.session._unpreparable.back_to(self._unpreparable_before)
        super()._restore_snapshot(dirty_only)


class ShardedTransaction(_Routed):
    """The root transaction of a `ShardedSession`."""

    _options: Mapping[str, Any] | None = None
    """What its connections are opened with, once there is one."""

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Any:
        if bind not in self._connections:
            execution_options = connection_options(self, bind, execution_options)
        return super()._connection_for_bind(bind, execution_options)

    @_StateChange.declare_states(
        (SessionTransactionState.ACTIVE,), SessionTransactionState.PREPARED
    )
    def _prepare_impl(self) -> None:
        with self._expect_state(SessionTransactionState.PREPARED):
            super()._prepare_impl()
        connections = self._own_connections()
        if not connections:
            return
        try:
            if len(connections) > 1:
                self._commit_together(connections)
            elif not self._commit_alone(*connections.popitem()):
                return
        except BaseException:
            self._give_up_lost()
            try:
                with self._expect_state(SessionTransactionState.CLOSED):
                    self.rollback()
            except Exception as error:  # it would take the place of what is to be told
                logger.warning("a commit that failed is not rolled back: %s", error)
            raise
        self._give_up_lost(hung_up=False)

    def close(self, invalidate: bool = False) -> None:
        """Close the transaction, and let others have the rows' turns."""
        try:
            self._roll_back_together()
            super().close(invalidate)
        finally:
            self.session._forget_transaction()

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        """Roll back on all shards at once; on one that has hung up, it has happened."""
        self._roll_back_together()
        super().rollback(*args, **kwargs)

    def _roll_back_together(self) -> None:
        """Roll back what is open on several shards, so that none fails for another's.

        SQLAlchemy goes from one to the next, and stops at the first error.
        """
        # Each connection is there twice: by itself, and by its engine.
        if (
            len(self._connections) <= 2
            or self._state is SessionTransactionState.COMMITTED
        ):
            return
        self._give_up_lost()
        connections = {
            shard: connection
            for shard, connection in self._own_connections().items()
            if in_transaction(driver_of(connection))
        }
        attempt_all(
            lambda _, connection: simple_query(connection, "ROLLBACK"), connections
        )
        self._give_up_lost()

    def _give_up_lost(self, *, hung_up: bool = True) -> None:
        """Leave connections that were lost out of what SQLAlchemy still has to end.

        The outcome is known by now; a COMMIT or ROLLBACK that cannot be sent would
        hide it, and keep other shards from theirs. *hung_up* looks for those of which
        the server has not been heard to have ended them.
        """
        lost = ended(self._own_connections()) if hung_up else {}
        for key, (connection, transaction, ends, own) in list(
            self._connections.items()
        ):
            if ends and (
                connection.invalidated
                or self.session._names.get(connection.engine) in lost
                or is_lost(driver_of(connection))
            ):
                connection.invalidate()
                self._connections[key] = (connection, transaction, False, own)

    def _own_connections(self) -> dict[str, Connection]:
        """Return the shards' connections on which this transaction is to be ended.

        Not those that the caller gave with a transaction of their own.
        """
        names = self.session._names
        return {
            names[connection.engine]: connection
            for connection, transaction, ends, _ in set(self._connections.values())
            if ends
            and isinstance(transaction, RootTransaction)
            and connection.engine in names
        }

    def _commit_alone(self, shard: str, connection: Connection) -> bool:
        """Commit the one shard there is; return False to leave that to SQLAlchemy.

        Its own COMMIT is all there is to do where nothing sharded was written, and
        where it says why it cannot be done.
        """
        self.session._commit_began = True
        if (
            shard not in self.session._written_shards
            or not self.session._cluster.resolve_commits
            or in_failed_transaction(driver_of(connection))
        ):
            return False
        check_not_ended({shard: connection})
        self.session._commit_alone(shard, connection)
        return True

    def _commit_together(self, connections: Mapping[str, Connection]) -> None:
        # In the order of their names, so that transactions that meet meet in one order.
        connections = dict(sorted(connections.items()))
        check_not_ended(connections)
        for shard, connection in connections.items():
            _check_may_commit(shard, connection)
        written = self._written(connections)
        self.session._unpreparable.check(written)
        self.session._commit_began = True
        if len(written) > 1:
            self.session._commit_on({s: connections[s] for s in written})
            connections = {s: c for s, c in connections.items() if s not in written}
            _end(connections, decided=True)
        elif written:
            (writer,) = written
            connection = connections.pop(writer)
            if self.session._cluster.resolve_commits:
                self.session._commit_alone(writer, connection)
            else:
                _end({writer: connection}, decided=False)
            _end(connections, decided=True)
        else:
            _end(connections, decided=False)

    def _written(self, connections: Mapping[str, Connection]) -> list[str]:
        """Return the shards on which the transaction has an id, having written."""
        known = self.session._written_shards
        asked = {s: c for s, c in connections.items() if s not in known}
        answers = fanout(_has_written, asked) if asked else {}
        return [s for s in connections if s in known or answers[s]]


def check_not_failed(session: ShardedSession, connection: Connection) -> None:
    """Refuse *connection* to a transaction in which another shard's statement failed.

    On one PostgreSQL, every statement after a failed one fails until the transaction,
    or the savepoint before it, is rolled back. Of its own failure a shard tells itself.
    """
    transaction: Any = session._transaction
    while transaction.parent is not None:
        transaction = transaction.parent
    # Each connection is there twice: by itself, and by its engine.
    if len(transaction._connections) <= 2:
        return
    for engine, (other, *_) in transaction._connections.items():
        shard = session._names.get(engine)
        if shard is None or other is connection:
            continue
        if other.invalidated:
            check_not_ended({shard: other})
        if in_failed_transaction(driver_of(other)):
            error = TransactionFailed(
                None,
                None,
                psycopg.errors.InFailedSqlTransaction(
                    "current transaction is aborted, commands ignored until end of"
                    " transaction block"
                ),
            )
            error.add_detail(
                f"a statement on shard {shard} has failed in this transaction; roll it"
                " back, or to the savepoint before"
            )
            raise error


def check_not_ended(connections: Mapping[str, Connection]) -> None:
    """Raise TransactionAborted if a shard has ended the transaction's connection."""
    for shard, reason in ended(connections).items():
        raise TransactionAborted(
            f"the connection to shard {shard} was lost in the middle of the transaction"
            f" ({reason}); it is rolled back on every shard. Run it again."
        )


def _check_may_commit(shard: str, connection: Connection) -> None:
    """Raise TransactionAborted where the server would answer ROLLBACK to COMMIT."""
    if in_failed_transaction(driver_of(connection)):
        raise TransactionAborted(
            f"a statement on shard {shard} has failed in this transaction; it cannot"
            " commit and it was rolled back on every shard."
        )


def _end(connections: Mapping[str, Connection], *, decided: bool) -> None:
    """End the transactions of shards on which nothing was written.

    Where the outcome is *decided* by writes elsewhere, a failure to end one changes
    nothing for the caller any more.
    """

    def commit(shard: str, connection: Connection) -> None:
        (tag,) = simple_query(connection, "COMMIT")
        if tag != "COMMIT":
            raise TransactionAborted(
                f"the transaction on shard {shard} had failed before the commit; it was"
                " rolled back."
            )

    if not connections:
        return
    outcomes = attempt_all(commit, connections)
    for shard, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            if not decided:
                raise outcome
            logger.warning("shard %s, only read from, did not end: %s", shard, outcome)


def _has_written(shard: str, connection: Connection) -> Any:
    return connection.exec_driver_sql(
        "SELECT pg_current_xact_id_if_assigned() IS NOT NULL"
    ).scalar()
