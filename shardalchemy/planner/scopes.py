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

from sqlalchemy import (
    CTE,
    Alias,
    Delete,
    Join,
    Lateral,
    SelectBase,
    Subquery,
    Table,
    Update,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import (
    BooleanClauseList,
    ColumnClause,
    Grouping,
    TextClause,
)

from shardalchemy.planner.clauses import has_extension

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sqlalchemy import BindParameter, ColumnElement, FromClause
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

__all__ = [
    "Criterion",
    "Element",
    "Noted",
    "Noting",
    "Scope",
    "conjuncts",
    "noted_scopes",
    "noting",
    "parameter_names",
    "parameters_in",
]


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
        while isinstance(clause, Alias | CTE | Subquery | Lateral):
            clause = clause.element
        return clause if isinstance(clause, SelectBase) else None


@dataclass(slots=True, eq=False)
class Criterion:
    """One ANDed condition, and the elements of its scope whose rows it filters.

    It may filter those in ``before`` by itself, before any join: the others are NULL
    in rows without a partner, of which it has its say as well.
    """

    clause: ColumnElement[Any]
    filters: frozenset[int]  # ids of Elements
    before: frozenset[int]


@dataclass(slots=True, eq=False)
class Scope:
    """One SELECT as rendered.

    ``parent`` is the scope it is rendered in, ``index`` counts the scopes as they are
    met. ``as_from`` says that it stands in its parent's FROM clause (or is a CTE),
    rather than in an expression. ``used`` holds what its own expressions name: the
    hash of each FROM element with the name of a column. ``is_loose`` says that plain
    SQL in it may change what its criteria mean.
    """

    select: Any
    original: Any
    parent: Scope | None
    as_from: bool
    compound: bool
    index: int = 0
    froms: tuple[Any, ...] = ()
    columns: tuple[Any, ...] = ()
    elements: list[Element] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)
    has_full_join: bool = False
    is_loose: bool = False

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


class Noting(SQLCompiler):
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
        scope = Scope(
            select,
            original,
            self._around[-1],
            as_from,
            compound,
            self._next_index(),
            tuple(froms),
            tuple(named[3] for named in compile_state.columns_plus_names),
        )
        for clause in froms:
            _add_from(scope, clause, nullable=False)
        _add_where(scope, select._where_criteria)
        if select._suffixes or select._prefixes or _has_hints(select):
            scope.criteria.clear()  # plain SQL that may change what they mean
            scope.is_loose = True
        self.scopes.append(scope)
        self._around.append(scope)
        return froms

    def _next_index(self) -> int:
        return len(self.scopes)

    def visit_column(self, column: Any, *args: Any, **kw: Any) -> Any:
        scope = self._around[-1]
        if scope is not None and column.table is not None:
            scope.used.add((hash(column.table), column.name))
        return super().visit_column(column, *args, **kw)

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
    return bool(select._hints or select._statement_hints) or has_extension(select)


def _add_where(scope: Scope, criteria: Any) -> None:
    """Add the conditions of a WHERE to *scope*, unless loose text is among them."""
    parts = [part for criterion in criteria for part in conjuncts(criterion)]
    if any(is_loose_text(part) for part in parts):
        scope.is_loose = True
        return
    everything = _ids(scope.elements)
    firm = _ids(element for element in scope.elements if not element.nullable)
    scope.criteria.extend(Criterion(part, everything, firm) for part in parts)


def _ids(elements: Iterable[Element]) -> frozenset[int]:
    return frozenset(id(element) for element in elements)


def noting(dialect: Dialect, base: type[Noting] | None = None) -> type[Noting]:
    """Return the compiler of *dialect* that notes scopes, or does as *base* as well."""
    made: type[Noting] = _noting(dialect.statement_compiler, base or Noting)  # type: ignore[arg-type]
    return made


@cache
def _noting(compiler: Any, base: Any) -> type[Noting]:
    return type(f"{base.__name__}{compiler.__name__}", (base, compiler), {})


def _add_from(
    scope: Scope, clause: Any, *, nullable: bool
) -> tuple[list[Element], list[Element]]:
    """Add the elements of one FROM item, and the criteria of its joins, to *scope*.

    Returns the elements, and those of them that are in each row of the item.
    """
    while isinstance(clause, Grouping) or clause.__visit_name__ == "grouping":
        clause = clause.element
    if not isinstance(clause, Join):
        element = Element(clause, nullable)
        scope.elements.append(element)
        return [element], [element]
    scope.has_full_join |= clause.full
    outer = clause.isouter or clause.full
    left, firm_left = _add_from(scope, clause.left, nullable=nullable or clause.full)
    right, firm_right = _add_from(scope, clause.right, nullable=nullable or outer)
    if clause.full:
        filters, before = _ids(()), _ids(())
    elif outer:
        filters, before = _ids(right), _ids(firm_right)
    else:
        filters, before = _ids([*left, *right]), _ids([*firm_left, *firm_right])
    if clause.onclause is not None:
        parts = list(conjuncts(clause.onclause))
        if any(is_loose_text(part) for part in parts):
            scope.is_loose = True
        else:
            scope.criteria.extend(Criterion(part, filters, before) for part in parts)
    firm = [] if clause.full else firm_left if outer else [*firm_left, *firm_right]
    return [*left, *right], firm


@dataclass(frozen=True, slots=True)
class Noted:
    """What one compilation of a statement has shown.

    ``scopes`` are outermost first. ``places`` maps ``id(parameter)`` of each bound
    parameter rendered to its place in the cache key, ``names`` that place to the names
    it has in the SQL; both are None where there is no key. ``orm_criteria`` is what
    the ORM adds to each entity it meets (``with_loader_criteria``).
    """

    scopes: list[Scope]
    places: Mapping[int, int] | None
    names: Mapping[int, tuple[str, ...]] | None
    orm_criteria: Any


def noted_scopes(statement: Any, dialect: Dialect, cache_key: CacheKey | None) -> Noted:
    """Compile *statement* and return its scopes.

    An UPDATE or DELETE is a scope as well, of its table and those it reads beside.
    """
    compiler = noting(dialect)(dialect, statement, cache_key=cache_key)
    if isinstance(statement, Update | Delete):
        target = Scope(statement, statement, None, as_from=False, compound=False)
        for clause in (statement.table, *compiler.extra_froms):
            _add_from(target, clause, nullable=False)
        _add_where(target, statement._where_criteria)
        for scope in compiler.scopes:
            scope.parent = scope.parent or target
        compiler.scopes.insert(0, target)
    orm_criteria = compiler._global_attributes
    if cache_key is None:
        return Noted(compiler.scopes, None, None, orm_criteria)
    places: dict[int, int] = {}
    names = parameter_names(compiler, cache_key)
    for index, rendered in parameters_in(compiler, cache_key).items():
        for one in rendered:
            places[id(one)] = index
    return Noted(compiler.scopes, places, names, orm_criteria)


def parameter_names(compiled: Any, cache_key: CacheKey) -> dict[int, tuple[str, ...]]:
    """Return the names in the SQL of each parameter of the cache key, by place.

    As many as it is rendered times.
    """
    known = compiled.bind_names
    found = {}
    for index, rendered in parameters_in(compiled, cache_key).items():
        names = dict.fromkeys(known[one] for one in rendered if one in known)
        found[index] = tuple(
            name
            for name in names
            for _ in re.findall(rf"(POSTCOMPILE_|%\(){name}\b", compiled.string)
        )
    return found


def parameters_in(
    compiled: Any, cache_key: CacheKey
) -> dict[int, list[BindParameter[Any]]]:
    """Return what *compiled* renders of each parameter of its cache key, by place."""
    if compiled._cache_key_bind_match is None:
        return {}
    matches = compiled._cache_key_bind_match[0]
    return {
        # The first is the parameter of the key itself, rendered or not.
        index: list(matches[parameter][1:])
        for index, parameter in enumerate(cache_key.bindparams)
        if parameter in matches
    }
