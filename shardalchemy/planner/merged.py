"""Rows that the shards finish, and one server puts in order.

For a scope whose rows each come from one shard: a shard computes its columns, its
groups and its windows, and what the rows are sorted by. The merging SELECT sorts,
leaves out duplicates and applies LIMIT and OFFSET, as the original says. Each shard
sends no more than ``limit + offset`` rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Numeric,
    Select,
    TextClause,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    ColumnClause,
    Label,
    UnaryExpression,
    _label_reference,
    _textual_label_reference,
)

from shardalchemy.planner.clauses import distinct_on, limited_as
from shardalchemy.planner.replaced import (
    Lookup,
    named_output,
    sub_selects,
    without_orm,
)
from shardalchemy.planner.split import Piece, Rows, worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardalchemy.planner.scopes import Scope
    from shardalchemy.planner.slots import SlotSet

__all__ = ["merged"]

_MOST = str(2**63 - 1)

_MODIFIERS = (
    operators.asc_op,
    operators.desc_op,
    operators.nulls_first_op,
    operators.nulls_last_op,
)


def merged(
    scope: Scope, name: str, slots: SlotSet | None, names: Sequence[str | None]
) -> tuple[Piece, Callable[[Any], Select[Any]]] | None:
    """Return the piece of *scope*, and what makes the SELECT that merges its rows.

    *names* are those that the result's columns must have, None where it does not
    matter. None where the order is said in a way that is not understood here.
    """
    original = scope.select
    outputs = [without_orm(c) for c in scope.columns]
    bare = [c.element if isinstance(c, Label) else c for c in outputs]
    lookup = Lookup()
    for index, output in enumerate(bare):
        lookup.add(output, f"c{index}")
    extra: list[Any] = []

    def column_for(expression: Any) -> str | None:
        """Return the piece's column that holds *expression*; add one if need be."""
        found = lookup.find(expression)
        if found is None:
            if sub_selects([expression]):
                return None
            found = f"s{len(extra)}"
            extra.append(expression)
            lookup.add(expression, found)
        return found

    order: list[tuple[str, tuple[Any, ...]]] = []
    for clause in original._order_by_clauses:
        term = _ordering(clause, outputs, scope)
        if term is None:
            return None
        place = column_for(term[0])
        if place is None:
            return None
        order.append((place, term[1]))
    apart = [column_for(without_orm(c)) for c in distinct_on(original)]
    if None in apart or (original._distinct and not apart and extra):
        return None
    columns = [c.label(f"c{i}") for i, c in enumerate(bare)]
    columns += [c.label(f"s{i}") for i, c in enumerate(extra)]
    limits = _worker_limit(original)
    clauses: dict[str, Any] = {
        "_distinct": bool(original._distinct),
        "_group_by_clauses": original._group_by_clauses,
        "_having_criteria": original._having_criteria,
        "_for_update_arg": original._for_update_arg,
    }
    if apart:
        clauses["_distinct_on"] = distinct_on(original)
    by_name = {c.name: c for c in columns}
    if limits or apart:
        clauses["_order_by_clauses"] = tuple(
            _modified(by_name[place].element, how) for place, how in order
        )
    made = worker(columns, scope.froms, original._where_criteria, **clauses, **limits)
    piece = Piece(name, made, tuple(c.name for c in columns), slots, "finished rows")
    types = [c.type for c in columns]

    def merge(_: Any) -> Select[Any]:
        rows = Rows(piece, types)
        outer = [
            rows.c[f"c{i}"] if label is None else rows.c[f"c{i}"].label(label)
            for i, label in enumerate(names)
        ]
        final: Any = select(*outer).select_from(rows)
        final._distinct = bool(original._distinct)
        final._distinct_on = tuple(rows.c[d] for d in apart if d)
        final = final.order_by(*(_modified(rows.c[p], how) for p, how in order))
        return limited_as(final, original)  # type: ignore[no-any-return]

    return piece, merge


def _ordering(
    clause: Any, outputs: Sequence[Any], scope: Scope
) -> tuple[Any, tuple[Any, ...]] | None:
    """Return an ORDER BY term as its expression and its modifiers, or None."""
    modifiers: list[Any] = []
    while True:
        if isinstance(clause, _textual_label_reference):
            clause = named_output(clause.element, outputs, scope)
            if clause is None:
                return None
        elif isinstance(clause, _label_reference | Label):
            clause = clause.element
        elif isinstance(clause, UnaryExpression) and clause.modifier in _MODIFIERS:
            modifiers.append(clause.modifier)
            clause = clause.element
        else:
            break
    if isinstance(clause, TextClause):
        text = clause.text.strip()
        if not (text.isdigit() and 0 < int(text) <= len(outputs)):
            return None
        clause = outputs[int(text) - 1]
        clause = clause.element if isinstance(clause, Label) else clause
    if isinstance(clause, ColumnClause) and clause.table is None:
        return None  # PostgreSQL may read it as a position, or a column's label
    return without_orm(clause), tuple(reversed(modifiers))


def _modified(expression: Any, modifiers: Sequence[Any]) -> Any:
    for modifier in modifiers:
        expression = UnaryExpression(expression, modifier=modifier)
    return expression


def _worker_limit(original: Any) -> dict[str, Any]:
    """Return the clauses by which a shard sends no row that cannot be needed."""
    limit, offset = original._limit_clause, original._offset_clause
    fetch = original._fetch_clause
    if sub_selects([c for c in (limit, offset, fetch) if c is not None]):
        return {}

    def with_offset(count: Any) -> Any:
        if offset is None:
            return cast(count, BigInteger)
        both = cast(count, Numeric) + cast(offset, Numeric)
        return cast(func.least(both, literal_column(_MOST)), BigInteger)

    if limit is not None:
        return {"_limit_clause": with_offset(limit)}
    if fetch is not None and not original._fetch_clause_options["percent"]:
        return {
            "_fetch_clause": with_offset(fetch),
            "_fetch_clause_options": original._fetch_clause_options,
        }
    return {}
