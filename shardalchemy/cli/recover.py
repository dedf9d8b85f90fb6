"""``shardalchemy recover``: finish what is left prepared, once or again and again."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from shardalchemy.cli.txns import printable
from shardalchemy.commit.counters import Counters
from shardalchemy.commit.listing import State, prepared_transactions
from shardalchemy.commit.recovery import Recovery

if TYPE_CHECKING:
    from rich.console import Console

    from shardalchemy.cli.shards import Shards
    from shardalchemy.commit import Listing, RecoveryReport

__all__ = ["recover_once", "watch"]


def recover_once(console: Console, shards: Shards, grace: float) -> bool:
    """Recover what is older than *grace* seconds; return if nothing is in doubt."""
    said = _Said(console)
    report, after = _round(shards, grace)
    said.about(report, after)
    young = [t for t in after if t.state is not State.FOREIGN and t.grace_left > 0]
    if young:
        console.print(
            f"{len(young)} younger than the grace time of {grace:g} s, left to"
            " the sessions that prepared them"
        )
    if not (report.committed or report.rolled_back or report.in_doubt or young):
        asked = " on the shards that answer" if after.unreachable else ""
        console.print(f"Nothing to recover{asked}.")
    return not report.in_doubt and not after.unreachable


def watch(console: Console, shards: Shards, grace: float, interval: float) -> None:
    """Do so every *interval* seconds, half as long or longer by chance, for ever.

    Prints a line for each change, and waits for servers that are away.
    """
    said = _Said(console)
    console.print(
        f"Recovering what is older than {grace:g} s, every {interval:g} s or so."
    )
    while True:
        said.about(*_round(shards, grace))
        time.sleep(interval * random.uniform(0.5, 1.5))


def _round(shards: Shards, grace: float) -> tuple[RecoveryReport, Listing]:
    recovery = Recovery(shards.connect, lambda: shards.topology, Counters())
    report = recovery.recover(grace)
    return report, prepared_transactions(shards.connect, shards.topology, grace)


class _Said:
    """What has been printed, so that nothing is printed again before it changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._in_doubt: set[str] = set()
        self._unreachable: set[str] = set()

    def about(self, report: RecoveryReport, after: Listing) -> None:
        """Print what *report* has, and *after* it, that is news."""
        for gid in report.committed:
            self._console.print(f"committed    {gid}")
        for gid in report.rolled_back:
            self._console.print(f"rolled back  {gid}")
        waits = {t.gid: t.waits_for for t in after}
        for gid in report.in_doubt:
            if gid not in self._in_doubt:
                reason = waits.get(gid, "a shard that was out of reach")
                self._console.print(f"in doubt     {gid}  waits for {reason}")
        self._in_doubt = set(report.in_doubt)
        for shard, reason in after.unreachable.items():
            if shard not in self._unreachable:
                self._console.print(
                    f"shard {shard} is out of reach: {printable(reason)}"
                )
        for shard in sorted(self._unreachable - after.unreachable.keys()):
            self._console.print(f"shard {shard} answers again")
        self._unreachable = set(after.unreachable)
