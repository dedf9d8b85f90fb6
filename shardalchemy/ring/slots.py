"""Slots and the ring: who owns which part of the hash space."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SLOTS", "Ring", "slot_of_hash", "slot_range"]

SLOTS = 4096
"""The number of equal cuts of the signed 64-bit hash space: a hash's top 12 bits."""

_LOWEST_HASH = -(1 << 63)
_SLOT_WIDTH = 1 << 52


def slot_of_hash(value: int) -> int:
    """Return the slot, 0 to 4095, of a signed 64-bit hash."""
    return (value >> 52) + 2048


def slot_range(first: int, last: int) -> tuple[int, int | None]:
    """Return the hashes of slots *first* to *last*, both included, as ``[low, high)``.

    ``high`` is None where the run ends the hash space: no bigint lies above it.
    """
    low = _LOWEST_HASH + first * _SLOT_WIDTH
    high = _LOWEST_HASH + (last + 1) * _SLOT_WIDTH
    return low, (None if last == SLOTS - 1 else high)


@dataclass(frozen=True, slots=True)
class Ring:
    """The owners of all slots.

    ``owners[slot]`` is the name of the shard whose rows hash to that slot.
    """

    owners: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.owners) != SLOTS:
            raise ValueError(f"a ring has {SLOTS} owners, not {len(self.owners)}")

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards that own at least one slot, in order of their names."""
        return tuple(sorted(set(self.owners)))

    def counts(self) -> Mapping[str, int]:
        """Return how many slots each owner has."""
        return Counter(self.owners)
