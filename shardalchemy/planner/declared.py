"""The declared tables, by the names that plain SQL calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import MetaData, Table

    from shardalchemy.schema import Placement

__all__ = ["Declared", "elsewhere"]

_SYSTEM = frozenset({"pg_catalog", "information_schema"})


def elsewhere(what: str) -> UnsupportedQueryError:
    """Return the error for plain SQL that cannot be placed, with the ways out."""
    return UnsupportedQueryError(
        f"textual SQL {what} Write it as a select(), insert(), update() or delete(),"
        " or say where it runs: execution_options(shard_key=…) or"
        " execution_options(shard='…')."
    )


class Declared:
    """The MetaData whose tables are declared in this process."""

    def __init__(self) -> None:
        self._known: dict[MetaData, None] = {}

    def see(self, tables: Iterable[Table]) -> bool:
        """Remember all tables beside *tables*; return whether any was new."""
        seen = {table.metadata: None for table in tables}
        if self._known.keys() >= seen.keys():
            return False
        self._known = {**self._known, **seen}
        return True

    def find(
        self, schema: str | None, name: str, guarded: frozenset[str]
    ) -> Placement | None:
        """Return where the table that SQL calls *name* lives, or None at home.

        *guarded* are the ``schema.name`` that the servers do not hold at home alone.
        Raises UnsupportedQueryError where that is not certain.
        """
        schemas = {
            one.partition(".")[0] for one in guarded if one.partition(".")[2] == name
        }
        if not schemas or schema in _SYSTEM:
            return None
        every = [
            placement_of(table)
            for metadata in self._known
            for table in list(metadata.tables.values())
            if table.name == name
        ]
        every = [p for p in every if p.kind is not Kind.HOME]
        # The search path finds a table without a schema, in SQL as under the ORM.
        unqualified = [p for p in every if p.table.schema is None]
        placements = [p for p in every if p.table.schema == schema]
        shown = f"{schema}.{name}" if schema else name
        if schema is None and every and not unqualified:
            raise elsewhere(f"names {name} without its schema.")
        if schema is not None and not placements:
            if schema in schemas:
                placements = unqualified
            elif not unqualified:
                return None
        if not placements:
            raise elsewhere(
                f"names {shown}, of which rows are on several shards, and this process"
                " has seen no declaration of it (cluster.create_all(metadata), or a"
                " statement with a model of that MetaData, shows it one), or it is a"
                " view."
            )
        first = placements[0]
        if any(_facts(p) != _facts(first) for p in placements[1:]):
            raise elsewhere(f"names {shown}, which is declared in two ways.")
        return first


def _facts(placement: Placement) -> object:
    columns = placement.table.c
    return (
        placement.kind,
        placement.column_name,
        {
            columns[k].name: (p, type(columns[k].type))
            for k, p in placement.pins.items()
        },
    )
