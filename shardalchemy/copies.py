"""A write to a reference table, made ready to come out alike on every copy.

Defaults and functions that each copy would evaluate for itself are evaluated here, by
the Python side or by the home shard, once for each row; the statement is then sent to
all with the values.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ColumnElement,
    Computed,
    DefaultClause,
    Identity,
    Insert,
    Sequence,
    TextClause,
    Update,
    func,
    literal_column,
    select,
)

from shardalchemy.errors import ShardKeyError, UnsupportedQueryError
from shardalchemy.inserts import row_names, with_added
from shardalchemy.moment import with_one_moment
from shardalchemy.planner.names import named
from shardalchemy.planner.written import unlike_copies, volatile_functions
from shardalchemy.rows import generated_default

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Column, Connection, Table

    from shardalchemy.planner import Analysis
    from shardalchemy.session import ShardedSession

__all__ = ["alike_on_copies"]

_CONSTANT = re.compile(
    r"\s*('[^']*'(::[\w ]+)?|[-+]?[\d.]+|true|false|null)\s*", re.IGNORECASE
)


def alike_on_copies(
    session: ShardedSession,
    statement: Any,
    analysis: Analysis,
    params: Any,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Return the statement and parameters with which every copy becomes the same.

    Raises UnsupportedQueryError for a value that only its own copy could tell.
    """
    table = analysis.table
    assert table is not None
    many = isinstance(params, list | tuple) and bool(params)
    rows = len(params) if many else len(_value_rows(statement)) or 1

    def home() -> Connection:
        return session._connection_for_bind(
            session._engines.of(session._topology().home)
        )

    if isinstance(statement, Insert):
        if many and volatile_functions(named(statement).parts):
            raise UnsupportedQueryError(
                f"INSERT of many rows into the reference table {table} with a function"
                " that is evaluated for each of them would give each copy other"
                " values. Give the values in the rows."
            )
        added = _generated(session, statement, table, params, options, rows, home)
        statement, params = with_added(statement, params, options, added)
    elif isinstance(statement, Update):
        added = _onupdates(statement, table, params, rows)
        statement, params = with_added(statement, params, options, added)
    volatile = isinstance(statement, Insert) and not many
    return with_one_moment(statement, home, volatile=volatile), params


def _value_rows(statement: Any) -> list[Any]:
    return [row for group in statement._multi_values for row in group]


def _supplied(
    statement: Any, table: Table, params: Any, options: Mapping[str, Any]
) -> set[str]:
    """Return the keys of the columns to which the statement gives a value itself."""
    given = {getattr(c, "key", c) for c in statement._values or ()}
    ordered = getattr(statement, "_ordered_values", None) or ()
    given |= {getattr(c, "key", c) for c, _ in ordered}
    for row in _value_rows(statement):
        given |= {getattr(c, "key", c) for c in row}
    sets = params if isinstance(params, list | tuple) else [params or {}]
    name_of = row_names(statement, params, options)
    for column in table.c:
        name = column.key if name_of is str else name_of(column)
        if sets and all(name in row for row in sets):
            given.add(column.key)
    return given


def _generated(
    session: ShardedSession,
    statement: Any,
    table: Table,
    params: Any,
    options: Mapping[str, Any],
    rows: int,
    home: Any,
) -> dict[Column[Any], list[Any]]:
    """Return the values of columns that an INSERT leaves to their defaults, by row."""
    supplied = _supplied(statement, table, params, options)
    values: dict[Column[Any], list[Any]] = {}
    selected: dict[Column[Any], Any] = {}
    for column in table.c:
        if column.key in supplied:
            continue
        expression = _home_expression(column)
        if expression is not None:
            selected[column] = expression
        elif column.default is not None:
            if column.default.is_callable:
                values[column] = [_called(column) for _ in range(rows)]
        elif column is table.autoincrement_column:
            values[column] = [session._next_value(column) for _ in range(rows)]
    if selected:
        found = home().execute(
            select(*selected.values()).select_from(func.generate_series(1, rows))
        )
        values |= dict(zip(selected, map(list, zip(*found, strict=True)), strict=True))
    return values


def _called(column: Column[Any]) -> Any:
    try:
        return generated_default(column)
    except ShardKeyError as error:
        raise _by_itself(column, "default reads other values of the row") from error


def _by_itself(column: Column[Any], why: str) -> UnsupportedQueryError:
    return UnsupportedQueryError(
        f"INSERT into the reference table {column.table} without {column.name}, whose"
        f" {why}: each copy would be given a value of its own. Supply it, or add the"
        " objects through the session."
    )


def _home_expression(column: Column[Any]) -> ColumnElement[Any] | None:
    """Return what the home shard is to evaluate for a default, or None."""
    default: Any = column.default
    if isinstance(default, Sequence):
        return default.next_value()
    if default is not None and default.is_clause_element:
        found: ColumnElement[Any] = default.arg
        return found
    server: Any = column.server_default
    if default is not None or server is None or isinstance(server, Computed):
        return None
    if isinstance(server, Identity):
        if server.always:
            raise _by_itself(column, "identity is GENERATED ALWAYS")
        return None
    if not isinstance(server, DefaultClause):
        raise _by_itself(column, "value is made by the server")
    if isinstance(server.arg, str):
        return None
    if not isinstance(server.arg, TextClause):
        expression: Any = server.arg
        return expression  # type: ignore[no-any-return]
    if _CONSTANT.fullmatch(server.arg.text):
        return None
    return literal_column(server.arg.text, column.type)


def _onupdates(
    statement: Any, table: Table, params: Any, rows: int
) -> dict[Column[Any], list[Any]]:
    """Return the values of columns that an UPDATE leaves to their ``onupdate``."""
    supplied = _supplied(statement, table, params, {})
    values: dict[Column[Any], list[Any]] = {}
    for column in table.c:
        default: Any = column.onupdate
        if column.key in supplied:
            continue
        if column.server_onupdate is not None:
            why = "is changed by the server"
        elif default is None or default.is_scalar:
            continue
        elif default.is_callable:
            try:
                values[column] = [default.arg(None) for _ in range(rows)]
            except AttributeError:
                why = "has an onupdate that reads other values of the row"
            else:
                continue
        else:
            why = unlike_copies(named(default.arg), one_row=False) or ""
            if not why:
                values[column] = [default.arg] * rows
                continue
            why = f"has an onupdate with {why}"
        raise UnsupportedQueryError(
            f"UPDATE of the reference table {table} without {column.name}, which {why}:"
            " each copy would be given another value. Set it, or change the objects"
            " through the session."
        )
    return values
