"""What transactions did to lists of unique values, and what each was told.

After Elle (Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies from Experimental
Observations", VLDB 2020): where every transaction appends values that nobody else does,
a read of a list tells all the versions that the list has had, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

__all__ = ["Append", "Level", "Outcome", "Read", "Step", "Transaction"]


class Outcome(Enum):
    """What a client was told of a transaction."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"


class Level(Enum):
    """What a transaction's reads are promised to be."""

    SERIAL = "serial"
    """They have one order: what they read was locked, or all others waited."""
    SNAPSHOT = "snapshot"
    """All reads are of one moment, before or after any other transaction."""
    COMMITTED = "committed"
    """Each read is of committed rows of its own moment."""


@dataclass(frozen=True, slots=True)
class Append:
    key: int
    value: int
    kept: bool = True
    """False within a savepoint that was rolled back: nobody else may see it."""


@dataclass(frozen=True, slots=True)
class Read:
    key: int
    values: tuple[int, ...]


Step = Append | Read


@dataclass(frozen=True, slots=True, eq=False)
class Transaction:
    """One transaction's steps in their order; ``name`` is for people."""

    name: str
    outcome: Outcome
    steps: tuple[Step, ...]
    level: Level = Level.SERIAL

    def __str__(self) -> str:
        return self.name

    @property
    def appends(self) -> Iterator[Append]:
        return (step for step in self.steps if isinstance(step, Append))

    @property
    def reads(self) -> Iterator[Read]:
        return (step for step in self.steps if isinstance(step, Read))
