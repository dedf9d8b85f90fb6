"""What a statement needs of the shards, whatever its parameters and the topology.

The statement is exact on one shard if every sharded element in it, in all subqueries,
is restricted to slots which that shard owns: then all rows it can see are there, and
any SQL means what it means on one server. It is exact on several shards, as a
concatenation, if each result row belongs to one shard and nothing is done to all of
them together. Anything else has a ``scatter_problem``, and a SELECT is split in pieces.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Insert, Update
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    CompoundSelect,
    Select,
    TableValuedAlias,
    Values,
)

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.declared import Declared
from shardalchemy.planner.functions import Functions
from shardalchemy.planner.layout import Layout, upper_clauses
from shardalchemy.planner.names import Guard, Named, named, whole_text
from shardalchemy.planner.scopes import noted_scopes
from shardalchemy.planner.slots import Arguments
from shardalchemy.planner.splitting import split
from shardalchemy.planner.unpreparable import obstacle_of
from shardalchemy.planner.written import (
    rows_stay,
    unlike_copies,
    unlike_rows,
    unlike_shards,
)
from shardalchemy.schema import Kind, Pin, placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sqlalchemy import Table
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.obstacles import Obstacle
    from shardalchemy.planner.pins import Restriction
    from shardalchemy.planner.scopes import Element, Noted
    from shardalchemy.planner.slots import SlotSet, Value
    from shardalchemy.planner.split import Split

__all__ = ["Analyser", "Analysis", "OwnKeys"]

logger = logging.getLogger(__name__)

OwnKeys = Mapping[int, tuple[str, Mapping[str, list[Any]]]]
"""Lists of keys divided by shard: by their parameter's place in the cache key, its name
in the SQL and the values of each shard."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What one statement needs.

    ``kind`` is the most demanding kind of table in it. Of a sharded statement,
    ``slots`` has one set per sharded element, None where nothing restricts it;
    ``only_slots`` is the one set that decides alone, where there is one.
    ``scatter_problem`` says why it cannot run on several shards as it is; ``pieces``
    then tells how else; of plain SQL and of a write that is ``write_problem``.
    ``at_home`` says that it reads home tables as well.
    ``locks_copies`` says that it locks rows of reference tables, which all sessions
    have to do on one shard. ``lists`` are lists of keys of which a shard needs no
    others than its own, each with the parameter's name in the SQL. ``sets`` says that
    it changes a setting of the transaction; ``obstacle`` what it does that keeps the
    transaction from being prepared.
    """

    kind: Kind
    writes: bool = False
    slots: tuple[SlotSet | None, ...] = ()
    only_slots: SlotSet | None = None
    write_problem: str | None = None
    table: Table | None = None
    at_home: bool = False
    locks_copies: bool = False
    pieces: Pieces | None = None
    lists: tuple[tuple[str, Value], ...] = ()
    sets: bool = False
    obstacle: Obstacle | None = None

    @property
    def scatter_problem(self) -> str | None:
        """Why it cannot run on several shards as it is, or None."""
        return self.write_problem if self.pieces is None else self.pieces.problem

    def needed_slots(
        self, extracted: Sequence[Any], given: Mapping[str, Any]
    ) -> set[int] | None:
        """Return the slots that one execution needs, or None for all.

        *extracted* are the parameters of the statement's cache key, *given* those that
        are passed beside it, by name.
        """
        if given and not self._knows(extracted, given):
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

    def _knows(self, extracted: Sequence[Any], given: Mapping[str, Any]) -> bool:
        """Return whether it is known for which parameters values are given.

        One that is not may stand for a parameter by the name it has in the SQL.
        """
        known = {parameter.key for parameter in extracted}
        if self.table is not None:
            known.update(self.table.c.keys())
        return known.issuperset(given)

    def own_keys(
        self,
        extracted: Sequence[Any],
        given: Mapping[str, Any],
        owners: Sequence[str],
    ) -> OwnKeys:
        """Return the lists of keys, divided by the shards that own them."""
        if given and not self._knows(extracted, given):
            return {}
        arguments = Arguments(extracted, given)
        found = {}
        for name, value in self.lists:
            divided = value.by_owner(arguments, owners)
            if divided is not None and value.index is not None:
                found[value.index] = (name, divided)
        return found


class Pieces:
    """What becomes of a SELECT over several shards, found out when first needed.

    One that is pinned to a shard each time never asks.
    """

    def __init__(self, statement: Any, layout: Layout, found: Named) -> None:
        self._statement = statement
        self._layout = layout
        self._found = found
        self._made: Split | None = None

    @cached_property
    def problem(self) -> str | None:
        """What keeps the statement from being run on several shards as it is."""
        return _why_not_scattered(self._statement, self._layout)

    def split(self) -> Split:
        """Return the pieces; raise UnsupportedQueryError where there are none."""
        if self._made is None:
            why = self.problem or "a join with a home table"
            self._made = split(self._statement, self._layout, self._found, why)
        return self._made


class Analyser:
    """Analyses statements, and remembers the analysis of each cache key.

    It is told which tables the servers hold sharded: textual SQL, or a ``Table`` that
    was declared without saying so, must not address those unrouted. *ask* returns what
    the servers say of their functions (``catalog.function_volatilities``).
    """

    def __init__(
        self, ask: Callable[[], Mapping[str, str]], capacity: int = 1024
    ) -> None:
        self._guard = Guard()
        self._functions = Functions(ask)
        self._declared = Declared()
        self._dialect: Dialect | None = None
        self._capacity = capacity
        self._known: dict[Any, Analysis] = {}

    def guard(self, names: Iterable[str]) -> None:
        """Add tables, as ``schema.name``, to those that are known to be sharded."""
        self._guard = self._guard.with_names(names)
        self._known.clear()

    def see(self, tables: Iterable[Table]) -> None:
        """Learn what *tables*, and those beside them, are declared to be."""
        if self._declared.see(tables):
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
            return self._analysed(statement, None), None
        known = self._known.get(key.key)
        if known is None:
            known = self._analysed(statement, key)
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
        layout = Layout(self._noted(select, None), self._functions)
        return rows_stay(layout, named(select), column, pin.family)

    def _analysed(self, statement: Any, key: CacheKey | None) -> Analysis:
        if getattr(statement, "_is_lambda_element", False):
            statement = statement._resolved
        found = self._analyse(statement, key)
        obstacle = obstacle_of(statement)
        return found if obstacle is None else replace(found, obstacle=obstacle)

    def _analyse(self, statement: Any, key: CacheKey | None) -> Analysis:
        found = named(statement)
        text = whole_text(statement)
        if text is not None and self._guard.words_in(text.text):
            # Imported by the first that needs it, for the parser takes a while.
            from shardalchemy.planner.rawpins import analysis_of_text

            return analysis_of_text(
                text, self._compiling(), key, self._declared, self._guard
            )
        self._guard.check(found)
        self.see(t for t in found.tables if placement_of(t).kind is not Kind.HOME)
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
            if _makes_settings(statement, found):
                return Analysis(Kind.HOME, sets=True)
            is_orm = "compile_state_plugin" in statement._propagate_attrs
            if not (selects and is_orm):
                return Analysis(Kind.HOME)
            # What the ORM adds while it compiles may read other tables.
            try:
                noted = self._noted(statement, key)
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
            noted = self._noted(statement, key)
        return self._of_layout(statement, Layout(noted, self._functions), found)

    def _noted(self, statement: Any, key: CacheKey | None) -> Noted:
        return noted_scopes(statement, self._compiling(), key)

    def _compiling(self) -> Dialect:
        if self._dialect is None:
            from sqlalchemy.dialects.postgresql import psycopg

            self._dialect = psycopg.dialect()  # type: ignore[no-untyped-call]
        return self._dialect

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
        layout = Layout(self._noted(statement, key), self._functions)
        analysis = self._of_layout(statement, layout, found)
        if analysis.at_home:
            found.check_mixture()
            raise UnsupportedQueryError(
                f"what is added to this write of {table} reads a home table; one"
                " statement cannot see both."
            )
        problem = unlike_shards(statement, layout.noted.scopes, found, layout.found)
        return replace(
            analysis, writes=True, table=table, write_problem=problem, pieces=None
        )

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
        return Analysis(kind, writes=True, table=table, write_problem=problem)

    def _of_layout(self, statement: Any, layout: Layout, found: Named) -> Analysis:
        """Return the analysis of a statement from its scopes."""
        noted = layout.noted
        elements = [element for scope in noted.scopes for element in scope.elements]
        _check_elements(elements)
        tables = [e.table for e in elements if e.table is not None]
        seen = Named(dict.fromkeys([*tables, *found.tables]), [], False)
        kinds = seen.kinds
        locks = _locks_copies(statement, kinds)
        if not layout.found:
            if Kind.SHARDED in kinds:
                raise UnsupportedQueryError(
                    f"where {seen.of_kind(Kind.SHARDED)} is read in this statement"
                    " could not be made out. Select from it directly, or in a subquery."
                )
            kind = Kind.HOME if Kind.HOME in kinds or not kinds else Kind.REFERENCE
            return Analysis(kind, locks_copies=locks)
        if locks:
            raise UnsupportedQueryError(
                "FOR UPDATE over a sharded and a reference table would lock one shard's"
                " copy of the latter. Say with_for_update(of=…) which rows are meant."
            )
        slots = {id(r.slots): r.slots for r in layout.found}
        return Analysis(
            Kind.SHARDED,
            slots=tuple(slots.values()),
            only_slots=layout.found[0].slots if len(slots) == 1 else None,
            at_home=Kind.HOME in kinds,
            pieces=Pieces(statement, layout, found),
            lists=_own_lists(noted, slots.values()),
        )


_COMMENT = r"(\s|--[^\n]*(\n|$)|/\*.*?\*/)*"
_SETS = re.compile(rf"{_COMMENT}(SET|RESET)\s", re.IGNORECASE | re.DOTALL)


def _makes_settings(statement: Any, found: Named) -> bool:
    """Return whether a statement changes a setting of the transaction."""
    return any(
        _SETS.match(text) or "set_config" in text for text in found.texts
    ) or any(
        isinstance(part, FunctionElement) and getattr(part, "name", "") == "set_config"
        for part in found.parts
    )


def _own_lists(
    noted: Noted, slots: Iterable[SlotSet | None]
) -> tuple[tuple[str, Value], ...]:
    """Return the lists of keys that stand in one ``key IN (…)`` and nowhere else."""
    found = {}
    for one in slots:
        for value in () if one is None else one.lists():
            names = (noted.names or {}).get(value.index or 0, ())
            if len(names) == 1:
                found[names[0]] = value
    return tuple(found.items())


def _check_elements(elements: Sequence[Element]) -> None:
    """Refuse FROM elements that read a table in a way that is not known here."""
    for element in elements:
        if element.table is None and element.subquery is None:
            if _is_row_source(element.clause):
                continue  # a function of columns, or a list of values
            inside = named(element.clause)
            if inside.kinds - {Kind.HOME}:
                raise UnsupportedQueryError(
                    f"a {type(element.clause).__name__} of {inside.of_kind(*Kind)} in"
                    " FROM is not supported over several shards. Select from the table"
                    " itself, or send the statement to one shard with"
                    " execution_options(shard='…')."
                )


def _is_row_source(clause: Any) -> bool:
    if isinstance(clause, TableValuedAlias):
        return isinstance(clause.element, FunctionElement)
    return isinstance(clause, FunctionElement | Values)


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


def _why_not_scattered(statement: Any, layout: Layout) -> str | None:
    """Return what keeps a statement from being run on several shards as it is."""
    root = layout.roots[0]
    if root.compound:
        return "a set operation"
    loader = _is_relationship_load(root.original)
    # What only eager loading sorts by keeps each parent's children together, and those
    # are where their parent is.
    ordered = bool(getattr(root.original, "_order_by_clauses", ()))
    problem = layout.why_not_whole(root, ordered=ordered and not loader)
    if problem is None and loader and root.select._order_by_clauses:
        sharded = [r for r in layout.found if r.scope is root]
        if not _ordered_within_parents(sharded, layout.found):
            problem = "ORDER BY"
    return (
        problem
        or layout.why_not_local(root)
        or layout.functions.why_not_by_shard(upper_clauses(root))
        or layout.tells_time
    )


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
