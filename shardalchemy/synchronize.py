"""How the session's objects follow an UPDATE or DELETE that runs on several shards.

With ``synchronize_session="evaluate"`` SQLAlchemy applies the change to every object
that fulfils the criteria, whichever shard its row is on: so one part of the write does
that for all, and the others leave the objects alone. ``"fetch"`` goes by the primary
keys that each shard returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Update
from sqlalchemy.orm.evaluator import UnevaluatableError
from sqlalchemy.sql.base import CompileState

from shardalchemy.errors import UnsupportedQueryError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardalchemy.session import ShardedSession

__all__ = ["Synchronized", "one_synchronizes"]


@dataclass(frozen=True, slots=True)
class Synchronized:
    """A write for several shards, and the execution options of each part."""

    statement: Any
    options: Sequence[Mapping[str, Any]]


def one_synchronizes(
    session: ShardedSession, statement: Any, options: Mapping[str, Any], parts: int
) -> Synchronized:
    """Return *statement* ready for several shards, and each part's options.

    What the Python side gives a row that is updated, it gives to all rows alike; so it
    is evaluated here, once.
    """
    statement = _with_onupdates(statement)
    if "parententity" not in statement.table._annotations:
        return Synchronized(statement, [{}] * parts)
    mode = options.get("synchronize_session", "auto")
    if mode == "auto":
        mode = "evaluate" if _is_evaluatable(statement) else "fetch"
    if mode != "evaluate":
        return Synchronized(statement, [{"synchronize_session": mode}] * parts)
    others: list[Mapping[str, Any]] = [{"synchronize_session": False}] * (parts - 1)
    return Synchronized(statement, [{"synchronize_session": mode}, *others])


def _is_evaluatable(statement: Any) -> bool:
    compile_state: Any = CompileState._get_plugin_class_for_plugin(statement, "orm")
    mapper = statement.table._annotations["parententity"].mapper
    options = compile_state.default_update_options + {"_subject_mapper": mapper}
    try:
        compile_state._eval_condition_from_statement(options, statement)
    except UnevaluatableError:
        return False
    return True


def _with_onupdates(statement: Any) -> Any:
    """Return an UPDATE that sets what Python-side ``onupdate`` gives."""
    if not isinstance(statement, Update):
        return statement
    ordered = getattr(statement, "_ordered_values", None) or ()
    given = [*(statement._values or ()), *(column for column, _ in ordered)]
    assigned = {getattr(column, "key", column) for column in given}
    added = {}
    for column in statement.table.c:
        default: Any = column.onupdate
        if default is None or column.key in assigned or default.is_clause_element:
            continue
        if not (default.is_scalar or default.is_callable):
            continue
        try:
            added[column] = default.arg if default.is_scalar else default.arg(None)
        except AttributeError as error:
            raise UnsupportedQueryError(
                f"the onupdate of {column} reads other values of the row, which this"
                " UPDATE of several shards does not have at hand. Set the column in"
                " the statement."
            ) from error
    if not added:
        return statement
    if ordered or getattr(statement, "_maintain_values_ordering", False):
        raise UnsupportedQueryError(
            "ordered_values() of an UPDATE over several shards leaves out"
            f" {', '.join(c.key for c in added)}, which has an onupdate. Set it there."
        )
    return statement.values(added)
