"""Sets of slots as expressions over a statement's parameters.

An expression is built once a statement; `evaluate` gives the slots for one execution.
``None`` stands for all slots: a value that does not pin, or nothing that restricts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import BindParameter


__all__ = ["AllOf", "AnyOf", "Arguments", "Nowhere", "SlotSet", "Value"]


UNKNOWN = object()
"""The value of a parameter that this execution does not tell."""


class Arguments:
    """The parameter values of one execution.

    ``extracted`` are the bound parameters of the statement's cache key, in its order;
    ``given`` are the parameters passed beside the statement, which go before them.
    """

    __slots__ = ("extracted", "given")

    def __init__(
        self,
        extracted: Sequence[BindParameter[Any]],
        given: Mapping[str, Any],
    ) -> None:
        self.extracted = extracted
        self.given = given


@dataclass(frozen=True, slots=True)
class Value:
    """The slot of one parameter's value, or of each value of an expanding one.

    ``index`` is the parameter's place in the cache key; one that is not in the key has
    ``parameter`` itself, whose value is part of the statement.
    """

    slot: Callable[[object], int | None]
    index: int | None
    parameter: BindParameter[Any]
    expanding: bool

    def read(self, arguments: Arguments) -> Any:
        """Return the parameter's value for this execution, or `UNKNOWN`."""
        parameter = (
            self.parameter if self.index is None else arguments.extracted[self.index]
        )
        given = arguments.given
        if given and parameter.key in given:
            return given[parameter.key]
        if parameter.callable is not None:
            return parameter.effective_value
        if not parameter.unique:
            # A parameter with a name may be given its value by a statement around.
            return UNKNOWN
        return parameter.value

    def is_list_of(self, key: str) -> bool:
        """Return whether this is the list that a loader passes under *key*."""
        return self.expanding and self.parameter.key == key

    def lists(self) -> Iterator[Value]:
        """Yield the lists of values in this set: itself, if it is one."""
        if self.expanding and self.index is not None:
            yield self

    def by_owner(
        self, arguments: Arguments, owners: Sequence[str]
    ) -> dict[str, list[Any]] | None:
        """Return the values of a list, by the shard that owns them.

        None where one of them says of no shard.
        """
        values = self.read(arguments)
        if not isinstance(values, list | tuple | set | frozenset):
            return None
        found: dict[str, list[Any]] = {}
        for value in values:
            if value is not None:
                slot = self.slot(value)
                if slot is None:
                    return None
                found.setdefault(owners[slot], []).append(value)
        return found

    def evaluate(self, arguments: Arguments) -> set[int] | None:
        """Return the slots of the value or values."""
        value = self.read(arguments)
        if value is UNKNOWN:
            return None
        if not self.expanding:
            slot = None if value is None else self.slot(value)
            # `= NULL` is true of no row, so it needs no shard.
            return set() if value is None else None if slot is None else {slot}
        if not isinstance(value, list | tuple | set | frozenset):
            return None
        slots = set()
        for item in value:
            if item is None:
                continue
            slot = self.slot(item)
            if slot is None:
                return None
            slots.add(slot)
        return slots


@dataclass(frozen=True, slots=True)
class Nowhere:
    """No slot at all: a criterion that no row fulfils."""

    def is_list_of(self, key: str) -> bool:
        """Return False."""
        return False

    def lists(self) -> Iterator[Value]:
        """Yield nothing."""
        return iter(())

    def evaluate(self, arguments: Arguments) -> set[int] | None:
        """Return the empty set."""
        return set()


@dataclass(frozen=True, slots=True)
class AllOf:
    """The slots in all of several sets."""

    parts: tuple[SlotSet, ...]

    def is_list_of(self, key: str) -> bool:
        """Return whether one of the sets is the list that a loader passes."""
        return any(part.is_list_of(key) for part in self.parts)

    def lists(self) -> Iterator[Value]:
        """Yield the lists of values in all of the sets."""
        for part in self.parts:
            yield from part.lists()

    def evaluate(self, arguments: Arguments) -> set[int] | None:
        """Return the intersection; a part that does not restrict is left out."""
        found: set[int] | None = None
        for part in self.parts:
            slots = part.evaluate(arguments)
            if slots is not None:
                found = slots if found is None else found & slots
        return found


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The slots in any of several sets."""

    parts: tuple[SlotSet, ...]

    def is_list_of(self, key: str) -> bool:
        """Return False."""
        return False

    def lists(self) -> Iterator[Value]:
        """Yield the lists of values in all of the sets."""
        for part in self.parts:
            yield from part.lists()

    def evaluate(self, arguments: Arguments) -> set[int] | None:
        """Return the union; a part that does not restrict makes it all slots."""
        found: set[int] = set()
        for part in self.parts:
            slots = part.evaluate(arguments)
            if slots is None:
                return None
            found |= slots
        return found


SlotSet = Value | Nowhere | AllOf | AnyOf


def all_of(parts: Iterable[SlotSet]) -> SlotSet | None:
    """Return the sets' intersection, or None where there are none."""
    given = tuple(parts)
    if not given:
        return None
    return given[0] if len(given) == 1 else AllOf(given)
