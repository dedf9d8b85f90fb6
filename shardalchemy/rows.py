"""Where an object's row lives, for the unit of work.

A stored object's slot comes from its identity key, which always holds a pin: reading
an attribute could start a load in the middle of a flush. A new object's slot comes
from its shard key; what can be generated for it, the key's default, a locator, a
number from the home shard's sequence, is generated here, before its connection is
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Table
from sqlalchemy.sql import ClauseElement

from shardalchemy.errors import ShardKeyError
from shardalchemy.ids import Locator, new_locator
from shardalchemy.schema import Kind, Pin, placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Column
    from sqlalchemy.orm import InstanceState, Mapper

__all__ = ["RowPlacement", "generated_default", "row_placement"]

_NO_VALUE = object()


@dataclass(frozen=True, slots=True, eq=False)
class RowPlacement:
    """Where the rows of one mapper live.

    ``key_attribute`` holds the shard key, ``identity_index`` is the place in the
    identity key of a column that pins, and ``counted`` are attributes that the home
    shard's sequence counts.
    """

    kind: Kind
    name: str = ""
    pin: Pin | None = None
    key_column: Column[Any] | None = None
    key_attribute: str = ""
    identity_index: int = 0
    identity_attribute: str = ""
    identity_pin: Pin | None = None
    locators: tuple[str, ...] = ()
    pinned: tuple[tuple[str, Pin], ...] = ()
    counted: tuple[tuple[str, Column[Any]], ...] = ()

    def stored_slot(self, state: InstanceState[Any]) -> int:
        """Return the slot of an object that has an identity."""
        assert self.identity_pin is not None
        assert state.key is not None
        slot = self.identity_pin.slot(state.key[1][self.identity_index])
        assert slot is not None
        return slot

    def slot_after(self, state: InstanceState[Any]) -> int:
        """Return the slot of a stored object's row once its changes are flushed.

        Raises ShardKeyError where its attributes do not name one slot together.
        """
        before = self.stored_slot(state)
        if not state.committed_state:
            return before
        slots: dict[str, int] = {}
        kept: list[str] = []
        for attribute, pin in self.pinned:
            value = state.dict.get(attribute, _NO_VALUE)
            if attribute not in state.committed_state:
                if value is not None:
                    kept.append(attribute)
                continue
            if value is None and attribute != self.key_attribute:
                continue  # it names no slot any more
            if value is None and state.manager.mapper._is_orphan(state):
                return before  # its row is being deleted
            slot = pin.slot(value)
            if slot is None:
                raise ShardKeyError(
                    f"{self.name}.{attribute} was changed to {value!r}: it says on"
                    f" which shard the row lives, and must be {pin.accepts}."
                )
            slots[attribute] = slot
        after = set(slots.values()) or {before}
        if len(after) == 1 and (after == {before} or not kept):
            return after.pop()
        moved = next((a for a, s in slots.items() if s != before), "")
        others = [a for a in (*kept, *slots) if a != moved]
        raise ShardKeyError(
            f"{self.name}.{moved} was changed to {state.dict[moved]!r}: it says on"
            f" which shard the row lives, and {' and '.join(others)} names the slot of"
            " another key. Delete the object and add a new one with that value."
        )

    def kept_slot(self, state: InstanceState[Any]) -> int:
        """Return a stored object's slot; raise ShardKeyError where it would move."""
        slot = self.stored_slot(state)
        if self.slot_after(state) != slot:
            raise ShardKeyError(
                f"the shard key of a {self.name} was changed, and the bulk methods do"
                " not move rows. Flush it with the session."
            )
        return slot

    def new_slot(
        self, state: InstanceState[Any], next_value: Callable[[Column[Any]], int]
    ) -> int:
        """Return the slot of an object to be inserted; generate what it lacks.

        Raises ShardKeyError where the shard key has no value that can be hashed.
        """
        return self.completed_slot(state.dict, next_value)

    def completed_slot(
        self, values: dict[str, Any], next_value: Callable[[Column[Any]], int]
    ) -> int:
        """Return a new row's slot by its attributes; add to them what they lack."""
        assert self.pin is not None
        for attribute, column in self.counted:
            if values.get(attribute) is None:
                values[attribute] = next_value(column)
        key = values.get(self.key_attribute)
        if key is None:
            assert self.key_column is not None
            key = generated_default(self.key_column)
            if key is None:
                raise ShardKeyError(
                    f"a new {self.name} has no {self.key_attribute}, which is its"
                    " shard key. Set it, or the relationship it comes from, before the"
                    " flush."
                )
            values[self.key_attribute] = key
        slot = self.pin.slot(key)
        if slot is None:
            what = "a SQL expression" if isinstance(key, ClauseElement) else repr(key)
            raise ShardKeyError(
                f"{self.name}.{self.key_attribute} is the shard key and is {what};"
                f" it must be {self.pin.accepts}."
            )
        for attribute in self.locators:
            given = values.get(attribute)
            if given is None:
                values[attribute] = new_locator(slot)
        return slot

    def slot_of_mapping(self, values: Mapping[str, Any]) -> int | None:
        """Return the slot of a stored row given by attribute names, or None.

        Raises ShardKeyError where the values would move the row to another slot.
        """
        assert self.identity_pin is not None
        value = values.get(self.identity_attribute)
        slot = None if value is None else self.identity_pin.slot(value)
        for attribute, pin in self.pinned:
            if slot is None or attribute not in values:
                continue
            if pin.slot(values[attribute]) != slot:
                raise ShardKeyError(
                    f"{self.name}.{attribute} of {value!r} would become"
                    f" {values[attribute]!r}: it says on which shard the row lives."
                    " Delete the row and insert it with that value."
                )
        return slot

    def peeked_slot(self, state: InstanceState[Any]) -> int | None:
        """Return a new object's slot if its key is set already; generate nothing."""
        key = state.dict.get(self.key_attribute)
        if key is None or self.pin is None:
            return None
        return self.pin.slot(key)


def _is_marker(value: object) -> bool:
    """Return whether *value* is SQLAlchemy's sign for "it was never loaded"."""
    return type(value).__name__ == "LoaderCallableStatus"


def generated_default(column: Column[Any]) -> Any:
    """Return the value of *column*'s Python-side default, or None if it has none.

    Raises ShardKeyError for a default that needs the other parameters of the INSERT.
    """
    default: Any = column.default
    if default is None or not (default.is_scalar or default.is_callable):
        return None
    if default.is_scalar:
        return default.arg
    try:
        return default.arg(None)
    except AttributeError as error:
        raise ShardKeyError(
            f"the default of {column} reads other values of the row, unknown"
            " when its shard is chosen. Set the shard key before the flush."
        ) from error


_known: WeakKeyDictionary[Mapper[Any], RowPlacement] = WeakKeyDictionary()


def row_placement(mapper: Mapper[Any]) -> RowPlacement:
    """Return where the rows of *mapper* live."""
    found = _known.get(mapper)
    if found is None:
        found = _known[mapper] = _resolve(mapper)
    return found


def _resolve(mapper: Mapper[Any]) -> RowPlacement:
    table = mapper.base_mapper.local_table
    if not isinstance(table, Table):
        return RowPlacement(Kind.HOME)
    placement = placement_of(table)
    name = mapper.class_.__name__
    if placement.kind is not Kind.SHARDED:
        return RowPlacement(placement.kind, name)
    assert placement.column is not None

    def attribute(column: Any) -> str:
        key: str = mapper.get_property_by_column(column).key
        return key

    identity_index = next(
        index
        for index, column in enumerate(mapper.primary_key)
        if column.key in placement.pins
    )
    counted = table.autoincrement_column
    return RowPlacement(
        placement.kind,
        name,
        placement.pin,
        placement.column,
        attribute(placement.column),
        identity_index,
        attribute(mapper.primary_key[identity_index]),
        placement.pins[str(mapper.primary_key[identity_index].key)],
        tuple(
            attribute(column)
            for column in table.c
            if isinstance(column.info.get("shardalchemy"), Locator)
        ),
        tuple((attribute(table.c[key]), pin) for key, pin in placement.pins.items()),
        () if counted is None else ((attribute(counted), counted),),
    )
