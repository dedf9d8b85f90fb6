"""A plan: which shards run a statement, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Plan", "PlanKind"]


class PlanKind(Enum):
    """How a statement is run."""

    ROUTE = "route"
    SCATTER = "scatter"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which shards run a statement; ``reason`` says of each why it is among them.

    ``route``: one shard, the statement untouched. ``scatter``: several at once, their
    rows concatenated in no promised order.
    """

    kind: PlanKind
    shards: tuple[str, ...]
    reason: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind is PlanKind.ROUTE:
            (shard,) = self.shards
            return f"Route to {shard}: {self.reason.get(shard, '')}"
        lines = [f"Scatter to {len(self.shards)} shards, rows concatenated"]
        lines += [
            f"  -> {shard}: {self.reason.get(shard, '')}" for shard in self.shards
        ]
        return "\n".join(lines)
