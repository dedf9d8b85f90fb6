"""The connections of one flush: for each row, the one of the shard where it lives.

A `RowConnections` is the session's ``connection_callable`` for the length of a flush.
SQLAlchemy calls it with every object that it is about to write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect

from shardalchemy.engine.replicated import ReplicatedConnection
from shardalchemy.moves import MovingConnection
from shardalchemy.routing import home_first
from shardalchemy.rows import row_placement
from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from shardalchemy.session import ShardedSession

__all__ = ["RowConnections", "order_new_by_shard"]


class RowConnections:
    """Finds the connection on which a flush of *session* writes a row."""

    def __init__(self, session: ShardedSession) -> None:
        self._session = session
        self._by_shard: dict[str, Any] = {}
        self._copies: ReplicatedConnection | None = None

    def __call__(
        self,
        mapper: Mapper[Any] | None = None,
        instance: object | None = None,
        **_: Any,
    ) -> Any:
        """Return the connection for *instance*'s row."""
        session = self._session
        state: Any = inspect(instance)
        rows = row_placement(state.manager.mapper)
        if rows.kind is Kind.SHARDED:
            if state.key is None:
                return self.for_slot(rows.new_slot(state, session._next_value))
            here = self.for_slot(rows.stored_slot(state))
            if not state.committed_state:
                return here
            slot = rows.slot_after(state)
            there = self.for_slot(slot)
            return here if there is here else MovingConnection(here, there, slot)
        if rows.kind is Kind.HOME:
            return session._connection_for_bind(session.get_bind(mapper))
        return self.for_copies()

    def for_slot(self, slot: int) -> Any:
        """Return the connection for rows of *slot*."""
        session = self._session
        shard = session._topology().owners[slot]
        connection = self._by_shard.get(shard)
        if connection is None:
            session._written_shards.add(shard)
            connection = session._connection_for_bind(session._engines.of(shard))
            self._by_shard[shard] = connection
        return connection

    def for_copies(self) -> ReplicatedConnection:
        """Return what stands for a connection to all copies of reference tables."""
        if self._copies is None:
            session = self._session
            topology = session._topology()
            session._written_shards.update(topology.shards)
            home, *others = (
                (name, session._connection_for_bind(session._engines.of(name)))
                for name in home_first(topology)
            )
            self._copies = ReplicatedConnection(home[1], dict(others))
        return self._copies


def order_new_by_shard(session: ShardedSession) -> None:
    """Let new rows of one shard follow each other: one INSERT takes a whole run.

    SQLAlchemy inserts in the order of ``insert_order``; nothing else reads it.
    """
    owners = None
    ranked = []
    for state in session._new:
        rows = row_placement(state.manager.mapper)
        slot = rows.peeked_slot(state) if rows.kind is Kind.SHARDED else None
        if slot is not None and owners is None:
            owners = session._topology().owners
        shard = "" if slot is None or owners is None else owners[slot]
        ranked.append((shard, state.insert_order or 0, state))
    if owners is None:
        return
    places = sorted(order for _, order, _ in ranked)
    ranked.sort(key=lambda item: item[:2])
    for place, (_, _, state) in zip(places, ranked, strict=True):
        state.insert_order = place
