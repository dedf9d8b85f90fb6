"""Recovery and housekeeping in the background of every process that uses a cluster.

One thread a cluster. It looks at every shard each `INTERVAL` seconds, half as much or
twice as much by chance, so that many processes do not look at the same moment; at a
shard where it finds something, an advisory lock lets one process work at a time.
"""

from __future__ import annotations

import logging
import random
import weakref
from functools import partial
from typing import TYPE_CHECKING

from shardalchemy.engine import Background

if TYPE_CHECKING:
    import threading

    from shardalchemy.commit.transactions import Transactions

__all__ = ["GRACE", "INTERVAL", "Patrol"]

INTERVAL = 2.0
"""Seconds between two looks, on average."""

GRACE = 3.0
"""Seconds for which a prepared transaction is left to the session that prepared it."""

logger = logging.getLogger(__name__)

_CLEAN_EVERY = 15  # rounds


class Patrol:
    """Goes round for *transactions*, which it does not keep alive, until `close`."""

    def __init__(self, transactions: Transactions) -> None:
        self._thread = Background(
            "shardalchemy-recovery", partial(_go_round, weakref.ref(transactions))
        )

    def start(self) -> None:
        """Start the thread, if it does not run."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that waits for a server that hangs is left behind."""
        self._thread.close(1.0)


def _go_round(transactions: weakref.ref[Transactions], ended: threading.Event) -> None:
    # Not the module's: an application, or its tests, may have seeded that.
    chance = random.Random()
    rounds = chance.randrange(_CLEAN_EVERY)
    has_failed = False
    while not ended.wait(INTERVAL * chance.uniform(0.5, 1.5)):
        mine = transactions()
        if mine is None:
            return
        rounds += 1
        try:
            mine.recovery.recover(GRACE, alone=True)
            if rounds % _CLEAN_EVERY == 0:
                mine.housekeeping.clean()
            has_failed = False
        except Exception as error:
            # The next round may find the servers as they should be.
            if not has_failed:
                logger.warning("recovery goes on after an error: %s", error)
            has_failed = True
        del mine
