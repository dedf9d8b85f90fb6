"""SQL expressions that a write evaluates once, so that every shard is given one value.

``now()`` is the moment at which a transaction began on its server, another one on each
shard. A write that runs on several is sent with the value that one of them gave.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, Uuid, cast, literal, select
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ClauseElement

from shardalchemy.planner.names import named
from shardalchemy.planner.written import STABLE, stable_functions, volatile_functions

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.types import TypeEngine

__all__ = ["with_one_moment"]

_VOLATILE: dict[str, TypeEngine[Any]] = {
    "random": Float(),
    "gen_random_uuid": Uuid(),
    "clock_timestamp": STABLE["now"],
}


def with_one_moment(
    statement: Any, connect: Callable[[], Connection], *, volatile: bool = False
) -> Any:
    """Return *statement* with the value of each call that has one value for all rows.

    *connect* gives the connection that evaluates them. With *volatile* also of calls
    that are made anew for each row: right for a statement that writes one row.
    """
    parts = named(statement).parts
    calls = stable_functions(parts)
    if volatile:
        calls += volatile_functions(parts)
    if not calls:
        return statement
    connection = connect()
    wanted = {id(call) for call in calls}
    names = {_name(call): call for call in calls if _name(call) in STABLE}
    known = {}
    if names:
        row = connection.execute(select(*(c.label(n) for n, c in names.items()))).one()
        known = dict(zip(names, row, strict=True))

    def replaced(element: Any, **_: Any) -> Any:
        if id(element) not in wanted:
            return None
        name = _name(element)
        type_: TypeEngine[Any] = STABLE.get(name) or _VOLATILE[name]
        value = known[name] if name in known else connection.scalar(select(element))
        # A cast, so that the ORM reads the column again: its own type may differ.
        return cast(literal(value, type_), type_)

    return _replaced(statement, replaced)


def _name(call: Any) -> str:
    name: str = call.name
    return name.lower()


def _replaced(statement: Any, replaced: Callable[..., Any]) -> Any:
    changed: Any = visitors.replacement_traverse(statement, {}, replaced)
    clause = getattr(changed, "_post_values_clause", None)
    if clause is not None:
        # SQLAlchemy 2.0 does not lead into ON CONFLICT.
        clause = changed._post_values_clause = copy(clause)
        for name, value in vars(clause).items():
            setattr(clause, name, _within(value, replaced))
    return changed


def _within(value: Any, replaced: Callable[..., Any]) -> Any:
    if isinstance(value, ClauseElement):
        return visitors.replacement_traverse(value, {}, replaced)
    if isinstance(value, list | tuple):
        return type(value)(_within(item, replaced) for item in value)
    return value
