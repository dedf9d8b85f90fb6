"""Aggregates in two steps: each shard's own, and what is made of all of them.

A count is the sum of counts, an average the sum of sums over the sum of counts; by
PostgreSQL's own arithmetic, so that scale and rounding are as on one server. The
shards group by the same expressions, the combining SELECT groups their groups. What
stands above aggregates, HAVING, windows, ORDER BY, is done there as it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Float,
    Integer,
    Numeric,
    Select,
    cast,
    func,
    select,
    type_coerce,
)
from sqlalchemy import types as sa_types
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    ColumnClause,
    FunctionFilter,
    Label,
    Over,
    UnaryExpression,
    WithinGroup,
    _label_reference,
    _textual_label_reference,
    literal_column,
)
from sqlalchemy.sql.functions import Function, FunctionElement

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.clauses import distinct_on, has_extension, limited_as
from shardalchemy.planner.layout import upper_clauses
from shardalchemy.planner.replaced import (
    Lookup,
    columns_in,
    named_output,
    sub_selects,
    without_orm,
)
from shardalchemy.planner.split import Piece, Rows, TypeNamed, worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import ColumnElement

    from shardalchemy.planner.functions import Functions
    from shardalchemy.planner.scopes import Scope
    from shardalchemy.planner.slots import SlotSet
    from shardalchemy.planner.split import ColumnType

__all__ = ["combined", "functional_keys", "is_dedupable"]

# Aggregates of aggregates: the same function again.
_SAME = frozenset(
    "any_value bit_and bit_or bit_xor bool_and bool_or every max min".split()  # noqa: SIM905
)
_REPEATABLE = _SAME - {"bit_xor", "any_value"}


def combined(
    scope: Scope,
    name: str,
    slots: SlotSet | None,
    names: Sequence[str | None],
    functions: Functions,
) -> tuple[Piece, Callable[[Any], Select[Any]]] | None:
    """Return the piece of a scope with aggregates, and what makes its combining SELECT.

    None where one of its aggregates, or an expression above them, cannot be had in two
    steps.
    """
    original = scope.select
    outputs = [without_orm(c) for c in scope.columns]

    def resolved(clauses: Sequence[Any]) -> list[Any]:
        return [_resolved(without_orm(c), outputs, scope) for c in clauses]

    by = resolved(original._group_by_clauses)
    having = resolved(original._having_criteria)
    apart = resolved(distinct_on(original))
    order = resolved(original._order_by_clauses)
    clauses = [*outputs, *by, *having, *apart, *order]
    if (
        original._for_update_arg is not None
        or sub_selects(clauses)
        or original._prefixes
        or original._suffixes
        or original._hints
        or original._statement_hints
        or original._independent_ctes
        or has_extension(original)
        or any(_is_textual(c) for c in clauses)
    ):
        return None
    groups = _groups(by, functions)
    if groups is None:
        return None
    keys = functional_keys(scope, by)
    groups += keys
    parts = _Parts(functions)
    try:
        for index, group in enumerate(groups):
            parts.add_group(group, f"g{index}")
        for clause in clauses:
            parts.collect(clause)
    except _NotInTwoSteps:
        return None
    if not parts.aggregates and not groups:
        return None
    columns = [*(g.label(f"g{i}") for i, g in enumerate(groups)), *parts.columns]
    grouped = {"_group_by_clauses": tuple(groups)} if groups else {}
    piece = Piece(
        name,
        worker(columns, scope.froms, original._where_criteria, **grouped),
        tuple(c.name for c in columns),
        slots,
        "partial aggregates" if parts.aggregates else "groups",
    )
    types = [c.type for c in columns]

    def combine(told: Mapping[str, Sequence[ColumnType]]) -> Select[Any]:
        rows = Rows(piece, types)
        named = dict(zip(piece.columns, (t.name for t in told[name]), strict=True))
        write = parts.writer(rows, named)
        final: Any = select(
            *(
                write(c.element if isinstance(c, Label) else c).label(
                    label if label is not None else f"c{i}"
                )
                for i, (c, label) in enumerate(zip(outputs, names, strict=True))
            )
        ).select_from(rows)
        # A primary key that is grouped by brings columns with it that `by` lacks.
        final = final.group_by(*map(write, by), *map(write, keys))
        final = final.having(*map(write, having))
        final._distinct = bool(original._distinct)
        final._distinct_on = tuple(map(write, apart))
        final = final.order_by(*map(write, order))
        return limited_as(final, original)  # type: ignore[no-any-return]

    return piece, combine


_SETS = frozenset({"rollup", "cube", "grouping_sets"})


class _NotInTwoSteps(Exception):
    """An expression cannot be combined from partial results."""


class _Parts:
    """The groups and partial aggregates that a shard computes."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._groups = Lookup()
        self._partials = Lookup()
        self.columns: list[Any] = []
        self.aggregates = False

    def add_group(self, group: Any, name: str) -> None:
        self._groups.add(group, name)

    def collect(self, clause: Any) -> None:
        """Find the aggregates in *clause*, and make columns of their parts.

        Raises _NotInTwoSteps where something is neither group nor aggregate.
        """
        _walk(clause, self._functions, self._collected)

    def _collected(self, element: Any) -> bool:
        if self._groups.find(element) is not None:
            return True
        if _is_aggregate(element, self._functions):
            self.aggregates = True
            for part in _partials(element):
                if self._partials.find(part) is None:
                    label = f"a{len(self.columns)}"
                    self._partials.add(part, label)
                    self.columns.append(part.label(label))
            return True
        if getattr(element, "table", None) is not None:
            raise _NotInTwoSteps
        return False

    def writer(self, rows: Rows, types: Mapping[str, str]) -> Callable[[Any], Any]:
        """Return what rewrites an expression over *rows*."""

        def write(expression: Any) -> Any:
            windowed = _windowed(expression)

            def replace(element: Any, **_: Any) -> Any:
                if id(element) in windowed:
                    return None
                name = self._groups.find(element) if _is_expression(element) else None
                if name is not None:
                    return rows.c[name]
                if _is_aggregate(element, self._functions):
                    return self._combined(element, rows, types)
                return None

            return visitors.replacement_traverse(expression, {}, replace)

        return write

    def _combined(self, element: Any, rows: Rows, types: Mapping[str, str]) -> Any:
        names = [self._partials.find(part) for part in _partials(element)]
        parts: list[Any] = [rows.c[name] for name in names if name is not None]
        function = element.func if isinstance(element, FunctionFilter) else element
        kind = function.name.lower()
        if kind == "count":
            total = cast(func.sum(parts[0]), BigInteger)
            return func.coalesce(total, literal_column("0", BigInteger()))
        own_type = types[str(names[0])]
        if kind == "sum":
            total = cast(func.sum(parts[0]), TypeNamed(own_type))
            return type_coerce(total, element.type)
        if kind == "avg":
            count = func.nullif(
                cast(func.sum(parts[1]), BigInteger), literal_column("0")
            )
            if own_type in ("bigint", "numeric"):
                total = cast(func.sum(parts[0]), sa_types.Numeric)
                return _divided(total, cast(count, sa_types.Numeric))
            if own_type == "double precision":
                return _divided(func.sum(parts[0]), cast(count, sa_types.Double))
            raise UnsupportedQueryError(
                f"avg() of values whose sum is a {own_type} is not combined over"
                " shards. Select sum() and count(), and divide them yourself."
            )
        return Function(function.name, parts[0], type_=element.type)


def _divided(total: Any, count: Any) -> ColumnElement[Any]:
    # SQLAlchemy's `/` would add casts of its own.
    return total.op("/", precedence=8)(count)  # type: ignore[no-any-return]


def _partials(element: Any) -> list[Any]:
    """Return what each shard computes of an aggregate; raise where nothing will do."""
    function = element
    if isinstance(element, FunctionFilter):
        function = element.func
    if (
        not isinstance(function, Function | FunctionElement)
        or isinstance(element, WithinGroup)
        or isinstance(function, WithinGroup)
    ):
        raise _NotInTwoSteps
    kind = getattr(function, "name", "").lower()
    arguments = list(function.clauses)
    if any(_is_special(argument) for argument in arguments):
        raise _NotInTwoSteps

    def filtered(made: Any) -> Any:
        if isinstance(element, FunctionFilter):
            return made.filter(element.criterion)
        return made

    if kind == "count" or kind == "sum" or kind in _SAME:
        return [element]
    if kind == "avg" and len(arguments) == 1:
        (argument,) = arguments
        if isinstance(argument.type, Float):
            argument = cast(argument, sa_types.Double)
        elif not isinstance(argument.type, Integer | Numeric):
            raise _NotInTwoSteps
        return [
            filtered(Function("sum", argument, type_=argument.type)),
            filtered(Function("count", argument, type_=BigInteger())),
        ]
    raise _NotInTwoSteps


def _is_special(argument: Any) -> bool:
    """Return whether an aggregate's argument has DISTINCT or ORDER BY."""
    if isinstance(argument, UnaryExpression) and (
        argument.operator is operators.distinct_op
    ):
        return True
    name = type(argument).__name__
    return "aggregate_order" in name or "AggregateOrder" in name


def _is_aggregate(element: Any, functions: Functions) -> bool:
    if isinstance(element, FunctionFilter):
        return not isinstance(element.func, Over)
    if isinstance(element, WithinGroup):
        return True
    if isinstance(element, FunctionElement):
        name = getattr(element, "name", None)
        return bool(name) and functions.of_element(element) == "aggregate"
    return "AggregateOrderBy" in type(element).__name__


def _windowed(expression: Any) -> set[int]:
    """Return the ids of functions that stand before an OVER: they aggregate nothing."""
    found: set[int] = set()
    for part in visitors.iterate(expression):
        if isinstance(part, Over):
            found.add(id(part.element))
            if isinstance(part.element, FunctionFilter):
                found.add(id(part.element.func))
    return found


def _walk(element: Any, functions: Functions, visit: Callable[[Any], bool]) -> None:
    """Call *visit* for an expression's parts, and go into those it says False of."""
    windowed = _windowed(element)

    def walk(part: Any) -> None:
        if id(part) in windowed or not visit(part):
            for child in part.get_children():
                walk(child)

    walk(element)


def _resolved(clause: Any, outputs: Sequence[Any], scope: Scope) -> Any:
    """Return a clause with the expressions themselves for references to columns.

    What names no one column stays as it is.
    """
    if isinstance(clause, _textual_label_reference):
        found = named_output(clause.element, outputs, scope)
        return clause if found is None else _resolved(found, outputs, scope)
    if isinstance(clause, _label_reference | Label):
        return _resolved(clause.element, outputs, scope)
    if isinstance(clause, UnaryExpression) and clause.modifier is not None:
        return UnaryExpression(
            _resolved(clause.element, outputs, scope), modifier=clause.modifier
        )
    return clause


def _is_expression(element: Any) -> bool:
    return hasattr(element, "type") and hasattr(element, "_generate_cache_key")


def _is_textual(clause: Any) -> bool:
    return any(
        part.__visit_name__ in ("textclause", "textual_label_reference")
        or (isinstance(part, ColumnClause) and part.table is None and part.name != "*")
        for part in visitors.iterate(clause)
    )


def _groups(by: Sequence[Any], functions: Functions) -> list[Any] | None:
    """Return the expressions by which the shards group, or None.

    Of GROUPING SETS, ROLLUP and CUBE, all that they mention: the finest groups.
    """
    found: list[Any] = []
    known = Lookup()

    def add(clause: Any) -> None:
        name = str(getattr(clause, "name", ""))
        is_sets = isinstance(clause, FunctionElement) and name.lower() in _SETS
        if is_sets or clause.__visit_name__ in ("clauselist", "tuple", "grouping"):
            for child in clause.get_children():
                add(child)
        elif known.find(clause) is None:
            known.add(clause, "known")
            found.append(clause)

    for clause in by:
        add(clause)
    if any(_is_aggregate(g, functions) for g in found):
        return None
    return found


def functional_keys(scope: Scope, groups: Sequence[Any]) -> list[Any]:
    """Return the columns that a GROUP BY of a table's primary key brings with it.

    None where it has grouping sets: in some of them the key is not among the groups.
    """
    found: list[Any] = []
    by = {
        (hash(c.table), c.key) for c in groups if getattr(c, "table", None) is not None
    }
    if len(groups) > len(by) and any(map(_has_sets, groups)):
        return []
    for element in scope.elements:
        table = element.table
        if table is None or not table.primary_key.columns:
            continue
        own = hash(element.clause)
        if all((own, c.key) in by for c in table.primary_key):
            used = {
                (hash(c.table), c.key): c
                for c in columns_in(map(without_orm, upper_clauses(scope)))
            }
            found += [c for key, c in used.items() if key[0] == own and key not in by]
    return found


def _has_sets(clause: Any) -> bool:
    return any(
        isinstance(part, FunctionElement)
        and str(getattr(part, "name", "")).lower() in _SETS
        for part in visitors.iterate(clause)
    )


def is_dedupable(scope: Scope, functions: Functions) -> bool:
    """Return whether equal rows below a scope's aggregates may be sent once."""
    seen = False
    for clause in upper_clauses(scope):
        windowed = _windowed(clause)
        if windowed:
            return False
        inside: set[int] = set()
        for part in visitors.iterate(clause):
            if isinstance(part, FunctionFilter):
                inside.add(id(part.func))
            if not _is_aggregate(part, functions):
                continue
            seen = True
            if isinstance(part, FunctionFilter):
                continue
            if not isinstance(part, FunctionElement):
                return False
            distinct = [
                a
                for a in part.clauses
                if isinstance(a, UnaryExpression)
                and a.operator is operators.distinct_op
            ]
            name = str(getattr(part, "name", "")).lower()
            if not distinct and name not in _REPEATABLE:
                return False
    return seen
