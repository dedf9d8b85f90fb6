"""What each client wrote down: what it was about to do, and what it was told.

Each line goes to the system in one write, before the transaction and after it, so that
a client that is killed has either said what it was told or has not: unknown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bank.history import Outcome
from tests.bank.plans import Plan

__all__ = ["Entry", "Journal", "Sums", "read_journals"]


Reads = list[tuple[int, list[int]]]


class Journal:
    """One incarnation's file; any of its threads may write to it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def intend(self, plan: Plan) -> None:
        self._write({"intent": plan.as_json()})

    def told(
        self,
        plan: Plan,
        outcome: Outcome,
        reads: Reads,
        error: str | None = None,
    ) -> None:
        line = {"told": plan.id, "outcome": outcome.value, "reads": reads}
        self._write({**line, "error": error})

    def snapshot(
        self, began: float, strict: bool, total: int, accounts: int, reads: Reads
    ) -> None:
        how = {"began": began, "strict": strict}
        self._write({"snapshot": [total, accounts], **how, "reads": reads})

    def failed(self, what: str, error: str) -> None:
        self._write({"failed": what, "error": error})

    def quiet(self) -> None:
        """Say that all transactions have ended, and none will begin."""
        self._write({"quiet": True})

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps({**line, "at": round(time.time(), 3)}) + "\n"
        os.write(self._file, data.encode())


@dataclass(slots=True)
class Entry:
    """A transaction as its client knows it."""

    client: str
    plan: Plan
    began: float
    outcome: Outcome = Outcome.UNKNOWN
    reads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    error: str | None = "(the client ended before it was told)"
    ended: float | None = None


@dataclass(slots=True)
class Sums:
    """A look at all accounts, and at some lists, in one snapshot."""

    client: str
    began: float
    """Before it was opened."""
    strict: bool
    total: int
    accounts: int
    reads: tuple[tuple[int, tuple[int, ...]], ...]


def read_journals(directory: Path) -> tuple[list[Entry], list[Sums], list[str]]:
    """Return all transactions, all snapshots, and what failed beside them."""
    entries: list[Entry] = []
    sums: list[Sums] = []
    failures: list[str] = []
    for path in sorted(directory.glob("*.jsonl")):
        known: dict[int, Entry] = {}
        for line in _lines(path):
            reads = tuple((key, tuple(values)) for key, values in line.get("reads", ()))
            if "intent" in line:
                plan = Plan.of_json(line["intent"])
                known[plan.id] = Entry(path.stem, plan, line["at"])
            elif "told" in line:
                entry = known[line["told"]]
                entry.outcome = Outcome(line["outcome"])
                entry.reads = reads
                entry.error = line["error"]
                entry.ended = line["at"]
            elif "snapshot" in line:
                how = line["began"], line["strict"]
                sums.append(Sums(path.stem, *how, *line["snapshot"], reads))
            elif "failed" in line:
                failures.append(f"{path.stem}: {line['failed']}: {line['error']}")
        entries += known.values()
    return entries, sums, failures


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # or the machine ended within it
            yield json.loads(line)
