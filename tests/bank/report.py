"""What happened in a run, in a few lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.bank.audit import Finding
from tests.bank.journal import Entry

__all__ = ["Report"]


@dataclass(slots=True)
class Report:
    """What happened in a run."""

    seed: int
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    in_doubt: int = 0
    longest_in_doubt: float = 0.0
    resolved_after: float | None = None
    snapshots: int = 0
    markers: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    evidence: str = ""

    def count(self, entries: Iterable[Entry]) -> None:
        """Count what the clients were told."""
        for entry in entries:
            self.outcomes[entry.outcome.value] += 1
            if entry.error:
                self.errors[_kind(entry.error)] += 1

    def __str__(self) -> str:
        resolved = (
            "not resolved"
            if self.resolved_after is None
            else f"{self.resolved_after:.1f} s after the last fault"
        )
        lines = [
            f"bank: {self.seconds:.0f} s of faults, seed {self.seed}",
            f"faults        {_counts(self.faults)}",
            f"cuts made     {_counts(self.cuts)}",
            f"transactions  {_counts(self.outcomes)}",
            f"errors        {_counts(self.errors)}",
            f"in doubt      {self.in_doubt} seen for over a second, the longest"
            f" {self.longest_in_doubt:.1f} s; all resolved: {resolved}",
            f"snapshots     {self.snapshots} checked",
            f"markers left  {_counts(Counter(self.markers))}",
            f"anomalies     {len(self.findings)}",
        ]
        lines += (f"  {finding.what}" for finding in self.findings[:40])
        return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {n}" for what, n in sorted(counter.items())) or "none"


def _kind(error: str) -> str:
    match = re.search(r"\(psycopg\.(?:errors\.)?(\w+)\)", error)
    return match[1] if match else error.partition(":")[0]
