"""Whether a SELECT is row-wise: its rows can be had per shard and concatenated.

An allow-list. A clause that is not known to keep rows apart makes the SELECT not
row-wise, and `why_not_rowwise` says which clause that was.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, TableClause
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import (
    ColumnClause,
    FunctionFilter,
    Over,
    TextClause,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["why_not_rowwise"]

# Functions of one row's values. Any other may be an aggregate or return a set.
_SCALAR_FUNCTIONS = frozenset(
    [
        "abs",
        "age",
        "ascii",
        "btrim",
        "ceil",
        "ceiling",
        "char_length",
        "coalesce",
        "concat",
        "concat_ws",
        "current_date",
        "current_time",
        "current_timestamp",
        "date_bin",
        "date_part",
        "date_trunc",
        "extract",
        "floor",
        "format",
        "greatest",
        "initcap",
        "jsonb_build_object",
        "json_build_object",
        "jsonb_extract_path",
        "jsonb_extract_path_text",
        "left",
        "length",
        "lower",
        "lpad",
        "ltrim",
        "make_date",
        "md5",
        "mod",
        "now",
        "nullif",
        "overlay",
        "position",
        "power",
        "replace",
        "reverse",
        "right",
        "round",
        "rpad",
        "rtrim",
        "sign",
        "split_part",
        "sqrt",
        "strpos",
        "substr",
        "substring",
        "to_char",
        "to_date",
        "to_number",
        "to_timestamp",
        "translate",
        "trim",
        "trunc",
        "upper",
    ]
)


def why_not_rowwise(select: Any, original: Any) -> str | None:
    """Return the first clause that keeps *select* from being row-wise, or None.

    *original* is the statement as written; an ORDER BY that only eager loading has
    added orders children within their parent, whose rows are on one shard.
    """
    if not isinstance(select, Select):
        return "a set operation"
    for clause, present in (
        ("GROUP BY", bool(select._group_by_clauses)),
        ("HAVING", bool(select._having_criteria)),
        ("DISTINCT", bool(select._distinct)),
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
        if isinstance(column, TableClause):
            continue
        for part in visitors.iterate(column):
            reason = _why_not_scalar(part)
            if reason is not None:
                return reason
    return None


def _why_not_scalar(part: Any) -> str | None:
    if isinstance(part, Over):
        return "a window function"
    if isinstance(part, FunctionFilter | WithinGroup):
        return "an aggregate"
    if isinstance(part, FunctionElement):
        name = getattr(part, "name", "")
        packages = getattr(part, "packagenames", ())
        if name.lower() not in _SCALAR_FUNCTIONS or packages:
            return f"the function {name}() in the columns"
    if isinstance(part, TextClause) or (
        isinstance(part, ColumnClause) and part.is_literal
    ):
        return "a textual column"
    return None
