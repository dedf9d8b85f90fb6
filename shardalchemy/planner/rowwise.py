"""Whether a SELECT is row-wise: its rows can be had per shard and concatenated.

An allow-list. A clause that is not known to keep rows apart makes the SELECT not
row-wise, and `why_not_rowwise` says which clause that was.
"""

from __future__ import annotations

from typing import Any

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
    TableClause,
    True_,
    Tuple,
    TypeClause,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.elements import (
    CollationClause,
    ColumnClause,
    ExpressionClauseList,
    FunctionFilter,
    Grouping,
    Over,
    Slice,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Exists, FromClause, SelectStatementGrouping

__all__ = ["why_not_rowwise"]

# Functions of one row's values. Any other may be an aggregate or return a set, or, as
# now() does, give another value on each shard.
_SCALAR_FUNCTIONS = frozenset(
    """
    abs age ascii btrim ceil ceiling char_length coalesce concat concat_ws date_bin
    date_part date_trunc extract floor format greatest initcap jsonb_build_object
    json_build_object jsonb_extract_path jsonb_extract_path_text least left length lower
    lpad ltrim make_date md5 mod nullif overlay position power replace reverse right
    round rpad rtrim sign split_part sqrt strpos substr substring to_char to_date
    to_number to_timestamp translate trim trunc upper
    """.split()  # noqa: SIM905
)

_SCALAR_CLASSES = (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseList,
    CollationClause,
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


def why_not_rowwise(
    select: Any, original: Any, *, distinct_by_shard: bool = False
) -> str | None:
    """Return the first clause that keeps *select* from being row-wise, or None.

    *original* is the statement as written; an ORDER BY that only eager loading has
    added orders children within their parent, whose rows are on one shard.
    *distinct_by_shard* says that equal rows are on one shard.
    """
    if not isinstance(select, Select):
        return "a set operation"
    for clause, present in (
        ("GROUP BY", bool(select._group_by_clauses)),
        ("HAVING", bool(select._having_criteria)),
        ("DISTINCT ON", bool(getattr(select, "_distinct_on", ()))),
        ("DISTINCT", bool(select._distinct) and not distinct_by_shard),
        ("LIMIT", select._limit_clause is not None),
        ("FETCH", select._fetch_clause is not None),
        ("OFFSET", select._offset_clause is not None),
        ("ORDER BY", bool(getattr(original, "_order_by_clauses", ()))),
        ("a prefix or suffix", bool(select._prefixes or select._suffixes)),
        ("a hint", bool(select._hints or select._statement_hints)),
        ("a CTE", bool(select._independent_ctes)),
    ):
        if present:
            return clause
    for column in select._raw_columns:
        if not isinstance(column, TableClause):
            reason = _why_not_scalar(column)
            if reason is not None:
                return reason
    return None


def _why_not_scalar(part: Any) -> str | None:
    """Return what in an expression of the columns is not a value of one row."""
    if isinstance(part, ScalarSelect | Exists | SelectStatementGrouping | Select):
        return None  # a scope of its own, which is looked at as such
    if isinstance(part, Over):
        return "a window function"
    if isinstance(part, FunctionFilter | WithinGroup):
        return "an aggregate"
    if isinstance(part, FunctionElement):
        name = getattr(part, "name", "")
        packages = getattr(part, "packagenames", ())
        if name.lower() not in _SCALAR_FUNCTIONS or packages or _is_custom(part):
            return f"the function {name}() in the columns"
    elif isinstance(part, FromClause):
        return "a whole row"
    elif not isinstance(part, _SCALAR_CLASSES) or _is_custom(part):
        return f"a {type(part).__name__} in the columns"
    if isinstance(part, ColumnClause) and part.is_literal:
        return "a textual column"
    for child in part.get_children():
        reason = _why_not_scalar(child)
        if reason is not None:
            return reason
    return None


def _is_custom(part: Any) -> bool:
    """Return whether an application has its own way to render this class."""
    return any(
        not base.__module__.startswith(("sqlalchemy.", "builtins", "typing"))
        for base in type(part).__mro__
    )
