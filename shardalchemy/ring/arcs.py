"""Arcs: runs of neighbouring slots with one owner, and the same in SQL."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from shardalchemy.ring.slots import slot_range

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["arcs", "multirange"]


def arcs(owners: Sequence[str], shard: str) -> list[tuple[int, int]]:
    """Return *shard*'s runs of slots as ``(first, last)``, both included.

    >>> arcs(["a", "a", "b", "a"], "a")
    [(0, 1), (3, 3)]
    """
    found = []
    position = 0
    for owner, run in groupby(owners):
        size = sum(1 for _ in run)
        if owner == shard:
            found.append((position, position + size - 1))
        position += size
    return found


def multirange(owners: Sequence[str], shard: str) -> str:
    """Return the hashes *shard* owns as the text of an ``int8multirange``.

    The text is PostgreSQL's own canonical form, so it is also what
    ``pg_get_constraintdef`` shows of a constraint made with it.

    >>> multirange(["a"] * 4096, "b")
    '{}'
    """
    ranges = []
    for first, last in arcs(owners, shard):
        low, high = slot_range(first, last)
        ranges.append(f"[{low},{'' if high is None else high})")
    return "{" + ",".join(ranges) + "}"
