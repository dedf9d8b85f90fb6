"""What explains a finding: who did what at that time, and what the servers said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.bank.audit import Finding
from tests.bank.journal import Entry

__all__ = ["evidence"]

_SHOWN = 8


def evidence(
    findings: Sequence[Finding],
    faults: Iterable[tuple[float, str]],
    logs: Mapping[str, Path],
) -> Iterator[str]:
    """Yield, for each finding, its transactions and what happened meanwhile.

    *faults* are the times of faults and what they were, *logs* the files by name.
    """
    faults = list(faults)
    stamped = {name: [*_stamped(path)] for name, path in logs.items()}
    for finding in findings[:_SHOWN]:
        yield f"\n== {finding.what}"
        for entry in finding.entries[:4]:
            yield from _about(entry)
            start, end = entry.began - 2, (entry.ended or entry.began) + 12
            for at, fault in faults:
                if start - 8 <= at <= end:
                    yield f"  {_clock(at)} fault: {fault}"
            for name, lines in stamped.items():
                if name[0] == "c" and name != entry.client.partition(".")[0]:
                    continue
                near = [f"  {name}: {line}" for at, line in lines if start <= at <= end]
                yield from near[:60]
    for name, path in logs.items():
        if name[0] == "s":
            yield f"\n== the end of {name}'s log\n"
            yield "".join(path.read_text(errors="replace").splitlines(True)[-15:])


def _about(entry: Entry) -> Iterator[str]:
    ended = "never" if entry.ended is None else _clock(entry.ended)
    yield f"  {entry.client} began at {_clock(entry.began)}: {entry.plan}"
    yield f"  told at {ended}: {entry.outcome.value}; {entry.error}"


def _stamped(path: Path) -> Iterator[tuple[float, str]]:
    """Yield a log's lines that begin with a time, with that time."""
    for line in path.read_text(errors="replace").splitlines():
        match = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3})", line)
        if match:
            at = datetime.fromisoformat(match[1]).replace(tzinfo=UTC)
            yield at.timestamp(), line[11:400]


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")[:-3]
