"""A connection that writes reference tables on every shard alike.

The unit of work is given one of these for a reference table's rows. A statement runs
on the home shard first, which also makes writers of one row wait for each other there.
What defaults and functions came to on the home shard is read back and written to the
others as plain values, so that ``now()`` or a sequence is evaluated once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Insert, Update, bindparam, insert, select, tuple_, update

from shardalchemy.engine.fanout import fanout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Table

__all__ = ["ReplicatedConnection"]


class ReplicatedConnection:
    """Stands where a ``Connection`` is expected; all but writes go to *home*."""

    def __init__(self, home: Connection, others: Mapping[str, Connection]) -> None:
        self._home = home
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._home, name)

    def execute(
        self, statement: Any, parameters: Any = None, *, execution_options: Any = None
    ) -> CursorResult[Any]:
        """Execute *statement* on every shard; return the home shard's result."""
        options = execution_options or {}
        result = self._home.execute(statement, parameters, execution_options=options)
        if isinstance(statement, Insert):
            self._insert_elsewhere(statement.table, result)
        elif isinstance(statement, Update):
            self._update_elsewhere(statement.table, parameters)
        elif isinstance(statement, Delete):
            fanout(
                lambda _, connection: connection.execute(statement, parameters),
                self._others,
            )
        return result

    def _insert_elsewhere(self, table: Any, result: CursorResult[Any]) -> None:
        context: Any = result.context
        keys = [column.key for column in table.primary_key]
        identities = [
            tuple(p.get(k) for k in keys) for p in context.compiled_parameters
        ]
        if any(None in identity for identity in identities):
            generated: Any = result.inserted_primary_key_rows
            identities = [tuple(row) for row in generated]
        rows = self._rows(table, identities)
        fanout(
            lambda _, connection: connection.execute(insert(table), rows), self._others
        )

    def _update_elsewhere(self, table: Any, parameters: Any) -> None:
        """Bring rows that the unit of work has updated by primary key to the others."""
        sets = parameters if isinstance(parameters, list) else [parameters]
        key = list(table.primary_key)
        before = [tuple(p[c._label] for c in key) for p in sets]
        after = [
            tuple(p.get(c.key, old) for c, old in zip(key, identity, strict=True))
            for p, identity in zip(sets, before, strict=True)
        ]
        stored = {
            tuple(row[c.key] for c in key): row for row in self._rows(table, after)
        }
        statement = (
            update(table)
            .where(*(c == bindparam(f"was_{c.key}") for c in key))
            .values({c.key: bindparam(f"is_{c.key}") for c in _written(table)})
        )
        rows = [
            {f"was_{c.key}": value for c, value in zip(key, identity, strict=True)}
            | {f"is_{name}": value for name, value in stored[now].items()}
            for identity, now in zip(before, after, strict=True)
            if now in stored
        ]
        if rows:
            fanout(
                lambda _, connection: connection.execute(statement, rows), self._others
            )

    def _rows(self, table: Table, identities: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the home shard's rows with these primary keys, by column keys."""
        columns = _written(table)
        found = self._home.execute(
            select(*columns).where(tuple_(*table.primary_key).in_(identities))
        )
        names = [column.key for column in columns]
        return [dict(zip(names, row, strict=True)) for row in found]


def _written(table: Table) -> list[Any]:
    return [column for column in table.c if column.computed is None]
