"""Declarations: where a table's rows live, read from ``Table.info``.

``sharded_by`` and ``reference_table`` only leave a mark. `placement_of` reads it, once
a table, into a `Placement`: the kind of table, and its **pins**, the columns whose
value alone says in which slot a row lives. Pins are the shard key, locator columns, and
columns that are a foreign key to a locator. Each is held to the row's slot by a CHECK,
so trusting a pin is exact. `checked` says in words what cannot be honoured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Date,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy import Enum as SqlEnum
from sqlalchemy import exc as sa_exc

from shardalchemy.errors import DeclarationError
from shardalchemy.ids import LOCATOR_SLOT_SQL, Locator, locator_slot
from shardalchemy.ring import KEY_TYPES, KeyType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import MetaData
    from sqlalchemy.types import TypeEngine

__all__ = [
    "Kind",
    "Pin",
    "Placement",
    "checked",
    "key_family",
    "placement_of",
    "reference_table",
    "sharded_by",
]

_INFO_KEY = "shardalchemy"


@dataclass(frozen=True, slots=True)
class _ShardedBy:
    column: str


@dataclass(frozen=True, slots=True)
class _ReferenceTable:
    pass


def sharded_by(column: str) -> dict[str, Any]:
    """Return the ``info`` of a table whose rows live where *column* hashes to.

    The column must be NOT NULL, of a type that the ring hashes (integers, text, uuid,
    bytea, date), and part of the primary key, unless that is a ``locator_id``. Tables
    with equal keys are colocated: a customer and its orders share a shard.

        __table_args__ = {"info": sharded_by("customer_id")}
        Table("orders", metadata, ..., info=sharded_by("customer_id"))
    """
    return {_INFO_KEY: _ShardedBy(column)}


def reference_table() -> dict[str, Any]:
    """Return the ``info`` of a table of which every shard holds a full copy.

    It is written on all shards in one transaction, and read on whichever is at hand.
    """
    return {_INFO_KEY: _ReferenceTable()}


class Kind(Enum):
    """What `Placement.kind` says of a table."""

    HOME = "home"
    REFERENCE = "reference"
    SHARDED = "sharded"


@dataclass(frozen=True, slots=True)
class Pin:
    """How a column's value says in which slot its row lives.

    Two columns of one ``family`` that are equal name the same slot. ``slot`` returns
    None for a value that PostgreSQL would not compare in the column's own type.
    ``slot_sql`` and ``hash_sql`` are the same in SQL, with ``{0}`` for the column.
    """

    family: str
    slot: Callable[[object], int | None] = field(compare=False)
    slot_sql: str = field(compare=False)
    hash_sql: str = field(compare=False)
    accepts: str = field(compare=False)


LOCATOR_PIN = Pin(
    "locator",
    locator_slot,
    LOCATOR_SLOT_SQL,
    f"(({LOCATOR_SLOT_SQL} - 2048)::bigint << 52)",
    "a uuid.UUID",
)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a table's rows live.

    ``column`` decides for a sharded table, through ``pin``; ``pins`` are all columns
    of the table that say the same, by their key in the table.
    """

    table: Table
    kind: Kind
    column: Column[Any] | None = None
    pin: Pin | None = None
    pins: Mapping[str, Pin] = field(default_factory=dict)

    @property
    def column_name(self) -> str:
        """The name of the column that decides, as the database has it."""
        return "" if self.column is None else self.column.name

    def slot_of_values(self, values: Mapping[str, Any]) -> int | None:
        """Return the slot of a row given by column keys, or None if it names none."""
        if self.column is None or self.pin is None or self.column.key not in values:
            return None
        return self.pin.slot(values[self.column.key])


_placements: WeakKeyDictionary[Table, Placement] = WeakKeyDictionary()


def placement_of(table: Table, resolving: frozenset[Table] = frozenset()) -> Placement:
    """Return where *table*'s rows live; *resolving* are those being found out.

    An unannotated table whose whole primary key is a foreign key to the whole primary
    key of a sharded table, as joined inheritance makes it, lives beside that table;
    any other unannotated table is a home table. Raises DeclarationError where the
    annotation names no usable column.
    """
    found = _placements.get(table)
    if found is None:
        if table in resolving:  # foreign keys in a circle lead to no parent
            return Placement(table, Kind.HOME)
        found = _placements[table] = _resolve(table, resolving | {table})
    return found


def _resolve(table: Table, resolving: frozenset[Table]) -> Placement:
    mark = table.info.get(_INFO_KEY)
    if mark is None:
        beside = _beside_its_parent(table, resolving)
        return beside or Placement(table, Kind.HOME)
    if isinstance(mark, _ReferenceTable):
        return Placement(table, Kind.REFERENCE)
    if not isinstance(mark, _ShardedBy):
        raise DeclarationError(
            f"{table}: info['{_INFO_KEY}'] is {mark!r}; write"
            " info=sharded_by('column') or info=reference_table()."
        )
    column = table.c.get(mark.column)
    if column is None:
        column = next((c for c in table.c if c.name == mark.column), None)
    if column is None:
        raise DeclarationError(
            f"{table} is sharded_by({mark.column!r}), but has no such column; it has"
            f" {', '.join(c.key for c in table.c)}."
        )
    locators = _locators(table, resolving)
    pin = locators.get(column.key) or _key_pin(table, column)
    return Placement(table, Kind.SHARDED, column, pin, {column.key: pin, **locators})


def _beside_its_parent(table: Table, resolving: frozenset[Table]) -> Placement | None:
    """Return the placement of a joined-inheritance child, from its parent's."""
    primary_key = set(table.primary_key.columns)
    for constraint in table.foreign_key_constraints:
        if not primary_key or set(constraint.columns) != primary_key:
            continue
        for element in constraint.elements:
            try:
                target = element.column
            except sa_exc.InvalidRequestError:
                break  # a table of another MetaData, or one not yet declared
            if target.table is table or not target.primary_key:
                break
            parent = placement_of(target.table, resolving)
            pin = parent.pins.get(target.key)
            if pin is not None:
                column = element.parent
                pins = {column.key: pin, **_locators(table, resolving)}
                return Placement(table, Kind.SHARDED, column, pin, pins)
    return None


def _locators(table: Table, resolving: frozenset[Table]) -> dict[str, Pin]:
    """Return the locator columns of *table*, and foreign keys to locators of others."""
    found = {}
    for column in table.c:
        if isinstance(column.info.get(_INFO_KEY), Locator):
            found[column.key] = LOCATOR_PIN
            continue
        for foreign_key in column.foreign_keys:
            try:
                target = foreign_key.column
            except sa_exc.InvalidRequestError:
                continue
            if target.table is table:
                is_locator = isinstance(target.info.get(_INFO_KEY), Locator)
            else:
                pins = placement_of(target.table, resolving).pins
                is_locator = pins.get(target.key) is LOCATOR_PIN
            if is_locator:
                found[column.key] = LOCATOR_PIN
    return found


def _key_pin(table: Table, column: Column[Any]) -> Pin:
    type_: TypeEngine[Any] = column.type
    convert: Callable[[object], object] | None = None
    if isinstance(type_, TypeDecorator):
        convert = _bind_conversion(type_)
        type_ = type_.impl_instance
    key_type = _key_type(type_)
    if key_type is None:
        raise DeclarationError(
            f"{table} is sharded_by({column.key!r}), whose type is {column.type!r}."
            " A shard key is smallint, integer, bigint, text, varchar, uuid, bytea or"
            " date: types that PostgreSQL hashes alike on all servers."
        )
    return Pin(
        # A converted value is hashed as stored; equal columns still name equal slots.
        key_type.name,
        key_type.slot if convert is None else _converted(key_type, convert),
        f"(({key_type.hash_sql} >> 52) + 2048)".replace("{}", "{0}"),
        key_type.hash_sql.replace("{}", "{0}"),
        key_type.accepts,
    )


def _key_type(type_: TypeEngine[Any]) -> KeyType | None:
    type_ = type_._variant_mapping.get("postgresql", type_)
    if isinstance(type_, SmallInteger | Integer | BigInteger):
        return KEY_TYPES["int8"]
    if isinstance(type_, Uuid):
        return KEY_TYPES["uuid"] if type_.native_uuid else None
    if isinstance(type_, SqlEnum | CHAR) or type_.__visit_name__ == "CITEXT":
        return None  # enum labels, blank padding and case folding hash as others do not
    if isinstance(type_, String):
        return KEY_TYPES["text"]
    if isinstance(type_, LargeBinary):
        return KEY_TYPES["bytea"]
    if isinstance(type_, Date):
        return KEY_TYPES["date"]
    return None


def key_family(type_: TypeEngine[Any]) -> str | None:
    """Return the name of the key type that values of *type_* are compared in."""
    key_type = _key_type(type_)
    return None if key_type is None else key_type.name


def _bind_conversion(type_: TypeDecorator[Any]) -> Callable[[object], object]:
    # Imported late: an application that only declares models does without it.
    from sqlalchemy.dialects import postgresql

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return lambda value: type_.process_bind_param(value, dialect)


def _converted(
    key_type: KeyType, convert: Callable[[object], object]
) -> Callable[[object], int | None]:
    return lambda value: key_type.slot(convert(value))


def checked(metadata: MetaData) -> list[Placement]:
    """Return the placements of all tables, in order of their dependencies.

    Raises DeclarationError for the first table that cannot be kept as declared.
    """
    placements = [placement_of(table) for table in metadata.sorted_tables]
    for placement in placements:
        if placement.kind is Kind.SHARDED:
            _check_sharded(placement)
        else:
            _check_locators_absent(placement)
        for constraint in placement.table.foreign_key_constraints:
            _check_foreign_key(placement, constraint)
    return placements


def _check_sharded(placement: Placement) -> None:
    table, column = placement.table, placement.column
    assert column is not None
    if column.nullable:
        raise DeclarationError(
            f"{table}.{column.name} is the shard key and may be NULL; a row without a"
            " key has no shard. Declare it nullable=False."
        )
    if column.computed is not None:
        raise DeclarationError(
            f"{table}.{column.name} is the shard key and is computed by the server;"
            " the session must know it before it knows the server. Shard by a column"
            " that it is computed from."
        )
    pins = set(placement.pins)
    if not table.primary_key.columns:
        raise DeclarationError(f"{table} is sharded and has no primary key.")
    if not pins & {c.key for c in table.primary_key.columns}:
        raise DeclarationError(
            f"{table} is sharded_by({column.key!r}), which is not part of its primary"
            f" key ({', '.join(c.name for c in table.primary_key.columns)}): nothing"
            " would keep that key unique across shards. Add the column to the primary"
            " key, or make the primary key a locator_id()."
        )
    for name, columns in _uniques(table):
        if not pins & {c.key for c in columns}:
            names = ", ".join(c.name for c in columns) or "an expression"
            raise DeclarationError(
                f"{table}: {name or 'a unique constraint'} on ({names}) cannot"
                f" hold across shards. Add {column.name} to it, or keep the value in a"
                f" table of its own that is sharded_by({names!r}) and written in the"
                " same transaction."
            )


def _uniques(table: Table) -> Iterator[tuple[object, list[Column[Any]]]]:
    """Yield the name and the plain columns of all that must be unique but the key."""
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield constraint.name, list(constraint.columns)
        elif constraint.__visit_name__ == "exclude_constraint":
            yield constraint.name, []
    for index in table.indexes:
        if index.unique:
            yield index.name, list(index.columns)


def _check_locators_absent(placement: Placement) -> None:
    for column in placement.table.c:
        if isinstance(column.info.get(_INFO_KEY), Locator):
            raise DeclarationError(
                f"{placement.table}.{column.name} is a locator_id(), but the table is"
                f" a {placement.kind.value} table; locators name the slot of a shard"
                " key. Use an ordinary primary key, or add sharded_by(…)."
            )


def _check_foreign_key(placement: Placement, constraint: ForeignKeyConstraint) -> None:
    target = placement_of(constraint.referred_table)
    here, there = placement.kind, target.kind
    if there is Kind.REFERENCE or here is there is Kind.HOME:
        return
    name = f"{placement.table} → {target.table}"
    if here is there is Kind.SHARDED:
        for element in constraint.elements:
            pin = target.pins.get(element.column.key)
            if pin is not None and pin == placement.pins.get(element.parent.key):
                return
        raise DeclarationError(
            f"foreign key {name}: the two rows may live on different shards, where"
            " PostgreSQL cannot check it. Make the shard keys part of it"
            f" ({placement.column_name} → {target.column_name}), refer to a"
            " locator_id(), or drop the constraint and keep the relationship with"
            " primaryjoin and foreign()."
        )
    raise DeclarationError(
        f"foreign key {name}: a {here.value} table cannot refer to a {there.value}"
        " table, whose rows are on other servers. Shard both by one key, make"
        f" {target.table} a reference_table() if it is small and seldom written, or"
        " drop the constraint."
    )
