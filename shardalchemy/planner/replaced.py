"""Expressions taken apart: found again where they are written twice, and replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BindParameter, Column, FromClause, Label, Select
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause
from sqlalchemy.sql.selectable import CompoundSelect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardalchemy.planner.scopes import Scope

__all__ = ["Lookup", "columns_in", "named_output", "sub_selects", "without_orm"]


def without_orm(expression: Any) -> Any:
    """Return a copy of *expression* without what the ORM has noted on its parts.

    One with a SELECT in it is left as it is: the ORM still has to see that. Parameters
    are not copied, and neither are columns and tables.
    """
    if sub_selects([expression]):
        return expression

    def bare(element: Any, **_: Any) -> Any:
        if isinstance(element, BindParameter):
            return element
        plain = element._deannotate() if element._annotations else element
        if isinstance(plain, ColumnClause | FromClause):
            return plain
        return None if plain is element else without_orm(plain)

    return visitors.replacement_traverse(expression, {}, bare)


def sub_selects(expressions: Iterable[Any]) -> bool:
    """Return whether a SELECT is nested in *expressions*."""
    return any(
        isinstance(part, Select | CompoundSelect)
        for expression in expressions
        for part in visitors.iterate(expression)
    )


def columns_in(expressions: Iterable[Any]) -> Iterable[Any]:
    """Yield the table columns in *expressions*."""
    for expression in expressions:
        for part in visitors.iterate(expression):
            if getattr(part, "table", None) is not None:
                yield part


def named_output(name: Any, outputs: Iterable[Any], scope: Scope) -> Any:
    """Return the one column of a result that is labelled *name*, or None.

    None as well where a table has a column of that name: which of them is meant is
    another question in each clause.
    """
    if any(name in (c.key, c.name) for e in scope.elements for c in e.clause.c):
        return None
    found = [c for c in outputs if getattr(c, "name", None) == name]
    return found[0] if len(found) == 1 and isinstance(found[0], Label) else None


class Lookup:
    """Names for expressions: equal ones, with the same parameters, have one name."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}

    def add(self, expression: Any, name: str) -> None:
        """Give *expression* a name, unless it has one."""
        key = self._key(expression)
        if key is not None:
            self._names.setdefault(key, name)

    def find(self, expression: Any) -> str | None:
        """Return the name of *expression*, if it was given one."""
        key = self._key(expression)
        return None if key is None else self._names.get(key)

    @staticmethod
    def _key(expression: Any) -> Any:
        # Annotated tables and their plain ones have equal hashes, but not equal keys.
        if isinstance(expression, Column) or (
            getattr(expression, "table", None) is not None
        ):
            return hash(expression.table), expression.key
        key = expression._generate_cache_key()
        if key is None:
            return id(expression)
        return key.key, tuple(p.key for p in key.bindparams)
