"""A plan: which shards run a statement, and why."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Plan", "PlanKind", "PlanPiece"]


class PlanKind(Enum):
    """How a statement is run."""

    ROUTE = "route"
    SCATTER = "scatter"
    COMBINE = "combine"
    GATHER = "gather"


@dataclass(frozen=True, slots=True)
class PlanPiece:
    """What several shards run for a statement that is combined or gathered.

    ``title`` says what comes back, ``sql`` what each of ``shards`` runs, with names
    for its parameters.
    """

    name: str
    title: str
    sql: str
    shards: tuple[str, ...]
    reason: str = ""

    def _lines(self) -> list[str]:
        where = ", ".join(self.shards) or "no shard"
        why = f" ({self.reason})" if self.reason else ""
        return [
            f"  -> {self.name}: {self.title}, on {where}{why}",
            *textwrap.indent(self.sql, " " * 7).splitlines(),
        ]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which shards run a statement; ``reason`` says of each why it is among them.

    ``route``: one shard, the statement untouched. ``scatter``: several at once, their
    rows concatenated in no promised order. ``combine``: the shards do most of it, and
    ``shards[0]`` puts together what they made. ``gather``: the rows that are needed
    are brought to ``shards[0]``, and the statement runs there over them. The last two
    have ``pieces``, which is what the shards run, and ``steps``, what is done after.
    """

    kind: PlanKind
    shards: tuple[str, ...]
    reason: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[PlanPiece, ...] = ()
    steps: str = ""

    def __str__(self) -> str:
        first = self.shards[0]
        if self.kind is PlanKind.ROUTE:
            return f"Route to {first}: {self.reason.get(first, '')}"
        if self.kind is PlanKind.SCATTER:
            lines = [f"Scatter to {len(self.shards)} shards, rows concatenated"]
            lines += [
                f"  -> {shard}: {self.reason.get(shard, '')}" for shard in self.shards
            ]
            return "\n".join(lines)
        verb = "Combine" if self.kind is PlanKind.COMBINE else "Gather"
        lines = [f"{verb} on {first}: {self.steps}"]
        for piece in self.pieces:
            lines += piece._lines()
        return "\n".join(lines)
