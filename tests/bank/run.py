"""One run of the bank: open it, torment it, heal it, and look at its books."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.bank.audit import Books, Finding, audit
from tests.bank.doubt import DoubtWatch, wait_until_resolved
from tests.bank.faults import faults
from tests.bank.journal import Entry, read_journals
from tests.bank.processes import Bank
from tests.bank.tormentor import Tormentor

__all__ = ["Report", "run"]

RESOLVED_WITHIN = 10.0
"""Seconds after the last fault within which nothing is in doubt any more."""
MARKERS_KEPT = 120.0
"""Seconds after which no marker of a transaction is left."""
_SHOWN = 8
_SLACK = 45.0
"""Seconds for which a slow machine is waited for, where no promise is measured."""


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

    def __str__(self) -> str:
        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{k} {n}" for k, n in sorted(counter.items())) or "none"

        resolved = (
            "not resolved"
            if self.resolved_after is None
            else f"{self.resolved_after:.1f} s after the last fault"
        )
        lines = [
            f"bank: {self.seconds:.0f} s of faults, seed {self.seed}",
            f"faults        {counts(self.faults)}",
            f"cuts made     {counts(self.cuts)}",
            f"transactions  {counts(self.outcomes)}",
            f"errors        {counts(self.errors)}",
            f"in doubt      {self.in_doubt} seen for over a second, the longest"
            f" {self.longest_in_doubt:.1f} s; all resolved: {resolved}",
            f"snapshots     {self.snapshots} checked",
            f"markers left  {counts(Counter(self.markers))}",
            f"anomalies     {len(self.findings)}",
        ]
        lines += (f"  {finding.what}" for finding in self.findings[:40])
        return "\n".join(lines)


def run(
    seconds: float,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    keep: Path | None = None,
) -> Report:
    """Torment a bank for so many seconds; the report says what came of it.

    *keep* is a new directory for journals and logs, which else are removed.
    """
    report = Report(seed, seconds)
    directory = keep or Path(tempfile.mkdtemp(prefix="bank-"))
    directory.mkdir(exist_ok=True)
    try:
        with Bank(directory, seed, seconds) as bank:
            _torment(bank, report, seconds, say)
            if keep is not None:
                for name, log in bank.logs():
                    if not log.is_relative_to(keep):
                        shutil.copy(log, keep / f"{name}.log")
    finally:
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    return report


def _torment(
    bank: Bank, report: Report, seconds: float, say: Callable[[str], None]
) -> None:
    say(f"seed {report.seed}; journals and logs in {bank.directory}")
    journals = bank.directory.glob
    if not _wait_until(lambda: len([*journals("*.jsonl")]) == len(bank.clients)):
        raise AssertionError(f"the clients did not start within {_SLACK:.0f} s")
    say("all are at work")
    watch = DoubtWatch(bank.servers)
    tormentor = Tormentor(bank)
    names = sorted(bank.clients)
    tormentor.run(faults(report.seed, [*bank.local.urls], names), seconds)
    tormentor.heal()
    say("healed")

    bank.config.quiet.touch()
    report.resolved_after = wait_until_resolved(bank.servers, RESOLVED_WITHIN)
    report.findings += _not_quiet(bank)
    watch.stop()
    say("quiet")

    report.faults, report.cuts = tormentor.counts, bank.proxy.cuts
    report.in_doubt, report.longest_in_doubt = watch.transactions, watch.longest
    report.findings += map(Finding, tormentor.errors)
    if report.resolved_after is None:
        report.findings.append(
            Finding(f"{RESOLVED_WITHIN:.0f} s after the last fault some are in doubt")
        )
    # Those that clients began after it are their own business, for a moment.
    wait_until_resolved(bank.servers, RESOLVED_WITHIN)
    for shard, rows in bank.servers.prepared().items():
        report.findings.append(Finding(f"prepared on {shard}: {rows}"))
    report.findings += _left_of_markers(bank, report)
    for client in bank.clients.values():
        client.ask_to_stop()
    for name, client in bank.clients.items():
        status = client.wait(_SLACK)
        if status != 0:
            report.findings.append(Finding(f"{name} did not end well: {status}"))

    say("stopped")
    entries, snapshots, failures = read_journals(bank.directory)
    report.outcomes.update(entry.outcome.value for entry in entries)
    report.errors.update(_kind(entry.error) for entry in entries if entry.error)
    report.snapshots = len(snapshots)
    report.findings += map(Finding, failures)
    report.findings += audit(Books.read(bank.servers), entries, snapshots)
    say("looked at the books")
    if report.findings:
        report.evidence = "\n".join(_evidence(bank, tormentor, report.findings))


def _kind(error: str) -> str:
    match = re.match(r"\w+: \(psycopg\.(?:errors\.)?(\w+)\)", error)
    return match[1] if match else error.partition(":")[0]


def _left_of_markers(bank: Bank, report: Report) -> Iterator[Finding]:
    count = "SELECT count(*), max(clock_timestamp() - at)::text FROM shardalchemy.txn"
    old = "SELECT count(*) FROM shardalchemy.txn WHERE at < now() - interval '{:.0f} s'"
    for shard in bank.servers:
        ((report.markers[shard], _),) = bank.servers.rows(shard, count)
        ((found,),) = bank.servers.rows(shard, old.format(MARKERS_KEPT))
        if found:
            yield Finding(
                f"{found} markers on {shard} are over {MARKERS_KEPT:.0f} s old"
            )


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Return whether it came about within `_SLACK` seconds."""
    end = time.monotonic() + _SLACK
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _not_quiet(bank: Bank) -> Iterator[Finding]:
    """Wait for the clients to end their work; yield those that do not."""
    clients = bank.clients.values()
    if _wait_until(lambda: all(client.is_quiet for client in clients)):
        return
    for client in clients:
        if not client.is_quiet:
            client.print_stacks()
            time.sleep(1.0)
            log = client.log.read_text(errors="replace")
            yield Finding(
                f"{client.name} has not ended its work {_SLACK:.0f} s after the last"
                f" fault; the end of its log:\n{log[-8000:]}"
            )


# -- what explains a finding -----------------------------------------------------------


def _evidence(
    bank: Bank, tormentor: Tormentor, findings: list[Finding]
) -> Iterator[str]:
    logs = {name: [*_stamped(path)] for name, path in bank.logs()}
    for finding in findings[:_SHOWN]:
        yield f"\n== {finding.what}"
        for entry in finding.entries[:4]:
            yield from _about(entry)
            start, end = entry.began - 2, (entry.ended or entry.began) + 12
            for at, fault in tormentor.log:
                if start - 8 <= at <= end:
                    yield f"  {_clock(at)} fault: {fault}"
            for name, lines in logs.items():
                if name[0] == "c" and name != entry.client.partition(".")[0]:
                    continue
                near = [f"  {name}: {line}" for at, line in lines if start <= at <= end]
                yield from near[:60]
    for name, path in bank.logs():
        if name in bank.local.servers:
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
