"""Pieces that are fetched after others, and only the rows that can meet those.

``orders.id = lines.order_id`` in a join means that of the lines none are needed but
those of the orders that were fetched. So where one of two joined pieces is known to be
small, the other is fetched second, with ``order_id = ANY(…)`` of what came first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import BinaryExpression
from sqlalchemy.sql import operators

from shardalchemy.planner.replaced import without_orm
from shardalchemy.planner.split import Need

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardalchemy.planner.scopes import Element, Scope
    from shardalchemy.planner.split import Piece

__all__ = ["LIMITED", "NARROWED", "PINNED", "WHOLE", "Fetched", "add_needs"]

LIMITED, PINNED, NARROWED, WHOLE = range(4)
"""How many rows a piece is likely to have, the fewest first."""


@dataclass(slots=True, eq=False)
class Fetched:
    """A piece that stands for one FROM element of a scope.

    ``columns`` are the places of the element's columns in the piece, by their names;
    ``narrows`` says that rows may be left out of it which no other row can meet.
    """

    piece: Piece
    scope: Scope
    element: Element
    columns: Mapping[str, int]
    size: int
    narrows: bool


def add_needs(fetched: Sequence[Fetched]) -> None:
    """Let pieces be fetched after those that say which of their rows are needed."""
    by_element = {(id(f.scope), hash(f.element.clause)): f for f in fetched}
    for scope in {id(f.scope): f.scope for f in fetched}.values():
        edges = [
            edge
            for criterion in scope.criteria
            for edge in _edges(scope, criterion, by_element)
        ]
        grown = True
        while grown:
            grown = False
            for target, column, source, index in edges:
                level = source.piece.level + 1
                if (
                    source.size < target.size
                    and not target.piece.needs
                    and (source.size < WHOLE or source.piece.needs)
                ):
                    target.piece.needs.append(Need(column, source.piece, index))
                    target.piece.level = level
                    target.size = min(target.size, NARROWED)
                    grown = True


def _edges(scope: Scope, criterion: Any, by_element: Mapping[Any, Fetched]) -> Any:
    """Yield what an equality says: target, its column, source, its column's place."""
    clause = criterion.clause
    if not (isinstance(clause, BinaryExpression) and clause.operator is operators.eq):
        return
    for one, other in (
        (clause.left, clause.right),
        (clause.right, clause.left),
    ):
        target = by_element.get((id(scope), hash(getattr(one, "table", None))))
        source = by_element.get((id(scope), hash(getattr(other, "table", None))))
        if (
            target is None
            or source is None
            or target is source
            or not target.narrows
            or id(target.element) not in criterion.before
        ):
            continue
        index = source.columns.get(other.name)
        if index is not None:
            yield target, without_orm(one), source, index
