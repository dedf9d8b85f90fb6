"""The legacy ``bulk_*`` methods, which write rows of one class past the unit of work.

SQLAlchemy sends all rows of a call over one connection. So a call is made for each
shard, with its rows; for a reference table one is made on what stands for all copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect

from shardalchemy.flush import RowConnections
from shardalchemy.rows import row_placement
from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardalchemy.rows import RowPlacement
    from shardalchemy.session import ShardedSession

__all__ = ["save_in_bulk"]


def save_in_bulk(
    session: ShardedSession,
    save: Callable[..., Any],
    mapper: Any,
    mappings: Any,
    how: Mapping[str, Any],
) -> None:
    """Call *save*, SQLAlchemy's own method, for the rows of each shard.

    Raises ShardKeyError for a row without a usable shard key, before any is written.
    """
    inspected = inspect(mapper, raiseerr=False)
    rows = None if inspected is None else row_placement(inspected.mapper)
    if rows is None or rows.kind is Kind.HOME:
        save(mapper, mappings, **how)
        return
    if rows.kind is Kind.REFERENCE:
        session._copies = RowConnections(session).for_copies()
        try:
            save(mapper, mappings, **how)
        finally:
            session._copies = None
        return
    owners = session._topology().owners
    by_shard: dict[str, list[Any]] = {}
    for item in mappings:
        slot, row = _slot(session, rows, item, how)
        by_shard.setdefault(owners[slot], []).append(row)
    before = session._routed
    try:
        for shard in sorted(by_shard):
            session._routed = shard
            session._written_shards.add(shard)
            save(mapper, by_shard[shard], **how)
    finally:
        session._routed = before


def _slot(
    session: ShardedSession, rows: RowPlacement, item: Any, how: Mapping[str, Any]
) -> tuple[int, Any]:
    """Return the slot of a row, and the row with what it lacked."""
    if how["isstates"]:
        if how["isupdate"]:
            return rows.kept_slot(item), item
        return rows.new_slot(item, session._next_value), item
    if how["isupdate"]:
        # SQLAlchemy says what is wrong with a row that has no primary key.
        return rows.slot_of_mapping(item) or 0, item
    # With return_defaults the caller looks for generated values in its own rows.
    row = item if how["return_defaults"] else dict(item)
    return rows.completed_slot(row, session._next_value), row
