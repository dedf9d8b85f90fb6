"""Recovery and housekeeping in the background of every process that opens a cluster.

One thread a cluster. It looks at every shard each `INTERVAL` seconds, half as much or
twice as much by chance, so that many processes do not look at the same moment; at a
shard where it finds something, an advisory lock lets one process work at a time.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        self._transactions = weakref.ref(transactions)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = 0

    def start(self) -> None:
        """Start the thread, if it does not run in this process."""
        if self._process == os.getpid():
            return
        with self._lock:
            if self._process != os.getpid():
                self._process = os.getpid()
                self._ended = threading.Event()
                self._thread = threading.Thread(
                    target=_go_round,
                    args=(self._transactions, self._ended),
                    name="shardalchemy-recovery",
                    daemon=True,
                )
                self._thread.start()

    def close(self) -> None:
        """End the thread; one that waits for a server that hangs is left behind."""
        with self._lock:
            thread, self._thread = self._thread, None
            process, self._process = self._process, 0
        if process == os.getpid() and thread is not None:
            self._ended.set()
            thread.join(1.0)


def _go_round(transactions: weakref.ref[Transactions], ended: threading.Event) -> None:
    rounds = random.randrange(_CLEAN_EVERY)
    has_failed = False
    while not ended.wait(INTERVAL * random.uniform(0.5, 1.5)):
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
