"""An INSERT's rows: their shard keys, what can be generated for them, their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardalchemy.errors import ShardKeyError
from shardalchemy.ids import Locator, new_locator
from shardalchemy.rows import generated_default
from shardalchemy.schema import placement_of

if TYPE_CHECKING:
    from sqlalchemy import Column, Table

    from shardalchemy.planner import Analysis
    from shardalchemy.session import ShardedSession

__all__ = ["completed_insert"]


def completed_insert(
    session: ShardedSession, statement: Any, analysis: Analysis, params: Any
) -> tuple[Any, set[int]]:
    """Return an INSERT's parameters, completed, and the slots of its rows.

    A shard key that is not given comes from the column's Python-side default or from
    the home shard's sequence, a locator from the key. Raises ShardKeyError for a row
    whose key is none that can be hashed.
    """
    table = analysis.table
    assert table is not None
    column = placement_of(table).column
    assert column is not None
    if statement._multi_values:
        rows = [_by_key(v) for group in statement._multi_values for v in group]
        return params, {_slot(table, row.get(column.key)) for row in rows}
    many = isinstance(params, list | tuple)
    rows = [dict(row) for row in params] if many else [dict(params or {})]
    fixed = _by_key(statement._values or {})
    key_name = _parameter_name(statement, column, many)
    locators = [
        (c.key, _parameter_name(statement, c, many))
        for c in table.c
        if isinstance(c.info.get("shardalchemy"), Locator)
    ]
    slots = set()
    for row in rows:
        key = row.get(key_name, fixed.get(column.key))
        if key is None:
            key = generated_default(column)
            if key is None and column is table.autoincrement_column:
                key = session._next_value(column)
            row[key_name] = key
        slot = _slot(table, key)
        slots.add(slot)
        for locator, name in locators:
            if row.get(name) is None and locator not in fixed:
                row[name] = new_locator(slot)
    return (rows if many else rows[0] or params), slots


def _by_key(values: Any) -> dict[str, Any]:
    return {getattr(column, "key", column): v for column, v in values.items()}


def _parameter_name(statement: Any, column: Column[Any], many: bool) -> str:
    """Return what the statement's parameters call *column*.

    The ORM's INSERT of many rows takes attribute names, any other column keys.
    """
    subject = statement._propagate_attrs.get("plugin_subject")
    if subject is None or not many:
        return column.key
    name: str = subject.mapper.get_property_by_column(column).key
    return name


def _slot(table: Table, key: Any) -> int:
    value = getattr(key, "effective_value", key)
    placement = placement_of(table)
    assert placement.pin is not None
    slot = None if value is None else placement.pin.slot(value)
    if slot is None:
        raise ShardKeyError(
            f"INSERT into {table}: the shard key {placement.column_name} is {value!r};"
            f" it must be {placement.pin.accepts}."
        )
    return slot
