"""Whether the result of a SELECT is the concatenation of what each shard makes of it.

An allow-list, in two parts. `why_not_rows`: each row of the result comes from rows of
one shard. `why_not_whole`: and nothing is done to all of them together afterwards, as
ORDER BY, DISTINCT or LIMIT would. Each says which clause it was.

GROUP BY, DISTINCT or a window's PARTITION BY a **key**, a column that tells the shard
of its row, keep rows of several shards apart by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseList,
    Extract,
    False_,
    Label,
    Null,
    ScalarSelect,
    Select,
    TextClause,
    True_,
    Tuple,
    TypeClause,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.elements import (
    CollationClause,
    CollectionAggregate,
    ColumnClause,
    ExpressionClauseList,
    FunctionFilter,
    Grouping,
    Over,
    Slice,
    WithinGroup,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Exists, FromClause, SelectStatementGrouping

from shardalchemy.planner.clauses import distinct_on, has_extension
from shardalchemy.planner.functions import is_custom

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardalchemy.planner.functions import Functions

__all__ = ["is_limited", "why_not_rows", "why_not_whole"]

_SCALAR_CLASSES = (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseList,
    CollationClause,
    CollectionAggregate,
    ColumnClause,
    ExpressionClauseList,
    Extract,
    False_,
    Grouping,
    Label,
    Null,
    Slice,
    True_,
    Tuple,
    TypeClause,
    TypeCoerce,
    UnaryExpression,
)


def why_not_rows(
    select: Any,
    columns: Sequence[Any],
    functions: Functions,
    is_key: Callable[[Any], bool],
) -> str | None:
    """Return the first clause whose rows need more than one shard, or None.

    *columns* are those of the result.
    """
    if not isinstance(select, Select):
        return "a set operation"
    by_key = any(is_key(clause) for clause in select._group_by_clauses)
    for clause, present in (
        ("GROUP BY", bool(select._group_by_clauses) and not by_key),
        ("HAVING", bool(select._having_criteria) and not by_key),
        ("a prefix or suffix", bool(select._prefixes or select._suffixes)),
        ("a hint", bool(select._hints or select._statement_hints)),
        ("a syntax extension", has_extension(select)),
        ("a CTE", bool(select._independent_ctes)),
    ):
        if present:
            return clause
    expressions = _Expressions(functions, is_key, grouped=by_key)
    for column in columns:
        if getattr(column, "is_literal", False):
            return "a textual column"
        reason = expressions.why_not(column)
        if reason is not None:
            return reason
    # An aggregate or a window there is one of all rows as well.
    for clause in (*select._order_by_clauses, *distinct_on(select)):
        reason = expressions.why_not(_referred(clause))
        if reason is not None:
            return reason.replace("in the columns", "in ORDER BY")
    return None


def _referred(clause: Any) -> Any:
    """Return what an ORDER BY term sorts by, below references and modifiers."""
    while isinstance(clause, _label_reference | Label) or (
        isinstance(clause, UnaryExpression) and clause.modifier is not None
    ):
        clause = clause.element
    if isinstance(clause, _textual_label_reference | TextClause):
        return Null()  # names a column, or is refused where it is used
    return clause


def why_not_whole(
    select: Any,
    columns: Sequence[Any],
    functions: Functions,
    is_key: Callable[[Any], bool],
    *,
    ordered: bool = False,
) -> str | None:
    """Return the first clause that needs all rows together, or None.

    *ordered* says that the order of the rows matters to whoever reads them.
    """
    reason = why_not_rows(select, columns, functions, is_key)
    if reason is not None:
        return reason
    on = distinct_on(select)
    apart = any(map(is_key, on or columns))
    for clause, present in (
        ("DISTINCT ON", bool(on) and not apart),
        ("DISTINCT", bool(select._distinct) and not apart),
        ("LIMIT", select._limit_clause is not None),
        ("FETCH", select._fetch_clause is not None),
        ("OFFSET", select._offset_clause is not None),
        ("ORDER BY", ordered and bool(select._order_by_clauses)),
    ):
        if present:
            return clause
    return None


def is_limited(select: Any) -> bool:
    """Return whether a SELECT leaves out rows by their order."""
    return isinstance(select, Select) and (
        select._limit_clause is not None
        or select._fetch_clause is not None
        or select._offset_clause is not None
        or bool(distinct_on(select))
    )


class _Expressions:
    """Finds what in an expression is not a value of one row, or of one group."""

    def __init__(
        self, functions: Functions, is_key: Callable[[Any], bool], *, grouped: bool
    ) -> None:
        self._functions = functions
        self._is_key = is_key
        self._grouped = grouped

    def why_not(self, part: Any) -> str | None:
        if isinstance(part, ScalarSelect | Exists | SelectStatementGrouping | Select):
            return None  # a scope of its own, which is looked at as such
        if isinstance(part, Over):
            parts = part.partition_by
            if parts is None or not any(map(self._is_key, parts)):
                return "a window function"
            return self._of_children(part.element)
        if isinstance(part, FunctionFilter | WithinGroup):
            return self._of_children(part) if self._grouped else "an aggregate"
        if isinstance(part, FunctionElement):
            name = getattr(part, "name", "")
            what = "unknown" if is_custom(part) else self._functions.of_element(part)
            is_value = what in ("immutable", "stable")
            if not is_value and not (what == "aggregate" and self._grouped):
                return f"the function {name}() in the columns"
        elif isinstance(part, FromClause):
            return "a whole row"
        elif not isinstance(part, _SCALAR_CLASSES) or is_custom(part):
            ordered = type(part).__name__ == "aggregate_order_by" and self._grouped
            if not ordered:
                return f"a {type(part).__name__} in the columns"
        if isinstance(part, ColumnClause) and part.is_literal and part.name != "*":
            return "a textual column"
        return self._of_children(part)

    def _of_children(self, part: Any) -> str | None:
        for child in part.get_children():
            reason = self.why_not(child)
            if reason is not None:
                return reason
        return None
