"""Rows whose shard key changes in a flush: they move to the shard of the new key.

The unit of work sends an UPDATE that changes a primary key. A `MovingConnection`
stands where it expects a connection: it takes the row, as the server holds it, from the
shard where it is to the one where it is to be, with the new key, and lets the UPDATE
do the rest there. Rows that refer to it ``ON UPDATE CASCADE`` go with it, as they would
follow on one server.

What would not come out as on one server is refused, and the flush rolled back: rows
that refer to it otherwise, rows with a locator, triggers, tables whose columns differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Table, Update, bindparam, text

from shardalchemy.errors import ShardKeyError
from shardalchemy.schema import placement_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Column, Connection

__all__ = ["MovingConnection"]

# Columns as the server has them: an application may not declare all.
_COLUMNS = text(
    """
    SELECT attname, format_type(atttypid, atttypmod), attgenerated <> ''
    FROM pg_attribute
    WHERE attrelid = CAST(:table AS regclass) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
    """
)
_TRIGGERS = text(
    """
    SELECT tgname FROM pg_trigger
    WHERE tgrelid = CAST(:table AS regclass) AND NOT tgisinternal AND tgenabled <> 'D'
    UNION ALL
    SELECT rulename FROM pg_rewrite WHERE ev_class = CAST(:table AS regclass)
    """
)
_REFERENCES = text(
    """
    SELECT c.conname, n.nspname, t.relname, c.confupdtype = 'c',
           ARRAY(SELECT a.attname::text
                 FROM unnest(c.conkey) WITH ORDINALITY AS k(num, ord)
                 JOIN pg_attribute AS a ON a.attrelid = c.conrelid AND a.attnum = k.num
                 ORDER BY k.ord),
           ARRAY(SELECT a.attname::text
                 FROM unnest(c.confkey) WITH ORDINALITY AS k(num, ord)
                 JOIN pg_attribute AS a ON a.attrelid = c.confrelid AND a.attnum = k.num
                 ORDER BY k.ord)
    FROM pg_constraint AS c
    JOIN pg_class AS t ON t.oid = c.conrelid
    JOIN pg_namespace AS n ON n.oid = t.relnamespace
    WHERE c.confrelid = CAST(:table AS regclass) AND c.contype = 'f'
      AND c.conparentid = 0
    ORDER BY c.conname
    """
)


@dataclass(frozen=True, slots=True)
class _Reference:
    """A foreign key to a table: which of its columns are which of the other's."""

    name: str
    schema: str
    table: str
    cascades: bool
    columns: tuple[str, ...]
    referred: tuple[str, ...]


class MovingConnection:
    """Stands where a flush expects the ``Connection`` of one row, which moves."""

    def __init__(self, old: Connection, new: Connection, slot: int) -> None:
        self._old = old
        self._new = new
        self._slot = slot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._new, name)

    def execute(self, statement: Any, parameters: Any = None, **options: Any) -> Any:
        """Move the row that an UPDATE names by its old key; run it on the new shard.

        A DELETE goes to the row where it is.
        """
        if isinstance(statement, Delete):
            return self._old.execute(statement, parameters, **options)
        if isinstance(statement, Update):
            sets = parameters if isinstance(parameters, list) else [parameters]
            sets = [self._moved(statement.table, values) for values in sets]
            parameters = sets if isinstance(parameters, list) else sets[0]
        return self._new.execute(statement, parameters, **options)

    def _moved(self, table: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """Move the row of one parameter set; return the set that finds it again."""
        key = list(table.primary_key)
        was = {c: values[c._label] for c in key}
        changes = {
            c: values[c.key]
            for c in table.c
            if c.key in values and (c.primary_key or c.key in placement_of(table).pins)
        }
        if any(c in changes and changes[c] != was[c] for c in key):
            _Move(self._old, self._new, self._slot).carry_out(table, was, changes)
        found = {c._label: values.get(c.key, old) for c, old in was.items()}
        return {**values, **found}


class _Move:
    """One row on its way, with those that follow it."""

    def __init__(self, old: Connection, new: Connection, slot: int) -> None:
        self._old = old
        self._new = new
        self._slot = slot
        self._preparer = old.dialect.identifier_preparer

    def carry_out(
        self,
        table: Table,
        was: Mapping[Column[Any], Any],
        changes: Mapping[Column[Any], Any],
    ) -> None:
        where = " AND ".join(
            f"t.{self._quoted(c.name)} = :was_{n}" for n, c in enumerate(was)
        )
        binds = [
            bindparam(f"was_{n}", value, type_=c.type)
            for n, (c, value) in enumerate(was.items())
        ]
        self._take(table, where, binds, changes, [])

    def _take(
        self,
        table: Table,
        where: str,
        binds: list[Any],
        changes: Mapping[Column[Any], Any],
        way: list[Table],
    ) -> None:
        """Move the rows of *table* that fulfil *where*, after what they refer to.

        *way* are the tables through which the move has come here.
        """
        name = self._preparer.format_table(table)
        lock = text(f"SELECT CAST(t AS text) FROM {name} AS t WHERE {where} FOR UPDATE")
        rows = self._old.scalars(lock.bindparams(*binds)).all()
        if not rows:
            return
        if table in way:
            raise self._refused(table, "refers to itself in a circle")
        self._check(table, changes)
        columns = [
            self._quoted(column)
            for column, _, generated in self._columns(table)
            if not generated
        ]
        names = ", ".join(columns)
        record = ", ".join(f"r.{column}" for column in columns)
        pairs = ", ".join(
            f"CAST(:name_{n} AS text), :value_{n}" for n in range(len(changes))
        )
        put = text(
            f"INSERT INTO {name} ({names}) OVERRIDING SYSTEM VALUE SELECT {record}"
            f" FROM jsonb_populate_record(CAST(:row AS {name}),"
            f" jsonb_build_object({pairs})) AS r"
        ).bindparams(
            *(
                bindparam(f"value_{n}", value, type_=c.type)
                for n, (c, value) in enumerate(changes.items())
            )
        )
        named = {f"name_{n}": c.name for n, c in enumerate(changes)}
        self._new.execute(put, [{"row": row, **named} for row in rows])
        for reference in self._references(table):
            self._follow(table, name, where, binds, changes, reference, [*way, table])
        self._old.execute(
            text(f"DELETE FROM {name} AS t WHERE {where}").bindparams(*binds)
        )

    def _follow(
        self,
        table: Table,
        name: str,
        where: str,
        binds: list[Any],
        changes: Mapping[Column[Any], Any],
        reference: _Reference,
        way: list[Table],
    ) -> None:
        """Move the rows that refer to those being moved."""
        by_name = {c.name: value for c, value in changes.items()}
        affected = [r for r in reference.referred if r in by_name]
        columns = ", ".join(map(self._quoted, reference.columns))
        referred = ", ".join(f"t.{self._quoted(r)}" for r in reference.referred)
        theirs = f"({columns}) IN (SELECT {referred} FROM {name} AS t WHERE {where})"
        child = self._known(table, reference)
        child_name = (
            f"{self._quoted(reference.schema)}.{self._quoted(reference.table)}"
            if child is None
            else self._preparer.format_table(child)
        )
        any_of_them = text(f"SELECT 1 FROM {child_name} WHERE {theirs} LIMIT 1")
        if self._old.scalar(any_of_them.bindparams(*binds)) is None:
            return
        if child is None:
            raise self._refused(
                table, f"is referred to by {child_name}, which is not declared"
            )
        if not reference.cascades or not affected:
            raise self._refused(
                table,
                f"is referred to by rows of {child} ({reference.name}), which do not"
                " follow it (ON UPDATE CASCADE)",
            )
        following = {
            child_column: by_name[referred]
            for child_column in child.c
            for name_, referred in zip(
                reference.columns, reference.referred, strict=True
            )
            if child_column.name == name_ and referred in by_name
        }
        self._take(child, theirs, binds, following, way)

    def _check(self, table: Table, changes: Mapping[Column[Any], Any]) -> None:
        for key, pin in placement_of(table).pins.items():
            column = table.c[key]
            if column not in changes:
                raise self._refused(
                    table, f"has {column.name}, which names the slot of the old key"
                )
            if changes[column] is not None and pin.slot(changes[column]) != self._slot:
                raise self._refused(table, f"has another shard's key in {column.name}")
        name = {"table": self._preparer.format_table(table)}
        triggers = self._old.scalars(_TRIGGERS, name).all()
        if triggers:
            raise self._refused(table, f"has the trigger {triggers[0]}")
        if self._columns(table) != [
            tuple(r) for r in self._new.execute(_COLUMNS, name)
        ]:
            raise self._refused(table, "has other columns on the other shard")

    def _columns(self, table: Table) -> list[Any]:
        return _columns(self._old, {"table": self._preparer.format_table(table)})

    def _references(self, table: Table) -> list[_Reference]:
        """Return the foreign keys to *table*; those of tables that others refer to
        come first.
        """
        name = {"table": self._preparer.format_table(table)}
        found = [
            _Reference(r[0], r[1], r[2], r[3], tuple(r[4]), tuple(r[5]))
            for r in self._old.execute(_REFERENCES, name)
        ]

        def depth(reference: _Reference) -> int:
            known = self._known(table, reference)
            return 0 if known is None else len(_referred_to(known, set()))

        return sorted(found, key=depth)

    def _known(self, table: Table, reference: _Reference) -> Table | None:
        """Return the declared table that a foreign key belongs to."""
        for candidate in table.metadata.tables.values():
            schema = candidate.schema or self._old.dialect.default_schema_name
            if (schema, candidate.name) == (reference.schema, reference.table):
                return candidate
        return None

    def _quoted(self, name: str) -> str:
        return self._preparer.quote(name)

    def _refused(self, table: Table, why: str) -> ShardKeyError:
        return ShardKeyError(
            f"a row of {table} would move to another shard with its new shard key, but"
            f" {table} {why}. Delete the object and add a new one with that key, and"
            " likewise what belongs to it."
        )


def _columns(connection: Connection, name: Mapping[str, str]) -> list[Any]:
    return [tuple(row) for row in connection.execute(_COLUMNS, name)]


def _referred_to(table: Table, seen: set[Table]) -> set[Table]:
    """Return all tables that *table* refers to, and those refer to."""
    for constraint in table.foreign_key_constraints:
        if constraint.referred_table not in seen:
            seen.add(constraint.referred_table)
            _referred_to(constraint.referred_table, seen)
    return seen
