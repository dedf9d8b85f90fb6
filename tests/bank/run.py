"""One run of the bank: open it, torment it, heal it, and look at its books."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bank.audit import Books, Finding, audit
from tests.bank.doubt import DoubtWatch, wait_until_resolved
from tests.bank.evidence import evidence
from tests.bank.faults import faults
from tests.bank.journal import read_journals
from tests.bank.processes import Bank
from tests.bank.report import Report
from tests.bank.tormentor import Tormentor

__all__ = ["run"]

RESOLVED_WITHIN = 10.0
"""Seconds after the last fault within which nothing is in doubt any more."""
MARKERS_KEPT = 240.0
"""Seconds after which no marker is left, if a process has been there for so long."""
_SLACK = 45.0
"""Seconds for which a slow machine is waited for, where no promise is measured."""


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
    report.findings += _left_open(bank)
    report.findings += _left_of_markers(bank, report)
    for client in bank.clients.values():
        client.ask_to_stop()
    for name, client in bank.clients.items():
        status = client.wait(_SLACK)
        if status != 0:
            report.findings.append(Finding(f"{name} did not end well: {status}"))

    say("stopped")
    entries, snapshots, failures = read_journals(bank.directory)
    report.count(entries)
    report.snapshots = len(snapshots)
    report.findings += map(Finding, failures)
    report.findings += audit(Books.read(bank.servers), entries, snapshots)
    say("looked at the books")
    if report.findings:
        logs = dict(bank.logs())
        report.evidence = "\n".join(evidence(report.findings, tormentor.log, logs))


def _left_open(bank: Bank) -> Iterator[Finding]:
    """Yield transactions that clients have left open on servers, with their locks."""
    sql = """
        SELECT pid, state, now() - xact_start, query FROM pg_stat_activity
        WHERE state LIKE 'idle in transaction%'
    """
    # Recovery and housekeeping have some, for a moment.
    if not _wait_until(lambda: not bank.servers.where(sql), seconds=5):
        for shard, rows in bank.servers.where(sql).items():
            yield Finding(f"left open on {shard}: {rows}")


def _left_of_markers(bank: Bank, report: Report) -> Iterator[Finding]:
    kept = f"""
        SELECT outcome, count(*), max(clock_timestamp() - at)::text
        FROM shardalchemy.txn WHERE at < now() - interval '{MARKERS_KEPT:.0f} s'
        GROUP BY outcome
    """
    for shard in bank.servers:
        ((count,),) = bank.servers.rows(shard, "SELECT count(*) FROM shardalchemy.txn")
        report.markers[shard] = count
        for outcome, count, oldest in bank.servers.rows(shard, kept):
            yield Finding(
                f"{count} markers ({outcome}) on {shard} are over {MARKERS_KEPT:.0f} s"
                f" old, the oldest {oldest}"
            )


def _wait_until(condition: Callable[[], bool], seconds: float = _SLACK) -> bool:
    """Return whether it came about within so many seconds."""
    end = time.monotonic() + seconds
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
