"""What a text needs of the shards, from what it says and what is declared.

A text is routed where every sharded table in it, in all its SELECTs, is restricted to
slots: ``pin = value``, ``pin IN (…)``, or equality with the pin of a table that is
restricted itself. Columns of a subquery or CTE are followed to the table they come
from. The rules are those of `pins`, for SQL instead of SQLAlchemy's expressions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from sqlalchemy import BindParameter, TypeDecorator

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.ids import locator_slot
from shardalchemy.planner.analysis import Analysis
from shardalchemy.planner.declared import elsewhere
from shardalchemy.planner.pins import compared_alike
from shardalchemy.planner.rawsql import Unread, read
from shardalchemy.planner.slots import UNKNOWN, AnyOf, Value, all_of
from shardalchemy.ring import KEY_TYPES
from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Column, TextClause
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.planner.declared import Declared
    from shardalchemy.planner.names import Guard
    from shardalchemy.planner.rawscopes import Operand, Reading, Ref, Scope
    from shardalchemy.planner.slots import Arguments, SlotSet
    from shardalchemy.schema import Pin, Placement

__all__ = ["analysis_of_text"]

_FAMILIES = {
    "BIGINT": "int8",
    "INT": "int8",
    "SMALLINT": "int8",
    "TEXT": "text",
    "VARCHAR": "text",
    "UUID": "uuid",
    "VARBINARY": "bytea",
    "DATE": "date",
}


def analysis_of_text(
    text: TextClause,
    dialect: Dialect,
    key: CacheKey | None,
    declared: Declared,
    guard: Guard,
) -> Analysis:
    """Return what *text* needs, which has names of guarded tables in it.

    Raises UnsupportedQueryError where that is not certain.
    """
    compiled: Any = text.compile(dialect=dialect)
    reading = read(compiled.string)
    if isinstance(reading, Unread):
        if reading.raw is not None and not guard.words_in(reading.raw):
            return Analysis(Kind.HOME)  # the names are in comments
        names = ", ".join(sorted(guard.words_in(text.text)))
        raise elsewhere(
            f"names {names}, whose rows are on several shards, and something in it is"
            f" not parsed: {reading.problem}."
        )
    placements = {table: declared.find(*table, guard.names) for table in reading.tables}
    return _Textual(reading, placements, compiled.binds, key).analysis()


@dataclass(frozen=True, slots=True)
class _TextAnalysis(Analysis):
    """The analysis of a text, whose parameters have no other names than its own."""

    def needed_slots(
        self, extracted: Sequence[Any], given: Mapping[str, Any]
    ) -> set[int] | None:
        """Return the slots that one execution needs, or None for all."""
        # Under a plain session as well, a value without a parameter is ignored.
        known = {parameter.key for parameter in extracted}
        kept = {name: value for name, value in given.items() if name in known}
        return Analysis.needed_slots(self, extracted, kept)


@dataclass(frozen=True, slots=True)
class _Bound(Value):
    """The slot of a parameter of the text itself."""

    def read(self, arguments: Arguments) -> Any:
        """Return the parameter's value for this execution, or `UNKNOWN`."""
        parameter = (
            self.parameter if self.index is None else arguments.extracted[self.index]
        )
        given = arguments.given
        if parameter.expanding is not self.expanding or parameter.unique:
            return UNKNOWN
        if parameter.key in given:
            return given[parameter.key]
        if parameter.required:
            return () if self.expanding else None  # SQLAlchemy will say so
        return parameter.effective_value


@dataclass(frozen=True, slots=True)
class _Place:
    """A pinning column of a sharded table, as some name in the text means it.

    ``element`` is the table's scope and place there; ``outermost`` the place of the
    source in the scope of the name itself. ``filters_inside`` says whether a criterion
    on that source filters the table's rows.
    """

    element: tuple[int, int]
    scope: Scope
    pin: Pin
    column: Column[Any]
    outermost: int
    filters_inside: bool


@dataclass(slots=True)
class _Restricted:
    """A sharded table in a scope, and what restricts it."""

    direct: list[SlotSet] = field(default_factory=list)
    slots: SlotSet | None = None


class _Textual:
    """One text beside the declarations of its tables."""

    def __init__(
        self,
        reading: Reading,
        placements: Mapping[tuple[str | None, str], Placement | None],
        binds: Mapping[str, BindParameter[Any]],
        key: CacheKey | None,
    ) -> None:
        self._reading = reading
        self._placements = placements
        self._binds = binds
        extracted = () if key is None else key.bindparams
        self._places = {id(bind): index for index, bind in enumerate(extracted)}
        self._references = Counter(
            id(source.scope)
            for scope in reading.scopes
            for source in scope.sources
            if source.scope is not None
        )
        self._bind_uses = Counter(reading.lexed.binds)
        self._text_uses: Counter[str] = Counter()

    def analysis(self) -> Analysis:
        """Return what the text needs."""
        reading = self._reading
        kinds = {p.kind if p else Kind.HOME for p in self._placements.values()}
        writes = reading.verb != "select"
        target = self._placements[reading.target] if reading.target else None
        if target is not None and target.kind is Kind.REFERENCE:
            raise UnsupportedQueryError(
                f"textual SQL writes to the reference table {target.table}, of which"
                " every shard has a copy. Write it as an insert(), update() or"
                " delete(), or change the objects through the session."
            )
        if Kind.SHARDED not in kinds:
            if kinds == {Kind.REFERENCE}:
                return Analysis(Kind.REFERENCE, locks_copies=reading.locks)
            return Analysis(Kind.HOME)
        sharded = self._names(Kind.SHARDED)
        if Kind.HOME in kinds:
            raise elsewhere(
                f"names {sharded}, which is sharded, and {self._names(Kind.HOME)},"
                " which is on the home shard alone; one statement cannot see both."
                " Load them in two statements."
            )
        if reading.locks and Kind.REFERENCE in kinds:
            raise elsewhere(
                f"locks rows of {sharded} and {self._names(Kind.REFERENCE)}, of which"
                " it would lock one shard's copy."
            )
        slots = self._slots(target)
        problem = f"textual SQL over {sharded}"
        if writes:
            problem = f"a textual {reading.verb.upper()} of {sharded}"
        elif reading.not_rowwise:
            problem += f" with {reading.not_rowwise}"
        rowwise = not writes and reading.not_rowwise is None
        first = next(p for p in self._placements.values() if p and p.pin)
        return _TextAnalysis(
            Kind.SHARDED,
            writes=writes,
            slots=tuple(slots),
            only_slots=slots[0] if len(slots) == 1 else None,
            write_problem=None if rowwise else problem,
            table=first.table,
        )

    def _names(self, kind: Kind) -> str:
        return ", ".join(
            sorted(
                ".".join(filter(None, table))
                for table, placement in self._placements.items()
                if (placement.kind if placement else Kind.HOME) is kind
            )
        )

    # -- what is restricted ------------------------------------------------------------

    def _slots(self, target: Placement | None) -> list[SlotSet | None]:
        """Return the slots of every sharded table in the text, equal ones once."""
        elements = {
            (id(scope), number): _Restricted()
            for scope in self._reading.scopes
            for number, source in enumerate(scope.sources)
            if self._is_sharded(source.table)
        }
        pinned: list[tuple[_Place, tuple[Operand, ...]]] = []
        edges: list[tuple[tuple[int, int], tuple[int, int]]] = []
        for scope in self._reading.scopes:
            for criterion in scope.criteria:
                here = self._place(criterion.left, scope)
                if isinstance(criterion.right, tuple):
                    if here and _filtered(here, scope, criterion.filters):
                        pinned.append((here, criterion.right))
                    continue
                there = self._place(criterion.right, scope)
                if not (here and there and _equal_alike(here, there)):
                    continue
                for to, source in ((here, there), (there, here)):
                    if _filtered(to, scope, criterion.filters):
                        edges.append((to.element, source.element))
        rows = self._inserted(target)
        for place, operands in pinned:
            self._note_uses(place.pin, operands)
        if target is not None and target.pin is not None:
            self._note_uses(target.pin, rows)
        for place, operands in pinned:
            slots = self._any_of(place.pin, place.column, operands)
            if slots is not None:
                elements[place.element].direct.append(slots)
        for element in elements.values():
            element.slots = all_of(element.direct)
        changed = True
        while changed:
            changed = False
            for one, other in edges:
                if elements[one].slots is None and elements[other].slots is not None:
                    elements[one].slots = elements[other].slots
                    changed = True
        found = {id(e.slots): e.slots for e in elements.values()}
        if rows:
            assert target is not None
            assert target.pin is not None
            assert target.column is not None
            every = self._any_of(target.pin, target.column, rows)
            found[id(every)] = every
        return list(found.values())

    def _is_sharded(self, table: tuple[str | None, str] | None) -> bool:
        placement = self._placements.get(table) if table else None
        return placement is not None and placement.kind is Kind.SHARDED

    def _inserted(self, target: Placement | None) -> tuple[Operand, ...]:
        """Return the shard keys that an INSERT gives; check what a write sets."""
        reading = self._reading
        if target is None or target.column is None:
            return ()
        columns = target.table.c
        for name in reading.assigned:
            if any(columns[key].name == name for key in target.pins):
                raise UnsupportedQueryError(
                    f"textual SQL sets {target.table}.{name}, which says where the row"
                    " lives. Load the rows, delete them, and add copies with the new"
                    " value."
                )
        if reading.verb != "insert":
            return ()
        keys: list[Operand] = []
        if reading.rows is None:
            raise elsewhere(
                f"inserts rows into {target.table} that it selects: they may be on"
                " other shards."
            )
        name = target.column.name
        for row in reading.rows:
            given = dict(zip(reading.columns, row, strict=False))
            key = given.get(name)
            if key is None:
                raise elsewhere(
                    f"inserts a row into {target.table} and does not give its shard"
                    f" key {name} as a parameter or a constant."
                )
            keys.append(key)
        return tuple(keys)

    def _note_uses(self, pin: Pin, operands: Sequence[Operand]) -> None:
        if pin.family == "text":
            self._text_uses.update(o.bind for o in operands if o.bind)

    def _any_of(
        self, pin: Pin, column: Column[Any], operands: Sequence[Operand]
    ) -> SlotSet | None:
        """Return the slots of *operands*, or None where one is not told."""
        found = [self._value(pin, column, operand) for operand in operands]
        known = tuple(one for one in found if one is not None)
        if len(known) < len(found):
            return None
        return known[0] if len(known) == 1 else AnyOf(known)

    def _value(self, pin: Pin, column: Column[Any], operand: Operand) -> SlotSet | None:
        stored = locator_slot if pin.family == "locator" else KEY_TYPES[pin.family].slot
        family = "uuid" if pin.family == "locator" else pin.family
        if operand.cast is not None and _FAMILIES.get(operand.cast) != family:
            return None
        if operand.bind is None:
            constant: BindParameter[Any] = BindParameter(
                None, operand.constant, unique=True
            )
            return Value(stored, None, constant, False)
        bind = self._binds.get(operand.bind)
        if bind is None or bind.literal_execute:
            return None
        if bind.type._isnull:
            # PostgreSQL takes a str to be of the type that its first use asks for.
            sole = (
                operand.cast is not None
                or self._text_uses[operand.bind] == self._bind_uses[operand.bind]
                or family != "text"
            )
            slot = _sent_as_it_is(stored, sole)
        elif compared_alike(column, bind):
            slot = pin.slot
        else:
            return None
        index = self._places.get(id(bind))
        if index is None and self._places:
            return None
        return _Bound(slot, index, bind, bind.expanding)

    # -- what a name means -------------------------------------------------------------

    def _place(self, ref: Ref, scope: Scope | None) -> _Place | None:
        """Return the pin that *ref* means in *scope*, or None."""
        if scope is None:
            return None
        if ref.source is not None:
            return self._in_source(scope, ref.source, ref.column)
        if not ref.qualifier:
            return self._unqualified(scope, ref.column)
        for number, source in enumerate(scope.sources):
            if ref.qualifier[-1] != source.alias:
                continue
            if len(ref.qualifier) > 1 and ref.qualifier != source.table:
                return None
            return self._in_source(scope, number, ref.column)
        return self._place(ref, scope.parent)

    def _unqualified(self, scope: Scope, column: str) -> _Place | None:
        """Return the one source of *scope* that is known to have *column*.

        Were there another, PostgreSQL would find the name ambiguous. Scopes around are
        not asked: a table may have more columns than are declared.
        """
        if column in scope.merged:
            return self._in_source(scope, scope.merged[column], column)
        places = [
            self._in_source(scope, number, column)
            for number in range(len(scope.sources))
        ]
        found = [place for place in places if place is not None]
        return found[0] if len(found) == 1 else None

    def _in_source(self, scope: Scope, number: int, column: str) -> _Place | None:
        source = scope.sources[number]
        if source.table is None:
            return self._in_subquery(source.scope, scope, number, column)
        placement = self._placements[source.table]
        if placement is None:
            return None
        for key, pin in placement.pins.items():
            declared = placement.table.c[key]
            if declared.name == column:
                element = (id(scope), number)
                return _Place(element, scope, pin, declared, number, True)
        return None

    def _in_subquery(
        self, inner: Scope | None, scope: Scope, number: int, column: str
    ) -> _Place | None:
        """Return the pin that a column of a subquery passes on."""
        if inner is None:
            return None
        named = [ref for name, ref in inner.outputs if name == column]
        if not named:
            named = [
                replace(ref, column=column)
                for name, ref in inner.outputs
                if name == "*" and ref is not None
            ]
        found = [self._place(ref, inner) for ref in named if ref is not None]
        if len(named) != 1 or found[:1] in ([], [None]):
            return None
        place = found[0]
        assert place is not None
        filters_inside = (
            place.filters_inside
            and place.scope is inner
            # A criterion on one use of a CTE says nothing of its other uses.
            and self._references[id(inner)] == 1
            and inner.not_rowwise is None
        )
        return replace(
            place, scope=scope, outermost=number, filters_inside=filters_inside
        )


def _filtered(place: _Place, scope: Scope, filters: frozenset[int]) -> bool:
    """Return whether a criterion in *scope* filters the rows behind *place*.

    It filters none of a scope around, whose columns it may compare with.
    """
    inside = place.scope is scope and place.outermost in filters
    return inside and place.filters_inside


def _equal_alike(here: _Place, there: _Place) -> bool:
    """Return whether equal values of the two columns name one slot."""
    if here.pin.family != there.pin.family or here.element == there.element:
        return False
    types = (here.column.type, there.column.type)
    converted = any(isinstance(t, TypeDecorator) for t in types)
    return not converted or type(types[0]) is type(types[1])


def _sent_as_it_is(
    slot: Callable[[object], int | None], sole: bool
) -> Callable[[object], int | None]:
    """Return *slot* for values that no type of SQLAlchemy's prepares.

    The driver decides by the Python type how PostgreSQL sees them.
    """

    def slot_of(value: object) -> int | None:
        kind = type(value)
        if isinstance(value, Enum) or (
            hasattr(value, "__index__")
            and not (kind is int or kind.__module__ == "numpy")
        ):
            return None
        if kind is str and not sole:
            return None
        return slot(value)

    return slot_of
