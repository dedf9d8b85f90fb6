"""Every SELECT of a statement as PostgreSQL will see it.

The ORM turns a statement into another one while it is compiled: it adds eager joins,
loader criteria, subqueries around a LIMIT. So the statement is compiled once with a
compiler that notes each SELECT at the moment it is rendered, with the FROM elements
that are left after correlation. What was noted is a `Scope`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import CTE, Alias, Delete, Join, Lateral, Subquery, Table, Update
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import (
    BooleanClauseList,
    ColumnClause,
    Grouping,
    TextClause,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import BindParameter, ColumnElement, FromClause
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

__all__ = ["Criterion", "Element", "Scope", "conjuncts", "noted_scopes"]


@dataclass(slots=True, eq=False)
class Element:
    """One item of a FROM clause; ``nullable`` where an outer join may blank it."""

    clause: FromClause
    nullable: bool = False

    @property
    def table(self) -> Table | None:
        """The table it reads, directly or through an alias."""
        clause: Any = self.clause
        while isinstance(clause, Alias):
            clause = clause.element
        return clause if isinstance(clause, Table) else None

    @property
    def subquery(self) -> Any:
        """The SELECT it reads, or None; of a CTE, the one it names."""
        clause: Any = self.clause
        while isinstance(clause, Alias):
            clause = clause.element
        is_select = isinstance(clause, CTE | Subquery | Lateral)
        return clause.element if is_select else None


@dataclass(slots=True, eq=False)
class Criterion:
    """One ANDed condition, and the elements of its scope whose rows it filters."""

    clause: ColumnElement[Any]
    filters: frozenset[int]  # ids of Elements


@dataclass(slots=True, eq=False)
class Scope:
    """One SELECT as rendered.

    ``parent`` is the scope it is rendered in; ``as_from`` says that it stands in its
    parent's FROM clause (or is a CTE), rather than in an expression.
    """

    select: Any
    original: Any
    parent: Scope | None
    as_from: bool
    compound: bool
    elements: list[Element] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=list)
    has_full_join: bool = False

    def element_of(self, clause: Any) -> Element | None:
        """Return this scope's element that *clause* is, itself or as annotated."""
        for element in self.elements:
            if element.clause is clause or hash(element.clause) == hash(clause):
                return element
        return None


def conjuncts(clause: Any) -> Iterator[Any]:
    """Yield the conditions that *clause* joins by AND."""
    while isinstance(clause, Grouping):
        clause = clause.element
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        for part in clause.clauses:
            yield from conjuncts(part)
    else:
        yield clause


_LOOSE = re.compile(r"--|/\*|;|\bor\b", re.IGNORECASE)


def is_loose_text(clause: Any) -> bool:
    """Return whether *clause* is plain SQL that may reach beyond its place.

    SQLAlchemy joins it to its neighbours by AND without parentheses, so an OR within
    it, a comment or a parenthesis too many changes what they mean.
    """
    while isinstance(clause, Grouping):
        clause = clause.element
    if isinstance(clause, TextClause):
        text = clause.text
    elif isinstance(clause, ColumnClause) and clause.is_literal:
        text = clause.name
    else:
        return False
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return True
    return depth != 0 or "'" in text or _LOOSE.search(text) is not None


class _Noting(SQLCompiler):
    """What makes a dialect's compiler note each SELECT that it renders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.scopes: list[Scope] = []
        self._around: list[Scope | None] = [None]
        self._pending: list[tuple[Any, bool, bool]] = []
        self.extra_froms: list[Any] = []
        super().__init__(*args, **kwargs)

    def visit_select(self, select_stmt: Any, asfrom: bool = False, **kw: Any) -> Any:  # type: ignore[override]
        compound = kw.get("compound_index") is not None
        self._pending.append((select_stmt, asfrom, compound))
        depth = len(self._around)
        try:
            return super().visit_select(select_stmt, asfrom=asfrom, **kw)  # type: ignore[no-untyped-call]
        finally:
            if len(self._around) > depth:
                self._around.pop()
            else:
                self._pending.pop()

    def _setup_select_stack(
        self, select: Any, compile_state: Any, entry: Any, asfrom: Any, *rest: Any
    ) -> Any:
        # The first step that knows both the final SELECT and its FROM elements, and it
        # comes before anything inside is rendered.
        froms = super()._setup_select_stack(  # type: ignore[no-untyped-call]
            select, compile_state, entry, asfrom, *rest
        )
        original, as_from, compound = self._pending.pop()
        scope = Scope(select, original, self._around[-1], as_from, compound)
        for clause in froms:
            _add_from(scope, clause, nullable=False)
        _add_where(scope, select._where_criteria)
        if select._suffixes or select._prefixes or _has_hints(select):
            scope.criteria.clear()  # plain SQL that may change what they mean
        self.scopes.append(scope)
        self._around.append(scope)
        return froms

    def update_from_clause(
        self,
        update_stmt: Any,
        from_table: Any,
        extra_froms: Any,
        from_hints: Any,
        **kw: Any,
    ) -> Any:
        self.extra_froms.extend(extra_froms)
        return super().update_from_clause(  # type: ignore[no-untyped-call]
            update_stmt, from_table, extra_froms, from_hints, **kw
        )

    def delete_extra_from_clause(
        self,
        delete_stmt: Any,
        from_table: Any,
        extra_froms: Any,
        from_hints: Any,
        **kw: Any,
    ) -> Any:
        self.extra_froms.extend(extra_froms)
        return super().delete_extra_from_clause(  # type: ignore[no-untyped-call]
            delete_stmt, from_table, extra_froms, from_hints, **kw
        )


def _has_hints(select: Any) -> bool:
    return bool(select._hints or select._statement_hints)


def _add_where(scope: Scope, criteria: Any) -> None:
    """Add the conditions of a WHERE to *scope*, unless loose text is among them."""
    parts = [part for criterion in criteria for part in conjuncts(criterion)]
    if any(is_loose_text(part) for part in parts):
        return
    everything = frozenset(id(element) for element in scope.elements)
    scope.criteria.extend(Criterion(part, everything) for part in parts)


@cache
def _noting(compiler: Any) -> type[_Noting]:
    return type(f"Noting{compiler.__name__}", (_Noting, compiler), {})


def _add_from(scope: Scope, clause: Any, *, nullable: bool) -> list[Element]:
    """Add the elements of one FROM item, and the criteria of its joins, to *scope*."""
    while isinstance(clause, Grouping) or clause.__visit_name__ == "grouping":
        clause = clause.element
    if not isinstance(clause, Join):
        element = Element(clause, nullable)
        scope.elements.append(element)
        return [element]
    scope.has_full_join |= clause.full
    outer = clause.isouter or clause.full
    left = _add_from(scope, clause.left, nullable=nullable or clause.full)
    right = _add_from(scope, clause.right, nullable=nullable or outer)
    filtered = [] if clause.full else right if outer else [*left, *right]
    filters = frozenset(id(element) for element in filtered)
    if clause.onclause is not None:
        parts = list(conjuncts(clause.onclause))
        if not any(is_loose_text(part) for part in parts):
            scope.criteria.extend(Criterion(part, filters) for part in parts)
    return [*left, *right]


def noted_scopes(
    statement: Any, dialect: Dialect, cache_key: CacheKey | None
) -> tuple[list[Scope], Mapping[int, int] | None]:
    """Compile *statement* and return its scopes, outermost first.

    An UPDATE or DELETE is a scope as well, of its table and those it reads beside.
    The second value maps ``id(parameter)`` of each bound parameter rendered to its
    place in the cache key; it is None where there is no key.
    """
    make: Any = dialect.statement_compiler
    compiler = _noting(make)(dialect, statement, cache_key=cache_key)
    if isinstance(statement, Update | Delete):
        target = Scope(statement, statement, None, as_from=False, compound=False)
        for clause in (statement.table, *compiler.extra_froms):
            _add_from(target, clause, nullable=False)
        _add_where(target, statement._where_criteria)
        for scope in compiler.scopes:
            scope.parent = scope.parent or target
        compiler.scopes.insert(0, target)
    if cache_key is None:
        return compiler.scopes, None
    places: dict[int, int] = {}
    matches: Any = compiler._cache_key_bind_match
    if matches is not None:
        order: dict[BindParameter[Any], int] = {
            parameter: i for i, parameter in enumerate(cache_key.bindparams)
        }
        for parameter, rendered in matches[0].items():
            for one in rendered:
                places[id(one)] = order[parameter]
    return compiler.scopes, places
