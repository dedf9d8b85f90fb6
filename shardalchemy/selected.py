"""INSERT … SELECT: rows that are read from some shards and written to others.

Where each row's key is the key of a row that it is read from, it stays on its shard,
and every shard runs the statement for itself. Otherwise the SELECT is run first, as
the session runs any, and its rows are inserted as rows of values.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    JSON,
    Boolean,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Time,
    TypeDecorator,
    Uuid,
    cast,
    false,
    null,
)
from sqlalchemy import select as select_
from sqlalchemy.sql.selectable import FromClause, Select

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.ids import Locator
from shardalchemy.planner.names import named
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from sqlalchemy import Column, Table
    from sqlalchemy.types import TypeEngine

    from shardalchemy.session import ShardedSession

__all__ = ["inserts_elsewhere", "selected_rows", "stays_on_its_shard"]

# Types whose values come back as they were stored when they are sent again.
_FAITHFUL = (
    Boolean,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    JSON,
    LargeBinary,
    Numeric,
    String,
    Time,
    Uuid,
)


class SelectedRows(NamedTuple):
    """An INSERT and its rows; one of no rows selects none itself."""

    statement: Any
    params: list[dict[str, Any]] | None


def inserts_elsewhere(statement: Any) -> bool:
    """Return whether an INSERT … SELECT has to do with any table not at home.

    Raises UnsupportedQueryError for one that locks the rows it reads.
    """
    if statement.select is None:
        return False
    found = named(statement)
    if not found.kinds - {Kind.HOME}:
        return False
    found.check_nested_writes()
    if getattr(statement.select, "_for_update_arg", None) is not None:
        raise UnsupportedQueryError(
            f"INSERT INTO {found.target(statement)} from a SELECT … FOR UPDATE is not"
            " supported over several shards. Read and lock the rows first, and insert"
            " them as rows."
        )
    # At home there is a copy of every reference table.
    target = placement_of(found.target(statement))
    return target.kind is not Kind.HOME or Kind.SHARDED in found.kinds


def stays_on_its_shard(session: ShardedSession, statement: Any) -> bool:
    """Return whether every shard can insert what it reads itself."""
    table: Table = named(statement).target(statement)
    placement = placement_of(table)
    select = statement.select
    if placement.kind is not Kind.SHARDED or not isinstance(select, Select):
        return False
    assert placement.column is not None
    assert placement.pin is not None
    columns = dict(zip(statement._select_names, select.selected_columns, strict=False))
    column = columns.get(placement.column.key)
    generated = {
        c.key
        for c in table.c
        if c is table.autoincrement_column
        or isinstance(c.info.get("shardalchemy"), Locator)
        or (c.default is not None and c.default.is_callable)
    }
    if column is None or generated - columns.keys():
        return False
    if not _stored_alike(placement.column.type, column.type):
        return False
    return session._cluster._analyser.stays(select, column, placement.pin)


def _stored_alike(one: TypeEngine[Any], other: TypeEngine[Any]) -> bool:
    if isinstance(one, TypeDecorator) or isinstance(other, TypeDecorator):
        return type(one) is type(other)
    return True


def selected_rows(session: ShardedSession, statement: Any, params: Any) -> SelectedRows:
    """Run the SELECT of an INSERT; return the INSERT of its rows.

    Raises UnsupportedQueryError for more rows than the cluster's ``gather_max_rows``,
    and for values that would not come out as they are stored.
    """
    table: Table = named(statement).target(statement)
    names = list(statement._select_names)
    if isinstance(params, list | tuple) and params:
        raise UnsupportedQueryError(
            f"INSERT INTO {table} from a SELECT with several parameter sets is not"
            " supported over several shards. Execute it for each set."
        )
    _check_defaults(statement, table, names)
    select = statement.select
    if isinstance(select, Select) and any(
        isinstance(column, FromClause) for column in select._raw_columns
    ):
        # Its columns, and not the objects that the session would make of them.
        select = select.with_only_columns(
            *select.selected_columns, maintain_column_froms=True
        )
    columns = [table.c[name] for name in names]
    for column, selected in zip(columns, select.selected_columns, strict=True):
        _check_faithful(column, selected.type)
    limit = session._cluster.gather_max_rows
    found = session.execute(select, params)
    rows = list(islice(found, limit + 1))
    found.close()
    if len(rows) > limit:
        raise UnsupportedQueryError(
            f"INSERT INTO {table} from a SELECT of more than {limit} rows, which are"
            " not on the shards they go to. Insert them in parts."
        )
    json = [n for n, c in enumerate(columns) if isinstance(c.type, JSON)]
    if any(row[n] is None for row in rows for n in json):
        raise UnsupportedQueryError(
            f"INSERT INTO {table} from a SELECT that has a NULL for a JSON column: it"
            " may be JSON's null as well. Insert the rows one kind at a time."
        )
    changed = statement._generate()
    if not rows:
        nothing = select_(*(cast(null(), c.type) for c in columns)).where(false())
        changed.select = nothing
        changed.include_insert_from_select_defaults = False
        return SelectedRows(changed, None)
    changed.select = changed._select_names = None
    changed = changed.execution_options(preserve_rowcount=True)
    if "compile_state_plugin" in changed._propagate_attrs:
        # The ORM would take many rows for another kind of INSERT, by attribute names.
        changed = changed.execution_options(dml_strategy="orm")
    return SelectedRows(changed, [dict(zip(names, row, strict=True)) for row in rows])


def _check_defaults(statement: Any, table: Table, names: list[str]) -> None:
    if statement.include_insert_from_select_defaults:
        return
    for column in table.c:
        if column.default is not None and column.key not in names:
            raise UnsupportedQueryError(
                f"INSERT INTO {table} from a SELECT with include_defaults=False leaves"
                f" out {column.name}, which has a default. Select a value for it."
            )


def _check_faithful(column: Column[Any], selected: TypeEngine[Any]) -> None:
    """Refuse a column whose values are not what PostgreSQL would carry over."""
    type_ = column.type
    decorated = isinstance(type_, TypeDecorator) or isinstance(selected, TypeDecorator)
    if decorated:
        if type(type_) is type(selected):
            return
    elif (
        isinstance(type_, _FAITHFUL)
        and not isinstance(type_, Interval)
        and _affinity(type_) is _affinity(selected)
        and (getattr(selected, "asdecimal", True) or isinstance(selected, Float))
        and getattr(selected, "timezone", None) == getattr(type_, "timezone", None)
    ):
        return
    raise UnsupportedQueryError(
        f"INSERT INTO {column.table} from a SELECT of {selected!r} for {column.name},"
        f" which is {type_!r}: the value would be converted on its way through Python."
        " Cast the selected column to the type, or read the rows and insert them."
    )


def _affinity(type_: TypeEngine[Any]) -> Any:
    affinity = type_._type_affinity
    return Numeric if affinity is Integer else affinity
