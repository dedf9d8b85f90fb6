"""What SQLAlchemy's versions keep in different places of a SELECT."""

from __future__ import annotations

from typing import Any

__all__ = ["distinct_on", "has_extension", "limited_as"]

_EXTENSION_POINTS = (
    "_post_select_clause",
    "_pre_columns_clause",
    "_post_criteria_clause",
    "_post_body_clause",
)


def distinct_on(select: Any) -> tuple[Any, ...]:
    """Return the expressions of DISTINCT ON, as an argument or an extension (2.1)."""
    given = tuple(getattr(select, "_distinct_on", ()))
    extension = getattr(select, "_pre_columns_clause", None)
    return given or tuple(getattr(extension, "_distinct_on", ()))


def has_extension(select: Any) -> bool:
    """Return whether a SELECT has a syntax extension other than DISTINCT ON."""
    for point in _EXTENSION_POINTS:
        clause = getattr(select, point, None)
        if clause is not None and not hasattr(clause, "_distinct_on"):
            return True
    return False


def limited_as(select: Any, original: Any) -> Any:
    """Give *select* the LIMIT, OFFSET and FETCH of *original*, and return it."""
    select._limit_clause = original._limit_clause
    select._offset_clause = original._offset_clause
    select._fetch_clause = original._fetch_clause
    select._fetch_clause_options = original._fetch_clause_options
    return select
