"""What a statement needs of the shards, whatever its parameters and the topology.

The statement is exact on one shard if every sharded element in it, in all subqueries,
is restricted to slots which that shard owns: then all rows it can see are there, and
any SQL means what it means on one server. It is exact on several shards, as a
concatenation, if it is row-wise, its sharded elements are colocated, and each result
row belongs to one shard. Anything else has a ``scatter_problem``.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Insert, Update
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import CompoundSelect, Select

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.names import Guard, Named, named
from shardalchemy.planner.pins import restrictions, selects_a_pin
from shardalchemy.planner.rowwise import why_not_rowwise
from shardalchemy.planner.scopes import noted_scopes
from shardalchemy.planner.slots import Arguments
from shardalchemy.planner.written import (
    rows_stay,
    unlike_copies,
    unlike_rows,
    unlike_shards,
)
from shardalchemy.schema import Kind, Pin, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Table
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.planner.pins import Restriction
    from shardalchemy.planner.scopes import Element, Scope
    from shardalchemy.planner.slots import SlotSet

__all__ = ["Analyser", "Analysis"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What one statement needs.

    ``kind`` is the most demanding kind of table in it. Of a sharded statement,
    ``slots`` has one set per sharded element, None where nothing restricts it;
    ``only_slots`` is the one set that decides alone, where there is one.
    ``scatter_problem`` says why it cannot run on several shards. ``locks_copies`` says
    that it locks rows of reference tables, which all sessions have to do on one shard.
    """

    kind: Kind
    writes: bool = False
    slots: tuple[SlotSet | None, ...] = ()
    only_slots: SlotSet | None = None
    scatter_problem: str | None = None
    table: Table | None = None
    locks_copies: bool = False

    def needed_slots(
        self, extracted: Sequence[Any], given: Mapping[str, Any]
    ) -> set[int] | None:
        """Return the slots that one execution needs, or None for all.

        *extracted* are the parameters of the statement's cache key, *given* those that
        are passed beside it, by name.
        """
        if given:
            known = {parameter.key for parameter in extracted}
            if self.table is not None:
                known.update(self.table.c.keys())
            if not known.issuperset(given):
                # It may stand for a parameter by the name it has in the SQL.
                return None
        arguments = Arguments(extracted, given)
        if self.only_slots is not None:
            return self.only_slots.evaluate(arguments)
        found: set[int] = set()
        for slots in self.slots:
            some = None if slots is None else slots.evaluate(arguments)
            if some is None:
                return None
            found |= some
        return found


class Analyser:
    """Analyses statements, and remembers the analysis of each cache key.

    It is told which tables the servers hold sharded: textual SQL, or a ``Table`` that
    was declared without saying so, must not address those unrouted.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._guard = Guard()
        self._dialect: Dialect | None = None
        self._capacity = capacity
        self._known: dict[Any, Analysis] = {}

    def guard(self, names: Iterable[str]) -> None:
        """Add tables, as ``schema.name``, to those that are known to be sharded."""
        self._guard = self._guard.with_names(names)
        self._known.clear()

    def analyse(self, statement: Any) -> tuple[Analysis, Sequence[Any] | None]:
        """Return the analysis of *statement* and its cache key's bound parameters.

        The second is None for a statement that cannot be cached. Raises
        UnsupportedQueryError where no choice of shards could make it exact.
        """
        if not isinstance(statement, ClauseElement):
            return Analysis(Kind.HOME), ()  # a Sequence, for example
        key = statement._generate_cache_key()
        if key is None:
            return self._analyse(statement, None), None
        known = self._known.get(key.key)
        if known is None:
            known = self._analyse(statement, key)
            if len(self._known) >= self._capacity:
                for old in list(self._known)[: self._capacity // 4]:
                    self._known.pop(old, None)
            self._known[key.key] = known
        return known, key.bindparams

    def key_pins(self, statement: Any) -> list[Pin]:
        """Return how the shard keys of the tables in *statement* are hashed."""
        placements = [placement_of(table) for table in named(statement).tables]
        return [p.pin for p in placements if p.pin is not None]

    def stays(self, select: Any, column: Any, pin: Pin) -> bool:
        """Return whether rows of *select* may be inserted on the shards they are on.

        *column* of it is the shard key, hashed as *pin* says, of the table they go to.
        """
        scopes, _ = self._scopes(select, None)
        return rows_stay(scopes, named(select), column, pin.family)

    def _analyse(self, statement: Any, key: CacheKey | None) -> Analysis:
        if getattr(statement, "_is_lambda_element", False):
            statement = statement._resolved
        found = named(statement)
        self._guard.check(found)
        if isinstance(statement, Insert):
            return self._of_insert(statement, found)
        if isinstance(statement, Update | Delete):
            return self._of_update(statement, found, key)
        return self._of_select(statement, found, key)

    def _of_select(
        self, statement: Any, found: Named, key: CacheKey | None
    ) -> Analysis:
        kinds = found.kinds
        inner = statement.element if isinstance(statement, FromStatement) else statement
        selects = isinstance(inner, Select | CompoundSelect)
        if not kinds - {Kind.HOME}:
            is_orm = "compile_state_plugin" in statement._propagate_attrs
            if not (selects and is_orm):
                return Analysis(Kind.HOME)
            # What the ORM adds while it compiles may read other tables.
            try:
                scopes, places = self._scopes(statement, key)
            except Exception as error:
                logger.debug("left to SQLAlchemy, which will say why: %s", error)
                return Analysis(Kind.HOME)
        elif not selects:
            raise UnsupportedQueryError(
                f"a {type(statement).__name__} over {found.of_kind(Kind.SHARDED)}"
                f" {found.of_kind(Kind.REFERENCE)} is not supported. Write it as a"
                " select(); create tables with cluster.create_all()."
            )
        else:
            found.check_nested_writes()
            found.check_texts()
            found.check_mixture()
            scopes, places = self._scopes(statement, key)
        return _of_scopes(statement, scopes, places, found)

    def _scopes(
        self, statement: Any, key: CacheKey | None
    ) -> tuple[list[Scope], Mapping[int, int] | None]:
        if self._dialect is None:
            from sqlalchemy.dialects.postgresql import psycopg

            self._dialect = psycopg.dialect()  # type: ignore[no-untyped-call]
        return noted_scopes(statement, self._dialect, key)

    def _of_update(
        self, statement: Any, found: Named, key: CacheKey | None
    ) -> Analysis:
        table = found.target(statement)
        placement = placement_of(table)
        found.check_nested_writes()
        if found.kinds - {Kind.HOME}:
            found.check_texts()
        found.check_mixture()
        if placement.kind is Kind.HOME:
            return Analysis(Kind.HOME, writes=True)
        if placement.kind is Kind.REFERENCE:
            _check_deterministic(statement, table, found)
            return Analysis(Kind.REFERENCE, writes=True, table=table)
        for column in _assigned(statement):
            if getattr(column, "key", column) in placement.pins:
                raise UnsupportedQueryError(
                    f"UPDATE of {table}.{column}: it says where the row lives. Load"
                    " the rows, delete them, and add copies with the new value."
                )
        scopes, places = self._scopes(statement, key)
        analysis = _of_scopes(statement, scopes, places, found)
        sharded = restrictions(scopes, places)
        problem = unlike_shards(statement, scopes, found, sharded)
        return replace(analysis, writes=True, table=table, scatter_problem=problem)

    def _of_insert(self, statement: Any, found: Named) -> Analysis:
        table = found.target(statement)
        kind = placement_of(table).kind
        found.check_nested_writes()
        # The ORM's RETURNING names the tables of a class that it inserts into as well.
        subject = statement._propagate_attrs.get("plugin_subject")
        own = {table} if subject is None else {table, *subject.mapper.tables}
        read = {placement_of(t).kind for t in found.tables if t not in own}
        for part in found.parts:
            if isinstance(part, Select | CompoundSelect):
                read |= named(part).kinds
        selects = statement.select is not None
        if Kind.SHARDED in read or (selects and kind is Kind.SHARDED):
            raise UnsupportedQueryError(
                f"INSERT INTO {table} with rows or values that are selected"
                f" ({found.of_kind(*Kind)}): they may be on other shards. Read them"
                " first, and add the rows through the session."
            )
        if kind is not Kind.HOME:
            found.check_texts()
        if kind is Kind.REFERENCE:
            _check_deterministic(statement, table, found)
        problem = unlike_rows(found)
        return Analysis(kind, writes=True, table=table, scatter_problem=problem)


def _of_scopes(
    statement: Any,
    scopes: list[Scope],
    places: Mapping[int, int] | None,
    found: Named,
) -> Analysis:
    """Return the analysis of a statement from its scopes."""
    elements = [element for scope in scopes for element in scope.elements]
    _check_elements(elements)
    tables = [e.table for e in elements if e.table is not None]
    seen = Named(dict.fromkeys([*tables, *found.tables]), [], False)
    seen.check_mixture()
    restricted = restrictions(scopes, places)
    kinds = seen.kinds
    locks = _locks_copies(statement, kinds)
    if not restricted:
        if Kind.SHARDED in kinds:
            raise UnsupportedQueryError(
                f"where {seen.of_kind(Kind.SHARDED)} is read in this statement could"
                " not be made out. Select from it directly, or in a subquery."
            )
        kind = Kind.HOME if Kind.HOME in kinds or not kinds else Kind.REFERENCE
        return Analysis(kind, locks_copies=locks)
    if locks:
        raise UnsupportedQueryError(
            "FOR UPDATE over a sharded and a reference table would lock one shard's"
            " copy of the latter. Say with_for_update(of=…) which rows are meant."
        )
    slots = {id(r.slots): r.slots for r in restricted}
    return Analysis(
        Kind.SHARDED,
        slots=tuple(slots.values()),
        only_slots=restricted[0].slots if len(slots) == 1 else None,
        scatter_problem=_why_not_scattered(scopes, restricted),
    )


def _check_elements(elements: Sequence[Element]) -> None:
    """Refuse FROM elements that read a table in a way that is not known here."""
    for element in elements:
        if element.table is None and element.subquery is None:
            inside = named(element.clause)
            if inside.kinds - {Kind.HOME}:
                raise UnsupportedQueryError(
                    f"a {type(element.clause).__name__} of {inside.of_kind(*Kind)} in"
                    " FROM is not supported over several shards."
                )


def _locks_copies(statement: Any, kinds: set[Kind]) -> bool:
    lock = getattr(statement, "_for_update_arg", None)
    if lock is None or Kind.REFERENCE not in kinds:
        return False
    if not lock.of:
        return True
    return any(
        placement_of(table).kind is Kind.REFERENCE
        for item in lock.of
        for table in named(item).tables
    )


def _why_not_scattered(scopes: Sequence[Scope], found: list[Restriction]) -> str | None:
    """Return what keeps a SELECT from being run on several shards, or None."""
    top = scopes[0]
    inner = [e.subquery for s in scopes for e in s.elements if e.subquery is not None]
    if any(count > 1 for count in Counter(map(id, inner)).values()):
        return "a CTE or subquery that is used more than once"
    for scope in _above(scopes, found):
        sharded = [r for r in found if r.scope is scope]
        loader = scope is top and _is_relationship_load(scope.original)
        problem = why_not_rowwise(
            scope.select,
            None if loader else scope.original,
            distinct_by_shard=(
                isinstance(scope.select, Select)
                and scope.select._distinct is True
                and selects_a_pin(scope, scopes)
            ),
        )
        ordered = loader and bool(getattr(scope.original, "_order_by_clauses", ()))
        if problem is None and ordered and not _ordered_within_parents(sharded, found):
            problem = "ORDER BY"
        if problem is not None:
            return problem
        if scope is not top and not scope.as_from:
            return "a subquery over sharded tables"
        if scope.compound:
            return "a set operation"
        if scope.has_full_join:
            return "a FULL JOIN"
    return _why_not_colocated(scopes, found)


def _above(scopes: Sequence[Scope], found: list[Restriction]) -> list[Scope]:
    """Return every scope through which sharded rows come, and the outermost."""
    needed = {id(scopes[0]): scopes[0]}
    for restriction in found:
        scope: Scope | None = restriction.scope
        while scope is not None:
            needed[id(scope)] = scope
            scope = scope.parent
    return list(needed.values())


def _ordered_within_parents(
    sharded: list[Restriction], found: list[Restriction]
) -> bool:
    """Return whether the children of one parent all come from one shard.

    A loader that asks for the children of many parents restricts them by the parents'
    keys, or joins them to the parents; it sorts each parent's children, no more.
    """
    parents = [r for r in found if r not in sharded]
    return all(
        (r.slots is not None and r.slots.is_list_of("primary_keys"))
        or any(parent.group == r.group for parent in parents)
        for r in sharded
    )


def _why_not_colocated(scopes: Sequence[Scope], found: list[Restriction]) -> str | None:
    """Return why partners, or parts of a result row, may be on several shards."""
    preserved = {r.group for r in found if not _blankable(r, scopes)}
    if not preserved:
        return "an outer join whose preserved side is a reference table"
    together = set(preserved) if len(preserved) == 1 else set()
    grown = True
    while grown and together:
        attached = {r.group for r in found if r.attached_to & together}
        grown = not attached <= together
        together |= attached
    if any(r.group not in together for r in found):
        tables = sorted({str(r.element.table) for r in found})
        return f"a join of {' and '.join(tables)}, which is not on equal shard keys,"
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


def _check_deterministic(statement: Any, table: Table, found: Named) -> None:
    """Refuse a write to a reference table that its copies might evaluate unlike."""
    others = [t for t in found.tables if placement_of(t).kind is not Kind.REFERENCE]
    problem = unlike_copies(found, one_row=isinstance(statement, Insert))
    if others or problem:
        raise UnsupportedQueryError(
            f"a write to the reference table {table} runs on every shard, and"
            f" {problem or 'another table in it'} may give each copy another value."
            " Compute the values first, or change the objects through the session."
        )
