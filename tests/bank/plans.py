"""What a client means to do, chosen before it is begun so that it can be written down.

A plan is a pure choice of a seeded generator. All of a transaction's rows follow from
it, so that what the servers hold can be compared with it afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bank.model import BOARD, keys_of

__all__ = ["Choices", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction: a transfer, or appends and reads of lists."""

    id: int
    kind: str
    """``transfer``, ``lists``, ``look`` (at lists without locking them), ``notice``."""
    parts: tuple[tuple[int, int], ...] = ()
    """Of a transfer: accounts with what each gets; the sum is 0."""
    appends: tuple[tuple[int, int], ...] = ()
    """Of lists: keys with the value that each gets."""
    undone: tuple[int, int] | None = None
    """What is written within a savepoint and rolled back with it: one more of these."""
    reads: tuple[int, ...] = ()
    """The keys that are read; those of ``lists`` are locked first."""
    ack: str = "committed"
    way: str = "plain"
    """``plain`` or ``retried``; ``blind`` and ``abandoned`` are plain as well."""

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Plan:
        def fixed(value: Any) -> Any:
            return tuple(map(fixed, value)) if isinstance(value, list) else value

        return cls(**{name: fixed(value) for name, value in values.items()})


class Choices:
    """Plans without end, from a seed.

    ``accounts`` are those of each shard.
    """

    def __init__(
        self,
        seed: str,
        first_id: int,
        accounts: Mapping[str, Sequence[int]],
    ) -> None:
        self._random = random.Random(seed)
        self._id = first_id
        self._accounts = accounts

    def next(self, generation: int) -> Plan:
        """Return the next transaction; lists are taken from the generation."""
        self._id += 1
        chance = self._random.random()
        if chance < 0.5:
            return self._transfer()
        if chance < 0.53:
            value = self._id * 10
            return Plan(self._id, "notice", appends=((BOARD, value),), **self._how())
        keys = keys_of(generation)
        if chance < 0.92:
            return self._lists(keys)
        return Plan(self._id, "look", reads=tuple(self._random.sample(keys, 4)))

    def pause(self) -> float:
        """Return for how long to think before the next, in seconds."""
        return self._random.expovariate(1 / 0.08)

    def _transfer(self) -> Plan:
        pick = self._random
        count = pick.choice([1, 2, 2, 2, 3, 4])
        shards = pick.sample(sorted(self._accounts), count)
        accounts = [pick.choice(self._accounts[shard]) for shard in shards]
        if count == 1:
            accounts = pick.sample(self._accounts[shards[0]], 2)
        amounts = [pick.randint(1, 60) for _ in accounts[1:]]
        parts = list(zip(accounts, [-sum(amounts), *amounts], strict=True))
        undone = None
        if pick.random() < 0.2:
            shard = pick.choice(sorted(self._accounts))
            undone = (pick.choice(self._accounts[shard]), pick.randint(1, 60))
        return Plan(
            self._id,
            "transfer",
            parts=self._ordered(parts),
            undone=undone,
            **self._how(),
        )

    def _lists(self, keys: range) -> Plan:
        pick = self._random
        chosen = pick.sample(keys, pick.choice([1, 2, 2, 3, 4]))
        values = [(key, self._id * 10 + at) for at, key in enumerate(chosen)]
        undone = None
        # Appended after all else, so that it takes no lock out of order.
        if pick.random() < 0.2:
            undone = (pick.choice(chosen), self._id * 10 + 9)
        extra = [pick.choice(keys)] if pick.random() < 0.3 else []
        how = self._how()
        blind = how["way"] == "plain" and pick.random() < 0.4
        if blind:
            how["way"] = "blind"
        reads = [] if blind else sorted({*chosen, *extra})
        return Plan(
            self._id,
            "lists",
            appends=self._ordered(values),
            undone=undone,
            reads=self._ordered(reads),
            **how,
        )

    def _ordered(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Return items in the one order that keeps from deadlocks, or mostly."""
        if self._random.random() < 0.95:
            return tuple(sorted(items))
        return tuple(self._random.sample(items, len(items)))

    def _how(self) -> dict[str, Any]:
        return {
            "ack": self._random.choice(["committed", "prepared"]),
            "way": self._random.choice(["plain"] * 6 + ["retried"] * 3 + ["abandoned"]),
        }
