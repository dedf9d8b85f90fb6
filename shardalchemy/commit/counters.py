"""Counts of what has happened to a process's transactions; ``Cluster.counters``.

==========================  ========================================================
``commits.<n>``             transactions committed on *n* shards that they wrote on;
                            ``commits.1`` only where they wrote on a sharded table
``aborts``                  commits that ended with nothing on any shard
``deadlocks``               sessions cancelled to end a deadlock between shards
``in_doubt.waits``          prepared transactions that sessions were seen to wait for,
                            other programs' included
``in_doubt.resolved``       of these, those that were resolved because of it
``lost_replies``            commits whose reply was lost, whatever came of it
``unknown``                 of these, those that raised CommitOutcomeUnknown
``recovery.committed``      transactions that recovery has committed; one that two
                            processes recover at once counts in both
``recovery.rolled_back``    transactions that recovery has rolled back
``recovery.in_doubt``       times that recovery had to leave one in doubt
``in_doubt.waits``          transactions in doubt whose rows a session has waited for
``in_doubt.resolved``       of these, those that were resolved for it
``deadlocks``               transactions cancelled to end a deadlock between shards
``snapshots``               snapshots that were opened
``snapshot.retries``        times that one was opened anew, since it tore a transaction
``snapshot.gates``          times that commits were held back to open one
``run.retries``             times that ``cluster.run`` has run a function again
==========================  ========================================================

A lost reply is resolved by recovery, so it counts there as well.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NAMES", "Counters"]

NAMES = (
    "aborts",
    "deadlocks",
    "in_doubt.resolved",
    "in_doubt.waits",
    "lost_replies",
    "recovery.committed",
    "recovery.in_doubt",
    "recovery.rolled_back",
    "run.retries",
    "snapshot.gates",
    "snapshot.retries",
    "snapshots",
    "unknown",
)
"""The names that are there from the start, with 0; ``commits.<n>`` come as they do."""


class Counters:
    """Counts by name, from the start of the process; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(dict.fromkeys(NAMES, 0))

    def add(self, name: str, count: int = 1) -> None:
        """Add *count* to a name's."""
        with self._lock:
            self._counts[name] += count

    def read(self) -> Mapping[str, int]:
        """Return all counts, as they are now."""
        with self._lock:
            return dict(sorted(self._counts.items()))
