"""How the scopes of a statement lie over the shards.

A scope is **local** if its FROM and WHERE, with all that is nested in them, give on
each shard just the rows that belong there, so that all shards' rows together are what
one server would have. For that it needs an **anchor**: an element without which no row
exists; every other sharded element must be colocated with it or attached to it.

A subquery in an expression, or a LATERAL one, may be any SQL as long as all its sharded
elements are attached to the row around it: then it sees all that it would see. One that
is compared by its key, ``key IN (SELECT key …)``, need not be correlated: what it finds
on other shards could not be equal.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import BinaryExpression, Select
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    CompoundSelect,
    ScalarSelect,
    SelectStatementGrouping,
)

from shardalchemy.planner.clauses import distinct_on
from shardalchemy.planner.functions import TRANSACTION_TIMES
from shardalchemy.planner.pins import Resolver, equal_is_same_slot, restrictions
from shardalchemy.planner.rowwise import is_limited, why_not_rows, why_not_whole
from shardalchemy.planner.slots import all_of
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardalchemy.planner.functions import Functions
    from shardalchemy.planner.pins import Restriction
    from shardalchemy.planner.scopes import Element, Noted, Scope
    from shardalchemy.planner.slots import SlotSet

__all__ = ["Layout", "expressions_of", "unreached", "upper_clauses"]

_BY_ORDER = frozenset(
    """
    aggregate_strings array_agg first_value json_agg json_object_agg jsonb_agg
    jsonb_object_agg lag last_value lead nth_value row_number string_agg xmlagg
    """.split()  # noqa: SIM905
)


class Layout:
    """The scopes of one statement, and what restricts their elements."""

    def __init__(self, noted: Noted, functions: Functions) -> None:
        self.noted = noted
        self.functions = functions
        self.resolver = Resolver(noted.scopes, functions)
        self.found = restrictions(noted.scopes, noted.places, self.resolver)

    @property
    def roots(self) -> list[Scope]:
        """The outermost scopes: one, or one for each SELECT of a set operation."""
        return [scope for scope in self.noted.scopes if scope.parent is None]

    @cached_property
    def _children(self) -> dict[int, list[Scope]]:
        found: dict[int, list[Scope]] = {}
        for scope in self.noted.scopes:
            if scope.parent is not None:
                found.setdefault(id(scope.parent), []).append(scope)
        return found

    def children(self, scope: Scope) -> list[Scope]:
        """Return the scopes that are rendered within *scope*."""
        return self._children.get(id(scope), [])

    def subtree(self, scope: Scope) -> list[Scope]:
        """Return *scope* and all scopes within it."""
        return [scope, *(s for c in self.children(scope) for s in self.subtree(c))]

    def sharded_in(self, scope: Scope) -> list[Restriction]:
        """Return the sharded elements of *scope* and of all within it."""
        inside = {id(s) for s in self.subtree(scope)}
        return [r for r in self.found if id(r.scope) in inside]

    def is_correlated(self, scope: Scope) -> bool:
        """Return whether *scope* names columns of a scope around it."""
        return any(
            self._is_outside(source, inner, scope)
            for inner in self.subtree(scope)
            for source, _ in inner.used
        )

    def _is_outside(self, source: int, inner: Scope, scope: Scope) -> bool:
        """Return whether what *inner* names by a hash is an element around *scope*.

        The innermost of that hash is meant: a table may be read at several levels.
        """
        around: Scope | None = inner
        within = True
        while around is not None:
            if any(hash(e.clause) == source for e in around.elements):
                return not within
            within = within and around is not scope
            around = around.parent
        return False

    @cached_property
    def tells_time(self) -> str | None:
        """The function by which shards would tell different times, or None."""
        for scope in self.noted.scopes:
            for part in _parts_of(scope):
                name = getattr(part, "name", None)
                if isinstance(part, FunctionElement) and name in TRANSACTION_TIMES:
                    return f"the function {name}()"
        return None

    def is_key(self, expression: Any, scope: Scope) -> bool:
        """Return whether *expression* tells the shard of each row of *scope*."""
        place = self.resolver.place(expression, scope)
        return place is not None and not place.blankable

    def why_not_rows(self, scope: Scope) -> str | None:
        """Return what keeps each row of *scope* from coming from one shard."""
        return why_not_rows(
            scope.select, scope.columns, self.functions, lambda e: self.is_key(e, scope)
        )

    def why_not_whole(self, scope: Scope, *, ordered: bool = False) -> str | None:
        """Return what keeps *scope* from being the concatenation of the shards' rows.

        Its FROM and WHERE are not looked at.
        """
        return why_not_whole(
            scope.select,
            scope.columns,
            self.functions,
            lambda e: self.is_key(e, scope),
            ordered=ordered,
        )

    def slots(self, root: Scope) -> SlotSet | None:
        """Return the slots in which rows of a local scope can be; None for all."""
        anchors, _ = self._anchored(root)
        return all_of({id(r.slots): r.slots for r in anchors if r.slots}.values())

    def why_not_local(self, root: Scope) -> str | None:
        """Return what keeps the FROM and WHERE of *root* from being local, or None."""
        inside = self.subtree(root)
        here = {id(s) for s in inside}
        reason = self._why_not_elements(inside)
        if reason is not None:
            return reason
        used = Counter(
            (id(element.subquery), id(scope) in here)
            for scope in self.noted.scopes
            for element in scope.elements
            if element.subquery is not None
        )
        for scope in inside:
            for subquery in (id(scope.original), id(scope.select)):
                if used[subquery, True] > 1 or (
                    used[subquery, False] and scope is not root
                ):
                    return "a CTE or subquery that is used more than once"
            if scope.has_full_join:
                return "a FULL JOIN"
            if scope is not root:
                reason = self._why_not_nested(scope, root)
                if reason is not None:
                    return reason
            parts = [*scope.froms, *getattr(scope.select, "_where_criteria", ())]
            if scope is not root:
                parts += upper_clauses(scope)
            reason = self.functions.why_not_by_shard(parts)
            if reason is not None:
                return reason
        anchors, missing = self._anchored(root)
        if not anchors:
            return "an outer join whose preserved side is a reference table"
        if missing:
            tables = sorted({str(r.element.table) for r in self.sharded_in(root)})
            return f"a join of {' and '.join(tables)}, which is not on equal shard keys"
        return None

    def _why_not_elements(self, inside: Sequence[Scope]) -> str | None:
        selects = {id(s) for scope in inside for s in (scope.original, scope.select)}
        for scope in inside:
            for element in scope.elements:
                table = element.table
                if table is not None and placement_of(table).kind is Kind.HOME:
                    return f"{table}, which lives on the home shard,"
                if any(id(s) not in selects for s in _branches(element.subquery)):
                    return "a CTE that is defined elsewhere"
        return None

    def _why_not_nested(self, scope: Scope, root: Scope) -> str | None:
        """Return what is wrong with a scope within a local one."""
        sharded = self.sharded_in(scope)
        if not sharded:
            return self._why_not_same_everywhere(scope)
        if self._is_attached_to_row(scope, sharded):
            return None
        if not scope.as_from:
            if self._compared(scope) is not None:
                return None
            return "a subquery over sharded tables"
        if scope.compound:
            return "a set operation"
        return self.why_not_whole(scope)

    def _why_not_same_everywhere(self, scope: Scope) -> str | None:
        """Return what might give one shard other rows of its copies than another."""
        if scope.compound:
            return "a set operation over reference tables"  # it may have a LIMIT
        if is_limited(scope.select):
            return "a LIMIT over reference tables"
        for column in scope.columns:
            for part in visitors.iterate(column):
                if isinstance(part, FunctionElement):
                    name = getattr(part, "name", "").lower()
                    if name in _BY_ORDER or (
                        self.functions.of_element(part) == "volatile"
                    ):
                        return f"the function {name}() over reference tables"
        return None

    def _is_attached_to_row(self, scope: Scope, sharded: Sequence[Restriction]) -> bool:
        """Return whether *scope* sees only rows that are where the row around it is."""
        if not self.is_correlated(scope):
            return False
        own = {id(r) for r in sharded}
        around = {r.group for r in self.found if id(r) not in own}
        return not unreached(sharded, around)

    def _compared(self, scope: Scope) -> Restriction | None:
        """Return the element of a row around whose key *scope*'s key is compared with.

        None where it is not, or where more than equal keys could matter.
        """
        parent = scope.parent
        if parent is None or scope.compound or len(scope.columns) != 1:
            return None
        for clause in _parts_of(parent):
            if not (
                isinstance(clause, BinaryExpression)
                and clause.operator in (operators.in_op, operators.not_in_op)
                and _select_in(clause.right) in (scope.original, scope.select)
            ):
                continue
            outer = self.resolver.place(clause.left, parent)
            inner = self.resolver.place(scope.columns[0], scope)
            if (
                outer is None
                or inner is None
                or outer.blankable
                or inner.blankable
                or not equal_is_same_slot(outer, inner)
                or self.why_not_whole(scope) is not None
                or self._anchored(scope)[1]
            ):
                return None
            return next(r for r in self.found if r.element is outer.element)
        return None

    def _anchored(self, root: Scope) -> tuple[list[Restriction], list[Restriction]]:
        """Return the anchors of *root*, and the elements that are not with them."""
        sharded = self.sharded_in(root)
        firm = [r for r in sharded if not self._may_lack(r, root)]
        compared = []
        for scope in self.subtree(root)[1:]:
            if not scope.as_from and not self.is_correlated(scope):
                outer = self._compared(scope)
                if outer is not None:
                    compared.append((self.sharded_in(scope), outer))
        best: list[Restriction] = sharded
        for group in dict.fromkeys(r.group for r in firm):
            together = {group}
            for _ in range(len(compared) + 1):
                missing = unreached(sharded, together)
                for inside, outer in compared:
                    if outer.group in together:
                        together |= {r.group for r in inside}
            if len(missing) < len(best) or not missing:
                best = missing
            if not missing:
                return [r for r in firm if r.group == group], []
        return firm, best

    def _may_lack(self, restriction: Restriction, root: Scope) -> bool:
        """Return whether a row of *root* may be without a row of this element."""
        if restriction.element.nullable:
            return True
        scope = restriction.scope
        while scope is not root:
            holder = self.holder(scope)
            if scope.parent is None or holder is None or holder.nullable:
                return True
            scope = scope.parent
        return False

    def holder(self, scope: Scope) -> Element | None:
        """Return the element of the scope around that is this subquery."""
        if scope.parent is None or scope.compound:
            return None
        for element in scope.parent.elements:
            if element.subquery is scope.original or element.subquery is scope.select:
                return element
        return None


def unreached(sharded: Sequence[Restriction], together: set[int]) -> list[Restriction]:
    """Return the elements that nothing attaches to the groups *together*.

    *together* grows by the groups that are reached.
    """
    grown = True
    while grown:
        attached = {r.group for r in sharded if r.attached_to & together}
        grown = not attached <= together
        together |= attached
    return [r for r in sharded if r.group not in together]


def upper_clauses(scope: Scope) -> list[Any]:
    """Return what is evaluated above a scope's FROM and WHERE."""
    select = scope.select
    return [
        *scope.columns,
        *distinct_on(select),
        *getattr(select, "_group_by_clauses", ()),
        *getattr(select, "_having_criteria", ()),
        *getattr(select, "_order_by_clauses", ()),
    ]


def expressions_of(scope: Scope) -> list[Any]:
    """Return all clauses of a scope."""
    where = getattr(scope.select, "_where_criteria", ())
    return [*scope.froms, *where, *upper_clauses(scope)]


def _parts_of(scope: Scope) -> Iterator[Any]:
    for clause in expressions_of(scope):
        yield from visitors.iterate(clause)


def _branches(subquery: Any) -> Iterator[Any]:
    """Yield the SELECTs of a subquery: one, or those of a set operation."""
    if isinstance(subquery, SelectStatementGrouping):
        yield from _branches(subquery.element)
    elif isinstance(subquery, CompoundSelect):
        for select in subquery.selects:
            yield from _branches(select)
    elif subquery is not None:
        yield subquery


def _select_in(clause: Any) -> Any:
    while isinstance(clause, Grouping | SelectStatementGrouping | ScalarSelect):
        clause = clause.element
    return clause if isinstance(clause, Select | CompoundSelect) else None
