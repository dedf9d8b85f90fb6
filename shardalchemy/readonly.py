"""The session of a snapshot: on all shards from the beginning, and never to be written.

Its transaction is given connections that are in their snapshots' transactions already.
It ends as any other does, and with it the session: what came after it would see each
shard at another moment.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy import Connection
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm.session import SessionTransactionOrigin

from shardalchemy.engine import ask_all, broadcast
from shardalchemy.engine.wire import driver_of, in_transaction, is_lost
from shardalchemy.errors import (
    ConfigurationError,
    SnapshotOver,
    SnapshotReadOnly,
    SnapshotUnavailable,
)
from shardalchemy.session import ShardedSession
from shardalchemy.transaction import ShardedTransaction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.orm.session import SessionTransaction

__all__ = ["SnapshotSession"]

T = TypeVar("T")

_EXPORT = "SELECT pg_export_snapshot()"


class SnapshotTransaction(ShardedTransaction):
    """The one transaction of a `SnapshotSession`."""

    session: SnapshotSession

    def adopt(self, connections: Mapping[str, Connection]) -> None:
        """Take over connections, by shard, whose transactions have begun."""
        for connection in connections.values():
            entry = (connection, connection.get_transaction(), True, True)
            self._connections[connection] = entry  # type: ignore[assignment]
            self._connections[connection.engine] = entry  # type: ignore[assignment]
            self.session.dispatch.after_begin(self.session, self, connection)

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        if bind not in self._connections:
            raise SnapshotOver(
                f"{bind!r} is no shard of this snapshot. Use a session of its own for"
                " what is not on the cluster's shards."
            )
        connection: Connection = super()._connection_for_bind(bind, execution_options)
        return connection

    def _written(self, connections: Mapping[str, Connection]) -> list[str]:
        return []

    def close(self, invalidate: bool = False) -> None:
        """End the transactions on all shards at once."""
        try:
            if not invalidate:
                connections = {
                    shard: connection
                    for shard, connection in self._own_connections().items()
                    if not connection.invalidated
                    and in_transaction(driver_of(connection))
                }
                broadcast(connections, dict.fromkeys(connections, "ROLLBACK"))
        finally:
            self._give_up_lost()
            super().close(invalidate)


class SnapshotSession(ShardedSession):
    """A ShardedSession that reads one moment of all shards; see `Cluster.snapshot`."""

    def export(self) -> dict[str, str]:
        """Return by shard the id of this snapshot, for others to read the same.

        ``pg_dump --snapshot=…`` takes it, and ``SET TRANSACTION SNAPSHOT '…'`` in a
        REPEATABLE READ transaction. They must begin while this session is open.
        """
        self._autobegin_t()
        connections = self._connections_in_use()
        found = {}
        asked = ask_all(connections, dict.fromkeys(connections, _EXPORT))
        for shard, answer in asked.items():
            if isinstance(answer, Exception):
                raise answer
            found[shard] = str(answer[0][0])
        return found

    # -- beginning and end -----------------------------------------------------------

    def _open(self, *, timeout: float, strict: bool) -> None:
        """Open the snapshot on every shard; for `Snapshot`."""
        until = time.monotonic() + timeout
        topology = self._topology()
        snapshots = self._cluster._transactions.snapshots
        if self._unseen:
            for shard in topology.shards:
                self._unseen.wait(shard, self._engines, self._cluster)
        while True:
            connections: dict[str, Connection] = {}
            try:
                for shard in topology.shards:
                    connections[shard] = self._connected(shard)
                snapshots.open(
                    topology,
                    connections,
                    self._holder,
                    until=until,
                    strict=strict,
                )
            except BaseException as error:
                lost = _give_back(connections)
                # One that lay in the pool may have been closed by its server long ago.
                if (
                    lost
                    and isinstance(error, SnapshotUnavailable)
                    and time.monotonic() < until
                ):
                    continue
                raise
            break
        begun = SnapshotTransaction(self, SessionTransactionOrigin.AUTOBEGIN)
        begun.adopt(connections)

    def _holder(self, shard: str) -> Connection:
        """Open a second connection, to hold a gate with; a sync one out of no pool."""
        if self._is_async:
            return self._engines.connect(shard)
        return self._cluster._shards.connect_in_background(shard)

    def _connected(self, shard: str) -> Connection:
        bind = self._engines.of(shard)
        if isinstance(bind, Connection):
            raise ConfigurationError(
                f"shard {shard} was given as a Connection, in a transaction that has no"
                " snapshot of its own. Give an Engine or a URL."
            )
        try:
            connection = bind.connect()
        except (sa_exc.OperationalError, sa_exc.TimeoutError) as error:
            raise SnapshotUnavailable(
                f"shard {shard} cannot be reached, and a snapshot is of all shards:"
                f" {getattr(error, 'orig', error)}"
            ) from error
        options = getattr(self, "execution_options", None)
        if options:
            connection = connection.execution_options(**options)
        connection.begin()
        return connection

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is None:
            raise SnapshotOver(
                "this snapshot is over: its session was committed, rolled back or"
                " closed. Open another with cluster.snapshot()."
            )
        return super()._autobegin_t(begin)

    # -- no writes ---------------------------------------------------------------------

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        changed = [*self.new, *self.deleted]
        changed += [o for o in self.dirty if self.is_modified(o)]
        if changed:
            _refuse(f"{type(changed[0]).__name__} is new, deleted or changed")
        super()._flush(objects)

    def _bulk_save_mappings(self, mapper: Any, mappings: Any, **how: Any) -> None:
        _refuse("a bulk_* method writes")

    def _execute_internal(self, statement: Any, params: Any = None, **how: Any) -> Any:
        if getattr(statement, "is_dml", False):
            _refuse(f"{statement.__visit_name__.upper()} writes")
        return super()._execute_internal(statement, params, **how)

    def lock_row(self, entity: type[T], ident: Any, *, timeout: float = 10.0) -> T:
        """Raise SnapshotReadOnly: a lock is a write."""
        _refuse("lock_row() locks the row for a write")


def _refuse(what: str) -> NoReturn:
    raise SnapshotReadOnly(
        f"a snapshot is read-only, and {what}. Write in a session of"
        " cluster.sessionmaker()."
    )


def _give_back(connections: Mapping[str, Connection]) -> bool:
    """Close connections in any state; return whether one had been lost."""
    lost = False
    for connection in connections.values():
        if connection.invalidated or is_lost(driver_of(connection)):
            lost = True
            connection.invalidate()
        connection.close()
    return lost
