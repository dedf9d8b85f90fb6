"""The CHECK constraints that keep each row where the topology says.

``shardalchemy_owner`` compares the hash of a row's shard key with what this shard
owns, so a row that a stale process, or a person with psql, sends to the wrong shard is
refused instead of lost. Each column that pins a row without being its key, a locator,
is held to the key's slot by a CHECK that no topology changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql
from sqlalchemy import text

from shardalchemy.errors import DeclarationError
from shardalchemy.ring import multirange
from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection, Table

    from shardalchemy.catalog.topology import Topology
    from shardalchemy.schema import Placement

__all__ = ["OWNER", "guarded_names", "write_ownership", "write_placement"]

OWNER = "shardalchemy_owner"
_LOCATOR = "shardalchemy_locator_"

_CONSTRAINTS = text(
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE conrelid = CAST(:table AS regclass) AND contype = 'c'"
)
_DETERMINISTIC = text(
    """
    SELECT coalesce(c.collisdeterministic, true)
    FROM pg_attribute AS a LEFT JOIN pg_collation AS c ON c.oid = a.attcollation
    WHERE a.attrelid = CAST(:table AS regclass) AND a.attname = :column
    """
)
_PLACED = text(
    "INSERT INTO shardalchemy.placement (table_schema, table_name, kind)"
    " VALUES (coalesce(:schema, current_schema()), :name, :kind)"
    " ON CONFLICT (table_schema, table_name) DO UPDATE SET kind = excluded.kind"
)
# The tables, and the views that read them, directly or through other views.
_GUARDED = text(
    """
    WITH RECURSIVE guarded AS (
        SELECT c.oid, n.nspname, c.relname
        FROM shardalchemy.placement AS p
        JOIN pg_namespace AS n ON n.nspname = p.table_schema
        JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.table_name
        UNION
        SELECT v.oid, n.nspname, v.relname
        FROM guarded AS g
        JOIN pg_depend AS d ON d.refclassid = 'pg_class'::regclass
            AND d.refobjid = g.oid AND d.classid = 'pg_rewrite'::regclass
        JOIN pg_rewrite AS r ON r.oid = d.objid
        JOIN pg_class AS v ON v.oid = r.ev_class AND v.oid <> g.oid
        JOIN pg_namespace AS n ON n.oid = v.relnamespace
    )
    SELECT nspname || '.' || relname FROM guarded
    """
)
_ADD = sql.SQL("ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition})")
_REPLACE = sql.SQL(
    "ALTER TABLE {table} DROP CONSTRAINT {name},"
    " ADD CONSTRAINT {name} CHECK ({condition})"
)


def _qualified(table: Table) -> sql.Identifier:
    return sql.Identifier(*filter(None, (table.schema, table.name)))


def _of_column(template: str, column: Column[object]) -> sql.Composed:
    return sql.SQL(template).format(sql.Identifier(column.name))


def write_ownership(
    connection: Connection, placement: Placement, topology: Topology, shard: str
) -> None:
    """Give a sharded table on *shard* the checks of *topology*; change nothing else.

    Raises DeclarationError where the key's collation is nondeterministic.
    """
    if placement.kind is not Kind.SHARDED:
        return
    assert placement.column is not None
    assert placement.pin is not None
    table = _qualified(placement.table)
    name = {"table": table.as_string()}
    if not connection.scalar(_DETERMINISTIC, {**name, "column": placement.column.name}):
        raise DeclarationError(
            f"{placement.table}.{placement.column.name} is the shard key and has a"
            " nondeterministic collation: texts that are equal there hash unlike."
            " Declare the column with a deterministic collation."
        )
    present = {row.conname: row[1] for row in connection.execute(_CONSTRAINTS, name)}
    arcs = multirange(topology.owners, shard)
    owned = sql.SQL("{}::int8multirange OPERATOR(pg_catalog.@>) {}").format(
        sql.Literal(arcs), _of_column(placement.pin.hash_sql, placement.column)
    )
    statements = []
    if OWNER not in present:
        statements.append((_ADD, OWNER, owned))
    elif f"'{arcs}'" not in present[OWNER]:
        statements.append((_REPLACE, OWNER, owned))
    key_slot = _of_column(placement.pin.slot_sql, placement.column)
    for key, pin in placement.pins.items():
        column = placement.table.c[key]
        constraint = (_LOCATOR + column.name)[:63]
        if column is not placement.column and constraint not in present:
            same = sql.SQL("{} = {}").format(_of_column(pin.slot_sql, column), key_slot)
            statements.append((_ADD, constraint, same))
    for template, constraint, condition in statements:
        statement = template.format(
            table=table, name=sql.Identifier(constraint), condition=condition
        )
        # The driver reads a lone % as a placeholder.
        connection.exec_driver_sql(statement.as_string().replace("%", "%%"))


def write_placement(connection: Connection, placement: Placement) -> None:
    """Record that a table is sharded, or a copy; home tables are not recorded."""
    if placement.kind is not Kind.HOME:
        parameters = {
            "schema": placement.table.schema,
            "name": placement.table.name,
            "kind": placement.kind.value,
        }
        connection.execute(_PLACED, parameters)


def guarded_names(connection: Connection) -> frozenset[str]:
    """Return the ``schema.name`` of sharded and reference tables, and of their views.

    What reads them on one shard alone may read a part.
    """
    return frozenset(connection.scalars(_GUARDED))
