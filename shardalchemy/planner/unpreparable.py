"""What in a statement is certain to keep its transaction from being prepared."""

from __future__ import annotations

from typing import Any

from sqlalchemy import DDL, Select
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.functions import FunctionElement

from shardalchemy.obstacles import FUNCTIONS, Obstacle, obstacle_in_sql
from shardalchemy.planner.names import whole_text

__all__ = ["obstacle_of"]


def obstacle_of(statement: Any) -> Obstacle | None:
    """Return what *statement* will do that PostgreSQL does not prepare, or None.

    Only what is sure to happen when the statement runs: not a function that is called
    for each row, of which there may be none.
    """
    text = whole_text(statement)
    if text is not None:
        return obstacle_in_sql(text.text)
    if isinstance(statement, Select):
        return None if _may_be_empty(statement) else _of_calls(statement)
    if isinstance(statement, FunctionElement):
        return FUNCTIONS.get(getattr(statement, "name", "").lower())
    if isinstance(statement, DDL):
        return obstacle_in_sql(str(statement.statement))
    if isinstance(statement, CreateTable) and _is_temporary(statement.element):
        return Obstacle.TEMPORARY
    return None


def _may_be_empty(select: Select[Any]) -> bool:
    return bool(
        select._from_obj
        or select._where_criteria
        or select._having_criteria
        or select._limit_clause is not None
        or select._offset_clause is not None
        or any(column._from_objects for column in select._raw_columns)
    )


def _of_calls(select: Select[Any]) -> Obstacle | None:
    for column in select._raw_columns:
        called: Any = column
        while hasattr(called, "element") and not isinstance(called, FunctionElement):
            called = called.element  # a label, or a cast
        if isinstance(called, FunctionElement):
            found = FUNCTIONS.get(getattr(called, "name", "").lower())
            if found is not None:
                return found
    return None


def _is_temporary(table: Any) -> bool:
    prefixes = {str(prefix).upper() for prefix in getattr(table, "_prefixes", ())}
    return bool(prefixes & {"TEMP", "TEMPORARY"}) or (
        getattr(table, "schema", None) == "pg_temp"
    )
