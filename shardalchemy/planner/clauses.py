"""What SQLAlchemy's versions keep in different places of a SELECT."""

from __future__ import annotations

from typing import Any

__all__ = ["distinct_on", "has_extension"]

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
