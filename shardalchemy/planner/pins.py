"""What restricts each sharded element of a statement to which slots.

The elements are the sharded tables of all its scopes. An element is **restricted** by
a criterion that filters its rows: ``pin = value``, ``pin IN (…)``, an OR of such, or
equality with the pin of another element that is restricted itself. A criterion in the
ON of a LEFT JOIN filters the right side only; one of a FULL JOIN filters nothing.
Columns of a subquery or CTE are followed down to the table they come from; a criterion
outside filters rows inside only where the subquery is row-wise.

Equality in pins of one family **colocates** two elements: each row meets its partners
on its own shard. Where a criterion filters only one of the two, as in the ON of a LEFT
JOIN, that one is **attached** to the other: it has to be where the other is, but says
nothing of a third that it is compared with as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import BindParameter, Column, TypeDecorator
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BooleanClauseList,
    False_,
    Grouping,
    Label,
    Null,
)

from shardalchemy.planner.rowwise import why_not_whole
from shardalchemy.planner.scopes import Element, Scope, conjuncts, is_loose_text
from shardalchemy.planner.slots import AnyOf, Nowhere, SlotSet, Value, all_of
from shardalchemy.schema import Kind, Pin, key_family, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardalchemy.planner.functions import Functions

__all__ = [
    "Place",
    "Resolver",
    "Restriction",
    "compared_alike",
    "equal_is_same_slot",
    "restrictions",
]


@dataclass(frozen=True, slots=True)
class Place:
    """A pinning column of a sharded element, as some expression names it.

    ``outermost`` is the element of the expression's own scope; ``filters_inside`` says
    whether a criterion there filters rows of ``element`` within, and ``blankable``
    whether the value may be NULL though the row exists, or without a row.
    """

    element: Element
    scope: Scope
    pin: Pin
    column: Column[Any]
    outermost: Element
    filters_inside: bool
    blankable: bool


@dataclass(slots=True, eq=False)
class Restriction:
    """A sharded element and the slots its rows can be in.

    ``group`` is equal for elements that are colocated, ``attached_to`` holds the groups
    that this element is attached to.
    """

    element: Element
    scope: Scope
    slots: SlotSet | None
    group: int
    attached_to: set[int] = field(default_factory=set)


class Resolver:
    """Finds the sharded table's column behind an expression."""

    def __init__(self, scopes: Sequence[Scope], functions: Functions) -> None:
        self._functions = functions
        self._by_select: dict[int, Scope] = {}
        self._references = Counter(
            id(element.subquery) for scope in scopes for element in scope.elements
        )
        for scope in scopes:
            self._by_select.setdefault(id(scope.original), scope)
            self._by_select.setdefault(id(scope.select), scope)

    def place(self, expression: Any, scope: Scope | None) -> Place | None:
        """Return what *expression*, standing in *scope*, names, or None."""
        while isinstance(expression, Grouping | Label):
            expression = expression.element
        source = getattr(expression, "table", None)
        if source is None:
            return None
        while scope is not None:
            element = scope.element_of(source)
            if element is not None:
                return self._inside(expression, element, scope)
            scope = scope.parent  # a correlated column belongs to a scope around
        return None

    def _inside(self, column: Any, element: Element, scope: Scope) -> Place | None:
        table = element.table
        if table is not None:
            placement = placement_of(table)
            base = table.c.get(column.key)
            if base is None:
                base = next((c for c in table.c if c.name == column.name), None)
            pin = None if base is None else placement.pins.get(base.key)
            if pin is None or base is None:
                return None
            blankable = element.nullable or bool(base.nullable)
            return Place(element, scope, pin, base, element, True, blankable)
        inner = self._by_select.get(id(element.subquery))
        if inner is None or inner.compound:
            return None
        for source in column._proxies:
            found = self.place(source, inner)
            if found is not None:
                # A criterion on one use of a CTE says nothing of its other uses; one
                # on what DISTINCT or GROUP BY compares may as well come before it.
                filters_inside = (
                    found.filters_inside
                    and self._references[id(element.subquery)] == 1
                    and why_not_whole(
                        inner.select,
                        inner.columns,
                        self._functions,
                        partial(self._is_same, found, inner),
                    )
                    is None
                )
                return replace(
                    found,
                    outermost=element,
                    filters_inside=filters_inside,
                    blankable=found.blankable or element.nullable,
                )
        return None

    def _is_same(self, place: Place, scope: Scope, expression: Any) -> bool:
        """Return whether *expression* names that place's column, of the same row."""
        other = self.place(expression, scope)
        return (
            other is not None
            and other.element is place.element
            and other.column is place.column
        )


def restrictions(
    scopes: Sequence[Scope], places: Mapping[int, int] | None, resolver: Resolver
) -> list[Restriction]:
    """Return every sharded element of *scopes* with what restricts it."""
    found = [
        Restriction(element, scope, None, index)
        for index, (element, scope) in enumerate(
            (element, scope)
            for scope in scopes
            for element in scope.elements
            if element.table is not None
            and placement_of(element.table).kind is Kind.SHARDED
        )
    ]
    by_element = {id(r.element): r for r in found}
    direct: dict[int, list[SlotSet]] = {}
    edges: list[tuple[Restriction, Restriction, bool]] = []
    for scope in scopes:
        for criterion in scope.criteria:
            for place, slots in _pinned(criterion.clause, scope, resolver, places):
                if _filters(criterion.filters, place):
                    direct.setdefault(id(place.element), []).append(slots)
            for here, there in _equalities(criterion.clause, scope, resolver):
                target = by_element[id(here.element)]
                source = by_element[id(there.element)]
                if target is not source and _filters(criterion.filters, here):
                    both = _filters(criterion.filters, there)
                    edges.append((target, source, both))
    for restriction in found:
        restriction.slots = all_of(direct.get(id(restriction.element), ()))
    _propagate(found, edges)
    return found


def _filters(filtered: frozenset[int], place: Place) -> bool:
    """Return whether a criterion on *filtered* elements filters *place*'s rows."""
    return place.filters_inside and id(place.outermost) in filtered


def _propagate(
    found: list[Restriction], edges: list[tuple[Restriction, Restriction, bool]]
) -> None:
    """Carry slots along equalities, and join the groups they connect."""
    changed = True
    while changed:
        changed = False
        for target, source, both in edges:
            if target.slots is None and source.slots is not None:
                target.slots = source.slots
                changed = True
            if both and target.group != source.group:
                gone, kept = sorted((target.group, source.group), reverse=True)
                for restriction in found:
                    if restriction.group == gone:
                        restriction.group = kept
                changed = True
    for target, source, both in edges:
        if not both:
            target.attached_to.add(source.group)


def _pinned(
    clause: Any, scope: Scope, resolver: Resolver, places: Mapping[int, int] | None
) -> Iterator[tuple[Place, SlotSet]]:
    """Yield the places that *clause* restricts, with the slots it allows."""
    while isinstance(clause, Grouping):
        clause = clause.element
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.or_:
        yield from _pinned_by_all(clause.clauses, scope, resolver, places)
        return
    if not isinstance(clause, BinaryExpression):
        return
    left: Any = clause.left
    right: Any = clause.right
    if clause.operator is operators.eq and isinstance(left, BindParameter):
        left, right = right, left
    place = resolver.place(left, scope)
    if place is None:
        return
    if clause.operator is operators.is_ and isinstance(right, Null):
        # A nullable column, or an outer join, is NULL without moving the row.
        if not place.blankable:
            yield place, Nowhere()
        return
    parameter: Any = right
    while isinstance(parameter, Grouping):
        parameter = parameter.element
    if not isinstance(parameter, BindParameter):
        return
    wanted = operators.in_op if parameter.expanding else operators.eq
    if clause.operator is not wanted or not compared_alike(place.column, parameter):
        return
    if places is None:
        yield place, Value(place.pin.slot, None, parameter, parameter.expanding)
    elif id(parameter) in places:
        # One that the cache key does not know could not be read again next time.
        index = places[id(parameter)]
        yield place, Value(place.pin.slot, index, parameter, parameter.expanding)


def _pinned_by_all(
    branches: Sequence[Any],
    scope: Scope,
    resolver: Resolver,
    places: Mapping[int, int] | None,
) -> Iterator[tuple[Place, SlotSet]]:
    """Yield what every branch of an OR restricts."""
    per_branch: list[dict[int, tuple[Place, SlotSet]]] = []
    for branch in branches:
        if isinstance(branch, False_):
            continue
        found: dict[int, tuple[Place, SlotSet]] = {}
        for part in conjuncts(branch):
            if is_loose_text(part):
                found.clear()
                break
            for place, slots in _pinned(part, scope, resolver, places):
                if place.filters_inside:
                    found.setdefault(id(place.element), (place, slots))
        per_branch.append(found)
    if not per_branch:
        return
    for key in set(per_branch[0]).intersection(*per_branch[1:]):
        place = per_branch[0][key][0]
        yield place, AnyOf(tuple(found[key][1] for found in per_branch))


def compared_alike(column: Column[Any], parameter: Any) -> bool:
    """Return whether PostgreSQL compares the two in the column's own type."""
    if isinstance(column.type, TypeDecorator) or isinstance(
        parameter.type, TypeDecorator
    ):
        return type(column.type) is type(parameter.type)
    family = key_family(column.type)
    return family is not None and family == key_family(parameter.type)


def _equalities(
    clause: Any, scope: Scope, resolver: Resolver
) -> Iterator[tuple[Place, Place]]:
    """Yield pairs of places, each time first the one that may be filtered."""
    while isinstance(clause, Grouping):
        clause = clause.element
    if not (isinstance(clause, BinaryExpression) and clause.operator is operators.eq):
        return
    left = resolver.place(clause.left, scope)
    right = resolver.place(clause.right, scope)
    if left is None or right is None or not equal_is_same_slot(left, right):
        return
    yield left, right
    yield right, left


def equal_is_same_slot(left: Place, right: Place) -> bool:
    """Return whether two columns that are equal name the same slot."""
    types = (left.column.type, right.column.type)
    if any(isinstance(t, TypeDecorator) for t in types) and type(types[0]) is not type(
        types[1]
    ):
        # Stored values are compared, but each side's parameters convert their own way.
        return False
    return left.pin.family == right.pin.family
