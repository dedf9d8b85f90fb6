"""Whether a write by criteria may run on several shards, each for its own rows.

It may if what becomes of a row depends on rows of its own shard and on reference
tables alone. The target's rows are on one shard each; so every other sharded element,
joined or in a subquery, has to be tied to the target by equal keys. Functions are an
allow-list: of a row's values, of the moment the transaction began (`STABLE`, which is
read once and handed to every shard), or made anew for each row.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import Date as SqlDate
from sqlalchemy import DateTime, String, Time
from sqlalchemy.sql.functions import FunctionElement

from shardalchemy.planner.functions import SCALARS, is_custom
from shardalchemy.planner.layout import unreached
from shardalchemy.planner.names import named
from shardalchemy.planner.rowwise import is_limited

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from sqlalchemy.types import TypeEngine

    from shardalchemy.planner.layout import Layout
    from shardalchemy.planner.names import Named
    from shardalchemy.planner.pins import Restriction
    from shardalchemy.planner.scopes import Element, Scope

__all__ = [
    "STABLE",
    "rows_stay",
    "stable_functions",
    "unlike_copies",
    "unlike_rows",
    "unlike_shards",
    "volatile_functions",
]

STABLE: Mapping[str, TypeEngine[Any]] = {
    "now": DateTime(timezone=True),
    "current_timestamp": DateTime(timezone=True),
    "transaction_timestamp": DateTime(timezone=True),
    "statement_timestamp": DateTime(timezone=True),
    "localtimestamp": DateTime(timezone=False),
    "current_date": SqlDate(),
    "current_time": Time(timezone=True),
    "localtime": Time(timezone=False),
    "current_user": String(),
    "session_user": String(),
}
"""Functions with one value a transaction or statement, and the type of that value."""

_OF_EACH_ROW = frozenset({"random", "gen_random_uuid", "clock_timestamp"})
_AGGREGATES = frozenset(
    {"count", "sum", "min", "max", "avg", "bool_and", "bool_or", "every"}
)
_ALIKE_EVERYWHERE = SCALARS | _AGGREGATES

# Plain SQL in which a function is called, by parentheses or without.
_CALLS = re.compile(
    r"\(|\b(current_\w+|local(time|timestamp)|session_user|user)\b", re.IGNORECASE
)


def stable_functions(parts: Sequence[Any]) -> list[Any]:
    """Return the calls among *parts* of functions that are read once."""
    return [p for p in parts if isinstance(p, FunctionElement) and _name(p) in STABLE]


def unlike_shards(
    statement: Any, scopes: Sequence[Scope], found: Named, restricted: list[Restriction]
) -> str | None:
    """Return what keeps an UPDATE or DELETE from running shard by shard, or None.

    *scopes* are the statement's, its own first; *restricted* its sharded elements.
    """
    allowed = _ALIKE_EVERYWHERE | _OF_EACH_ROW
    problem = (
        _unlike_calls(found.parts, found.texts, allowed | STABLE.keys())
        or _unlike_calls(_added_criteria(statement), (), allowed)
        or _unlike_clauses(statement, scopes)
        or _picked_from_copies(scopes, restricted)
    )
    if problem is not None:
        return problem
    target = scopes[0].elements[0]
    apart = _apart_from(target, restricted)
    if apart:
        return (
            f"an UPDATE or DELETE of {target.table} that reads {' and '.join(apart)},"
            " not by equal shard keys,"
        )
    return None


def rows_stay(layout: Layout, found: Named, column: Any, family: str) -> bool:
    """Return whether each row of a SELECT has the key of a row of its own shard.

    Then the rows may be inserted where they are read, *column* of the SELECT being the
    shard key of the table they go to; *family* is that of the key's pin.
    """
    scopes = layout.noted.scopes
    top = scopes[0]
    place = layout.resolver.place(column, top)
    if (
        place is None
        or place.blankable
        or not place.filters_inside
        or place.pin.family != family
        or top.compound
        or layout.why_not_whole(top, ordered=True) is not None
        or layout.why_not_local(top) is not None
    ):
        return False
    problem = (
        _unlike_calls(found.parts, found.texts, SCALARS | _AGGREGATES)
        or _unlike_clauses(None, scopes)
        or _picked_from_copies(scopes, layout.found)
    )
    return problem is None and not _apart_from(place.element, layout.found)


def _apart_from(target: Element, restricted: list[Restriction]) -> list[str]:
    """Return the tables whose rows are not tied to *target*'s by equal keys."""
    together = {r.group for r in restricted if r.element is target}
    return sorted({str(r.element.table) for r in unreached(restricted, together)})


def unlike_copies(found: Named, *, one_row: bool) -> str | None:
    """Return what in a write the copies of a reference table may evaluate unlike.

    *one_row* says that each expression is evaluated for one row only, so that a value
    made for it on one shard can be handed to the others.
    """
    allowed = SCALARS | STABLE.keys()
    if one_row:
        allowed |= _OF_EACH_ROW
    return _unlike_calls(found.parts, found.texts, allowed)


def unlike_rows(found: Named) -> str | None:
    """Return what keeps rows of one INSERT from being sent to several shards."""
    allowed = _ALIKE_EVERYWHERE | _OF_EACH_ROW | STABLE.keys()
    return _unlike_calls(found.parts, found.texts, allowed)


def volatile_functions(parts: Sequence[Any]) -> list[Any]:
    """Return the calls among *parts* of functions that are made anew for each row."""
    return [
        p for p in parts if isinstance(p, FunctionElement) and _name(p) in _OF_EACH_ROW
    ]


def _unlike_calls(
    parts: Sequence[Any], texts: Sequence[str], allowed: Set[str]
) -> str | None:
    for part in parts:
        if is_custom(part):
            return f"a {type(part).__name__} of the application"
        if not isinstance(part, FunctionElement):
            continue
        name = _name(part)
        plain = not getattr(part, "packagenames", ())
        relative = name == "age" and len(list(part.clauses)) < 2  # to today's date
        rounded = name in STABLE and len(list(part.clauses)) > 0
        if not plain or name not in allowed or relative or rounded:
            return f"the function {name}(), which may give each shard another value,"
    for text in texts:
        if _CALLS.search(text):
            return f"plain SQL that calls a function ({text!r})"
    return None


def _name(function: Any) -> str:
    name: str = getattr(function, "name", "")
    return name.lower()


def _unlike_clauses(statement: Any, scopes: Sequence[Scope]) -> str | None:
    if getattr(statement, "_prefixes", ()) or getattr(statement, "_hints", None):
        return "a prefix or hint"
    inner = [e.subquery for s in scopes for e in s.elements if e.subquery is not None]
    if any(count > 1 for count in Counter(map(id, inner)).values()):
        return "a CTE or subquery that is used more than once"
    if any(getattr(s.select, "_for_update_arg", None) is not None for s in scopes[1:]):
        return "FOR UPDATE in a subquery"
    return None


def _picked_from_copies(
    scopes: Sequence[Scope], restricted: list[Restriction]
) -> str | None:
    """Refuse to pick some rows of copies, which may be stored in another order."""
    sharded = {id(r.scope) for r in restricted}
    for scope in scopes[1:]:
        if is_limited(scope.select) and id(scope) not in sharded:
            return "a LIMIT in a subquery"
    return None


def _added_criteria(statement: Any) -> list[Any]:
    """Return the parts of criteria that options add while the ORM compiles."""
    subject = statement._propagate_attrs.get("plugin_subject")
    parts: list[Any] = []
    for option in getattr(statement, "_with_options", ()):
        if subject is not None and getattr(option, "_is_criteria_option", False):
            parts += named(option._resolve_where_criteria(subject)).parts
    return parts
