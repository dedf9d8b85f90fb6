"""What a statement needs of the shards, whatever its parameters and the topology.

The statement is exact on one shard if every sharded element in it, in all subqueries,
is restricted to slots which that shard owns: then all rows it can see are there, and
any SQL means what it means on one server. It is exact on several shards, as a
concatenation, if it is row-wise, its sharded elements are colocated, and each result
row belongs to one shard. Anything else has a ``scatter_problem``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import CTE, Delete, Insert, Table, TextClause, Update
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ClauseElement, ColumnClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CompoundSelect, Select, TextualSelect

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.pins import restrictions
from shardalchemy.planner.rowwise import why_not_rowwise
from shardalchemy.planner.scopes import (
    Criterion,
    Element,
    Scope,
    conjuncts,
    noted_scopes,
)
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.planner.pins import Restriction
    from shardalchemy.planner.slots import SlotSet

__all__ = ["Analyser", "Analysis"]

_WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")
_WAY_OUT = (
    " Pin every sharded table to one key (… == value on its shard key or a locator),"
    " or send the statement to one shard with"
    " execution_options(shard_key=…) or execution_options(shard=…)."
)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What one statement needs.

    ``kind`` is the most demanding kind of table in it. Of a sharded statement,
    ``slots`` has one set per sharded element, None where nothing restricts it;
    ``only_slots`` is the one set that decides alone, where there is one.
    ``scatter_problem`` says why it cannot run on several shards.
    """

    kind: Kind
    writes: bool = False
    slots: tuple[SlotSet | None, ...] = ()
    only_slots: SlotSet | None = None
    scatter_problem: str | None = None
    table: Table | None = None


class Analyser:
    """Analyses statements, and remembers the analysis of each cache key.

    It is told which tables the servers hold sharded: textual SQL, or a ``Table`` that
    was declared without saying so, must not address those unrouted.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._guarded: frozenset[str] = frozenset()
        self._guarded_words: frozenset[str] = frozenset()
        self._dialect: Dialect | None = None
        self._capacity = capacity
        self._known: dict[Any, Analysis] = {}

    def guard(self, names: Iterable[str]) -> None:
        """Add tables, as ``schema.name``, to those that are known to be sharded."""
        self._guarded |= frozenset(names)
        self._guarded_words = frozenset(
            name.partition(".")[2].lower() for name in self._guarded
        )
        self._known.clear()

    def analyse(self, statement: Any) -> tuple[Analysis, Sequence[Any]]:
        """Return the analysis of *statement* and its cache key's bound parameters.

        Raises UnsupportedQueryError where no choice of shards could make it exact.
        """
        if not isinstance(statement, ClauseElement):
            return Analysis(Kind.HOME), ()  # a Sequence, for example
        key = statement._generate_cache_key()
        if key is None:
            return self._analyse(statement, None), ()
        known = self._known.get(key.key)
        if known is None:
            known = self._analyse(statement, key)
            if len(self._known) >= self._capacity:
                self._forget()
            self._known[key.key] = known
        return known, key.bindparams

    def _forget(self) -> None:
        for key in list(self._known)[: self._capacity // 4]:
            self._known.pop(key, None)

    def _analyse(self, statement: Any, key: CacheKey | None) -> Analysis:
        if getattr(statement, "_is_lambda_element", False):
            statement = statement._resolved
        if isinstance(statement, Insert):
            return self._of_insert(statement, key)
        if isinstance(statement, Update | Delete):
            return self._of_update(statement, key)
        tables, texts = _named(statement)
        kinds = {placement_of(table).kind for table in tables}
        self._check_undeclared(tables)
        if not kinds - {Kind.HOME}:
            self._check_texts(texts, frozenset())
            return Analysis(Kind.HOME)
        if not isinstance(statement, Select | CompoundSelect):
            if isinstance(statement, TextualSelect) or texts:
                self._check_texts(texts, frozenset())
            raise UnsupportedQueryError(
                f"a {type(statement).__name__} over sharded tables is not supported."
                " Write it as a select()."
            )
        self._check_texts(texts, kinds)
        _check_mixture(tables)
        scopes, places = self._scopes(statement, key)
        found = restrictions(scopes, places)
        if not found:
            # What the ORM adds while compiling may name tables that the statement
            # does not.
            return Analysis(_most_demanding(scopes, kinds))
        _check_mixture(
            [e.table for s in scopes for e in s.elements if e.table is not None]
        )
        return _of_restrictions(found, _why_not_scattered(scopes, found))

    def _scopes(
        self, statement: Any, key: CacheKey | None
    ) -> tuple[list[Scope], Mapping[int, int] | None]:
        if self._dialect is None:
            from sqlalchemy.dialects.postgresql import psycopg

            self._dialect = psycopg.dialect()  # type: ignore[no-untyped-call]
        return noted_scopes(statement, self._dialect, key)

    def _of_update(self, statement: Any, key: CacheKey | None) -> Analysis:
        table = _plain(statement.table)
        placement = placement_of(table)
        tables, texts = _named(statement)
        _check_mixture(tables)
        self._check_undeclared(tables)
        kinds = {placement_of(t).kind for t in tables}
        self._check_texts(texts, kinds - {Kind.HOME})
        if placement.kind is Kind.HOME:
            if Kind.SHARDED in kinds:
                raise UnsupportedQueryError(_mixed(tables))
            return Analysis(Kind.HOME, writes=True)
        if placement.kind is Kind.REFERENCE:
            _check_deterministic(statement, tables)
            return Analysis(Kind.REFERENCE, writes=True, table=table)
        for column in _assigned(statement):
            if getattr(column, "key", column) in placement.pins:
                raise UnsupportedQueryError(
                    f"UPDATE of {table}.{column}: it says where the row lives. Load"
                    " the rows, delete them, and add copies with the new value."
                )
        scopes, places = self._scopes(statement, key)
        target = Scope(statement, statement, None, as_from=False, compound=False)
        target.elements.append(Element(table))
        target.elements += [
            Element(t)
            for t in tables
            if t is not table and not any(s.element_of(t) for s in scopes)
        ]
        everything = frozenset(id(e) for e in target.elements)
        target.criteria += [
            Criterion(part, everything)
            for criterion in statement._where_criteria
            for part in conjuncts(criterion)
        ]
        for scope in scopes:
            scope.parent = scope.parent or target
        found = restrictions([target, *scopes], places)
        problem = "an UPDATE or DELETE by criteria"
        analysis = _of_restrictions(found, problem)
        return Analysis(
            Kind.SHARDED,
            True,
            analysis.slots,
            analysis.only_slots,
            analysis.scatter_problem,
            table,
        )

    def _of_insert(self, statement: Any, key: CacheKey | None) -> Analysis:
        table = _plain(statement.table)
        self._check_undeclared([table])
        kind = placement_of(table).kind
        if statement.select is not None:
            tables, texts = _named(statement.select)
            kinds = {placement_of(t).kind for t in tables}
            self._check_texts(texts, kinds | ({kind} - {Kind.HOME}))
            if kind is not Kind.HOME or Kind.SHARDED in kinds:
                raise UnsupportedQueryError(
                    f"INSERT INTO {table} … SELECT over sharded tables: the rows may"
                    " have to move between shards. Read them and add them with the"
                    " session."
                )
        elif kind is Kind.REFERENCE:
            _check_deterministic(statement, [table])
        problem = "an INSERT of rows of several shards"
        return Analysis(kind, writes=True, table=table, scatter_problem=problem)

    def _check_undeclared(self, tables: Sequence[Table]) -> None:
        """Refuse a Table without a declaration whose rows are known to be sharded."""
        for table in tables:
            if (
                placement_of(table).kind is Kind.HOME
                and f"{table.schema or 'public'}.{table.name}" in self._guarded
            ):
                raise UnsupportedQueryError(
                    f"{table} is sharded on the servers, but this Table object has no"
                    " info=sharded_by(…); a reflected table needs it as well. Use the"
                    " declared one, or execution_options(shard='…')."
                )

    def _check_texts(
        self, texts: Sequence[str], kinds: set[Kind] | frozenset[Kind]
    ) -> None:
        """Refuse plain SQL that may read sharded rows without being routed."""
        for text in texts:
            words = {word.lower() for word in _WORDS.findall(text)}
            named = words & self._guarded_words
            if named:
                raise UnsupportedQueryError(
                    f"textual SQL names {', '.join(sorted(named))}, whose rows are on"
                    " several shards, and it is not parsed. Write it as a select(), or"
                    " say where it runs: execution_options(shard_key=…) or"
                    " execution_options(shard='…')."
                )
            if Kind.SHARDED in kinds and words & {"select", "with"}:
                raise UnsupportedQueryError(
                    "a textual subquery beside sharded tables is not parsed. Write it"
                    " as a select()." + _WAY_OUT
                )


def _named(statement: Any) -> tuple[list[Table], list[str]]:
    """Return the tables and the pieces of plain SQL anywhere in *statement*."""
    tables: dict[Table, None] = {}
    texts: list[str] = []
    seen: set[int] = set()
    stack = [statement]
    while stack:
        for part in visitors.iterate(stack.pop()):
            if id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, Table):
                tables.setdefault(_plain(part))
            elif isinstance(part, TextClause):
                texts.append(part.text)
            elif isinstance(part, ColumnClause):
                if part.is_literal:
                    texts.append(part.name)
                source = part.table
                if source is not None and id(source) not in seen:
                    stack.append(source)
            elif isinstance(part, CTE):
                stack.append(part.element)
    return list(tables), texts


def _plain(table: Any) -> Table:
    """Return the table itself of one that the ORM has annotated."""
    plain: Table = table._deannotate() if table._annotations else table
    return getattr(plain, "_Annotated__element", plain)


def _mixed(tables: Sequence[Table]) -> str:
    home = [str(t) for t in tables if placement_of(t).kind is Kind.HOME]
    sharded = [str(t) for t in tables if placement_of(t).kind is Kind.SHARDED]
    return (
        f"{', '.join(sharded)} is sharded and {', '.join(home)} lives on the home shard"
        " alone; one statement cannot see both. Load them in two statements, or"
        f" declare {home[0]} with sharded_by(…) or reference_table()."
    )


def _check_mixture(tables: Sequence[Table]) -> None:
    kinds = {placement_of(table).kind for table in tables}
    if Kind.SHARDED in kinds and Kind.HOME in kinds:
        raise UnsupportedQueryError(_mixed(tables))


def _most_demanding(scopes: Sequence[Scope], kinds: set[Kind]) -> Kind:
    found = set(kinds)
    for scope in scopes:
        for element in scope.elements:
            if element.table is not None:
                found.add(placement_of(element.table).kind)
    return Kind.HOME if Kind.HOME in found else Kind.REFERENCE


def _of_restrictions(found: list[Restriction], problem: str | None) -> Analysis:
    slots = {id(r.slots): r.slots for r in found}
    only = found[0].slots if len(slots) == 1 else None
    return Analysis(
        Kind.SHARDED,
        slots=tuple(slots.values()),
        only_slots=only,
        scatter_problem=problem,
    )


def _why_not_scattered(scopes: Sequence[Scope], found: list[Restriction]) -> str | None:
    """Return what keeps a SELECT from being run on several shards, or None."""
    top = scopes[0]
    for scope in scopes:
        sharded = [r for r in found if r.scope is scope]
        if scope.parent is None or sharded:
            loader = _is_relationship_load(scope.original)
            problem = why_not_rowwise(scope.select, None if loader else scope.original)
            ordered = loader and bool(scope.original._order_by_clauses)
            if problem is None and ordered and any(r.slots is None for r in sharded):
                # Children are ordered within their parent: its key has to pin them.
                problem = "ORDER BY"
            if problem is not None:
                return problem
        if sharded and scope is not top and not scope.as_from:
            return "a subquery over sharded tables"
        if scope.compound:
            return "a set operation"
        if sharded and scope.has_full_join:
            return "a FULL JOIN"
    if len({r.group for r in found}) > 1:
        return (
            "a join of "
            + " and ".join(sorted({str(r.element.table) for r in found}))
            + ", which is not on equal shard keys"
        )
    if all(_blankable(r, scopes) for r in found):
        return "an outer join whose preserved side is a reference table"
    return None


def _blankable(restriction: Restriction, scopes: Sequence[Scope]) -> bool:
    """Return whether a result row may lack a row of this element."""
    if restriction.element.nullable:
        return True
    scope = restriction.scope
    while scope.parent is not None:
        holder = next(
            (
                e
                for e in scope.parent.elements
                if e.subquery is scope.original or e.subquery is scope.select
            ),
            None,
        )
        if holder is None or holder.nullable:
            return True
        scope = scope.parent
    return False


def _is_relationship_load(statement: Any) -> bool:
    path = getattr(getattr(statement, "_compile_options", None), "_current_path", None)
    return path is not None and not path.is_root


def _assigned(statement: Any) -> Iterator[Any]:
    """Yield the columns that an UPDATE sets."""
    if isinstance(statement, Update):
        yield from statement._values or ()
        # SQLAlchemy 2.0 keeps what ordered_values() was given apart.
        for column, _ in getattr(statement, "_ordered_values", None) or ():
            yield column


def _check_deterministic(statement: Any, tables: Sequence[Table]) -> None:
    """Refuse a write to a reference table that its copies might evaluate unlike."""
    table = statement.table
    others = [t for t in tables if placement_of(t).kind is not Kind.REFERENCE]
    parts = list(visitors.iterate(statement))
    if others or any(isinstance(part, FunctionElement | TextClause) for part in parts):
        raise UnsupportedQueryError(
            f"a write to the reference table {table} runs on every shard, and a"
            " function or another table in it may give each copy another value."
            " Compute the values first, or change the objects through the session."
        )
