"""Who should own which slots: even by weight, moving as little as can be.

The ideal share of each shard is its weight's part of all slots, rounded by largest
remainder, so no shard is more than one slot from even. A change takes slots only from
owners above their new share and gives them only to owners below it, so exactly the
share that must move moves; slots are taken in the longest runs there are, which keeps
arcs, and with them the ownership checks and publications, few.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from shardalchemy.ring.slots import SLOTS, Ring

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["allocate", "reallocate"]


def _shares(weights: Mapping[str, float], held: Mapping[str, int]) -> dict[str, int]:
    """Return each shard's number of slots; ties go to who already holds more."""
    if not weights or any(not weight >= 0 for weight in weights.values()):
        raise ValueError("weights must be given, and none may be negative")
    total = sum(weights.values())
    if not 0 < total < float("inf"):
        raise ValueError("at least one weight must be positive, and all finite")
    exact = {shard: SLOTS * weight / total for shard, weight in weights.items()}
    shares = {shard: int(value) for shard, value in exact.items()}
    by_remainder = sorted(
        weights,
        key=lambda shard: (
            shares[shard] - exact[shard],
            shares[shard] - held.get(shard, 0),
            shard,
        ),
    )
    for shard in by_remainder[: SLOTS - sum(shares.values())]:
        shares[shard] += 1
    return shares


def allocate(weights: Mapping[str, float] | Sequence[str]) -> Ring:
    """Return a new ring in which each shard owns one arc, in the order given.

    *weights* maps shards to relative sizes; a plain sequence of names means equal ones.
    """
    given = weights if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    shares = _shares(given, {})
    return Ring(tuple(shard for shard in given for _ in range(shares[shard])))


def reallocate(ring: Ring, weights: Mapping[str, float]) -> Ring:
    """Return *ring* with its slots shared out anew by *weights*.

    A shard that *weights* leaves out, or weighs zero, gives up all it has. The number
    of slots that change owner is the least possible.
    """
    held = ring.counts()
    shares = _shares(weights, held)
    surplus = {shard: held[shard] - shares.get(shard, 0) for shard in held}
    deficit = {
        shard: share - held.get(shard, 0)
        for shard, share in shares.items()
        if share > held.get(shard, 0)
    }
    owners = list(ring.owners)
    for taker in sorted(deficit, key=lambda shard: (-deficit[shard], shard)):
        wanted = deficit[taker]
        while wanted:
            donor = max(surplus, key=lambda shard: (surplus[shard], shard))
            first, size = _longest_run(owners, donor)
            size = min(size, wanted, surplus[donor])
            # From the run's end, so that what the donor keeps stays one run too.
            last = first + _run_length(owners, first)
            owners[last - size : last] = [taker] * size
            surplus[donor] -= size
            wanted -= size
    return Ring(tuple(owners))


def _run_length(owners: Sequence[str], first: int) -> int:
    size = 1
    while first + size < len(owners) and owners[first + size] == owners[first]:
        size += 1
    return size


def _longest_run(owners: Sequence[str], shard: str) -> tuple[int, int]:
    """Return the first slot and the length of *shard*'s longest run."""
    best = (0, 0)
    position = 0
    for owner, run in groupby(owners):
        size = sum(1 for _ in run)
        if owner == shard and size > best[1]:
            best = (position, size)
        position += size
    return best
