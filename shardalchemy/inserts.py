"""An INSERT's rows: their shard keys, what can be generated for them, their slots.

The rows come as parameters, one set or many, or as the ``values([…])`` of the
statement. Either can be cut into shares, so that each shard is given its own rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import BindParameter, inspect
from sqlalchemy.sql.elements import ClauseElement

from shardalchemy.errors import ShardKeyError, UnsupportedQueryError
from shardalchemy.ids import Locator, new_locator
from shardalchemy.ring import KEY_TYPES
from shardalchemy.ring.bulk import slots_int8
from shardalchemy.rows import generated_default, row_placement
from shardalchemy.schema import placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Column, Table

    from shardalchemy.planner import Analysis
    from shardalchemy.session import ShardedSession

__all__ = ["InsertedRows", "completed_insert", "row_names", "with_added"]

_int8_slot = KEY_TYPES["int8"].slot
_BULK = 1000  # rows from which numpy, where it is loaded, is the faster way


@dataclass(frozen=True, slots=True)
class InsertedRows:
    """An INSERT whose rows have all that says where they live.

    ``slots`` are those of its rows, in order.
    """

    statement: Any
    params: Any
    slots: Sequence[int]

    def share(self, places: Sequence[int]) -> tuple[Any, Any]:
        """Return the statement and parameters for the rows at *places* alone."""
        statement = self.statement
        if statement._multi_values:
            rows = _value_rows(statement)
            return _with_value_rows(statement, [rows[p] for p in places]), self.params
        return statement, [self.params[place] for place in places]


def completed_insert(
    session: ShardedSession,
    statement: Any,
    analysis: Analysis,
    params: Any,
    options: Mapping[str, Any],
) -> InsertedRows:
    """Return an INSERT's rows, completed.

    A shard key that is not given comes from the column's Python-side default or from
    the home shard's sequence, a locator from the key. Raises ShardKeyError for a row
    whose key is none that can be hashed.
    """
    table = analysis.table
    assert table is not None
    if statement._multi_values:
        rows = [
            {getattr(k, "key", k): v for k, v in row.items()}
            for row in _value_rows(statement)
        ]
        slots, changed = _slots(session, statement, table, rows, {}, str)
        if changed is not rows:
            statement = _with_value_rows(statement, changed)
        return InsertedRows(statement, params, slots)
    fixed = {getattr(k, "key", k): v for k, v in (statement._values or {}).items()}
    names = row_names(statement, params, options)
    many = isinstance(params, list | tuple) and bool(params)
    rows = params if many else [params or {}]
    slots, changed = _slots(session, statement, table, rows, fixed, names)
    if not params:
        # As parameters they would make another kind of INSERT of it for the ORM.
        if changed is not rows:
            added = {table.c[key]: value for key, value in changed[0].items()}
            statement = statement.values(added)
        return InsertedRows(statement, params, slots)
    if not many:
        return InsertedRows(statement, changed[0], slots)
    if names is str and not _are_alike(changed):
        return InsertedRows(statement, *_alike(table, changed, slots, fixed))
    return InsertedRows(statement, changed, slots)


def _are_alike(rows: Sequence[Any]) -> bool:
    first = rows[0].keys()
    return all(row.keys() == first for row in rows)


def _alike(
    table: Table,
    rows: Sequence[Any],
    slots: Sequence[int],
    fixed: Mapping[str, Any],
) -> tuple[Sequence[Any], Sequence[int]]:
    """Return rows that mean apart what they mean together, with their slots.

    The first parameter set of a Core INSERT names the columns of all. SQLAlchemy
    ignores what another has beside those; where one lacks any, all rows are sent to
    one shard, for SQLAlchemy to say so before it sends them.
    """
    first = rows[0].keys()
    lacking = {key for row in rows for key in first - row.keys()}
    if lacking & fixed.keys():
        raise UnsupportedQueryError(
            f"INSERT into {table} of rows of several shards, some of which leave"
            f" {', '.join(sorted(lacking))} to the statement. Give it in every row."
        )
    if lacking:
        return rows, [slots[0]] * len(rows)
    return [{key: row[key] for key in first} for row in rows], slots


def row_names(
    statement: Any, params: Any, options: Mapping[str, Any]
) -> Callable[[Any], str]:
    """Return the function that says what the parameters call a column.

    The ORM's INSERT of parameter sets takes attribute names, any other column keys.
    """
    subject = statement._propagate_attrs.get("plugin_subject")
    own = statement._execution_options
    strategy = options.get("dml_strategy", own.get("dml_strategy", "auto"))
    if subject is None or not params or strategy not in ("auto", "bulk"):
        return str
    mapper = subject.mapper

    def attribute(column: Any) -> str:
        name: str = mapper.get_property_by_column(column).key
        return name

    return attribute


def with_added(
    statement: Any,
    params: Any,
    options: Mapping[str, Any],
    added: Mapping[Column[Any], Sequence[Any]],
) -> tuple[Any, Any]:
    """Return a write's statement and parameters with columns added to each row.

    *added* has a value for each row; an expression is added to the statement.
    """
    plain = {
        column: values
        for column, values in added.items()
        if not isinstance(values[0], ClauseElement)
    }
    whole = {c: values[0] for c, values in added.items() if c not in plain}
    if whole:
        statement = statement.values(whole)
    if not plain:
        return statement, params
    if statement._multi_values:
        rows = [
            {**row, **{(c.key if _by_name(row) else c): v[n] for c, v in plain.items()}}
            for n, row in enumerate(_value_rows(statement))
        ]
        return _with_value_rows(statement, rows), params
    if not params:
        return statement.values({c: values[0] for c, values in plain.items()}), params
    name_of = row_names(statement, params, options)
    named = {(c.key if name_of is str else name_of(c)): v for c, v in plain.items()}
    if isinstance(params, Mapping):
        return statement, {**{name: v[0] for name, v in named.items()}, **params}
    return statement, [
        # What a row gives itself goes before what is generated for it.
        {**{name: v[n] for name, v in named.items()}, **row}
        for n, row in enumerate(params)
    ]


def _by_name(row: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) for key in row)


def _slots(
    session: ShardedSession,
    statement: Any,
    table: Table,
    rows: Sequence[Any],
    fixed: Mapping[str, Any],
    name_of: Callable[[Any], str],
) -> tuple[Sequence[int], Sequence[Any]]:
    """Return each row's slot, and the rows with what they lacked.

    A row is copied when something is added to it; *rows* itself comes back where
    nothing was.
    """
    placement = placement_of(table)
    column = placement.column
    assert column is not None
    assert placement.pin is not None
    slot_of = placement.pin.slot

    def named(column: Column[Any]) -> str:
        return column.key if name_of is str else name_of(column)

    key_name = named(column)
    given: Any = fixed.get(column.key)
    if isinstance(given, BindParameter) and given.key in rows[0]:
        key_name, given = given.key, None
    locators = [
        named(c)
        for c in table.c
        if isinstance(c.info.get("shardalchemy"), Locator) and c.key not in fixed
    ]
    locators = [
        n
        for n in locators
        if n not in (column.key, key_name) and any(r.get(n) is None for r in rows)
    ]
    keys = [row.get(key_name, given) for row in rows]
    counted = table.autoincrement_column
    if counted is None or counted is column or counted.key in fixed:
        count_name = ""
    else:
        count_name = named(counted)
        if not any(row.get(count_name) is None for row in rows):
            count_name = ""
    if not locators and not count_name and not any(key is None for key in keys):
        numbers = slot_of is _int8_slot and len(keys) >= _BULK
        quick = (_int8_slots(keys) if numbers else None) or list(map(slot_of, keys))
        if None not in quick:
            return quick, rows
    # What follows says which key is wrong as well.
    slots: list[int] = []
    completed: list[Any] = []
    changed = False
    for row, key in zip(rows, keys, strict=True):
        if key is None:
            key = _generated_key(session, statement, column)
        slot = slot_of(getattr(key, "effective_value", key))
        if slot is None:
            raise ShardKeyError(
                f"INSERT into {table}: the shard key {placement.column_name} is"
                f" {key!r}; it must be {placement.pin.accepts}."
            )
        slots.append(slot)
        lacking: dict[str, Any] = {
            n: new_locator(slot) for n in locators if row.get(n) is None
        }
        if given is None and row.get(key_name) is None:
            lacking[key_name] = key
        if count_name and row.get(count_name) is None:
            assert counted is not None
            lacking[count_name] = session._next_value(counted)
        if lacking:
            changed = True
            row = {**row, **lacking}
        completed.append(row)
    return slots, completed if changed else rows


def _int8_slots(keys: list[Any]) -> list[Any] | None:
    """Return the slots of *keys* if all are plain integers of 64 bits."""
    if "numpy" not in sys.modules or not all(type(key) is int for key in keys):
        return None
    try:
        return slots_int8(keys)
    except OverflowError:
        return None


def _generated_key(session: ShardedSession, statement: Any, column: Column[Any]) -> Any:
    key = generated_default(column)
    if key is not None:
        return key
    counted = column.table.autoincrement_column
    subject = statement._propagate_attrs.get("plugin_subject")
    if counted is None and subject is not None:
        # A child of joined inheritance has its parent's key.
        for _, counted in row_placement(inspect(subject).mapper).counted:
            return session._next_value(counted)
    return session._next_value(column) if column is counted else None


def _value_rows(statement: Any) -> list[Any]:
    return [row for group in statement._multi_values for row in group]


def _with_value_rows(statement: Any, rows: Sequence[Any]) -> Any:
    changed = statement._generate()
    changed._multi_values = (list(rows),)
    return changed
