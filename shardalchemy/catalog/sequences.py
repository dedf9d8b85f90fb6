"""Integers for autoincrementing columns of sharded tables, unique in the cluster.

A row's shard key must be known before its shard is, so it cannot come from the shard's
own sequence; and ids that each shard counts for itself would collide when rows move.
So the home shard's sequence counts for all, a block at a time. As with PostgreSQL's
``CACHE``, what a process does not use of its block is a gap.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection, Engine

__all__ = ["Sequences"]

_NEXT = text(
    "SELECT nextval(pg_get_serial_sequence(:table, :column))"
    " FROM generate_series(1, :size)"
)


class Sequences:
    """The blocks of one process; safe for threads and for tasks of an event loop."""

    def __init__(self, block: int = 50) -> None:
        self._block = block
        self._values: defaultdict[Column[int], deque[int]] = defaultdict(deque)

    def next(self, column: Column[int], home: Engine | Connection) -> int:
        """Return the next value of *column*; ask *home* when the block is used up."""
        values = self._values[column]
        while True:
            try:
                return values.popleft()
            except IndexError:
                # No lock is held while the server is asked: two callers at once get a
                # block each.
                values.extend(self._fetch(column, home))

    def _fetch(self, column: Column[int], home: Engine | Connection) -> list[int]:
        preparer = home.dialect.identifier_preparer
        parameters = {
            "table": preparer.format_table(column.table),
            "column": column.name,
            "size": self._block,
        }
        with home.engine.connect() as connection:
            return list(connection.scalars(_NEXT, parameters))
