"""What the buyers of a sale saw; values that processes send and that add up."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Tally", "quantile"]


@dataclass(slots=True)
class Tally:
    """Transactions by what they were, what they met, and how long they took.

    ``latencies`` holds the seconds of each committed transaction, from its begin to
    the return of its commit, by use case and by the number of shards it wrote on.
    ``refusals`` are what the shop answers instead of an order, ``errors`` what nobody
    expects, ``warnings`` what the library logged. ``orders`` are the ids of those that
    a buyer was told are placed. ``seconds`` is how long the sale lasted.
    """

    latencies: defaultdict[tuple[str, int], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    refusals: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    orders: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what *other* saw of the same sale."""
        for key, latencies in other.latencies.items():
            self.latencies[key] += latencies
        self.refusals += other.refusals
        self.errors += other.errors
        self.warnings += other.warnings
        self.orders += other.orders
        self.seconds = max(self.seconds, other.seconds)

    @property
    def use_cases(self) -> list[str]:
        """The use cases of which there was a transaction, in order of their names."""
        return sorted({use_case for use_case, _ in self.latencies})

    def of(self, use_case: str) -> list[float]:
        """Return the seconds that each transaction of *use_case* took."""
        return [
            seconds
            for (name, _), latencies in self.latencies.items()
            if name == use_case
            for seconds in latencies
        ]

    def by_participants(self, use_case: str | None = None) -> dict[int, list[float]]:
        """Return the seconds of *use_case*, or of all, by the shards written on."""
        found: defaultdict[int, list[float]] = defaultdict(list)
        for (name, participants), latencies in self.latencies.items():
            if use_case in (None, name):
                found[participants] += latencies
        return dict(sorted(found.items()))


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest of *values* that *share* of them do not exceed.

    >>> quantile([0.4, 0.1, 0.3, 0.2], 0.5)
    0.2
    """
    ordered = sorted(values)
    rank = -int(-len(ordered) * share // 1)  # rounded up
    return ordered[max(rank, 1) - 1]
