"""Rows locked by a prepared transaction, met by a session that waits for them.

Such a transaction is in the middle of its commit, for some milliseconds; or nobody is
left who will end it. So one that is waited for, and is not quite young, is recovered at
once, without waiting for a recovery's own time. What other programs have prepared is
theirs to end: it is reported.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardalchemy.commit.blocking import PreparedHolder
    from shardalchemy.commit.counters import Counters
    from shardalchemy.commit.recovery import Recovery

__all__ = ["GRACE", "InDoubt"]

GRACE = 2.0
"""Seconds since it prepared after which a transaction is recovered if waited for."""

logger = logging.getLogger(__name__)

_AGAIN = 5.0  # seconds after an attempt that left a transaction in doubt
_AT_ONCE = 8  # threads


class InDoubt:
    """Sees to prepared transactions of one cluster that sessions wait for.

    *cluster* returns the cluster's id. Each transaction has a thread of its own while
    it is resolved: a participant that is away takes its time.
    """

    def __init__(
        self,
        recovery: Recovery,
        cluster: Callable[[], str],
        counters: Counters,
        grace: float = GRACE,
    ) -> None:
        self._recovery = recovery
        self._cluster = cluster
        self._counters = counters
        self._grace = grace
        self._reported: set[str] = set()
        self._resolving: set[str] = set()
        self._tried: dict[str, float] = {}

    def meet(self, holder: PreparedHolder) -> None:
        """Report a transaction that is waited for, and resolve it if it is ours."""
        if holder.age < self._grace:
            return
        gid = Gid.parse(holder.gid)
        if gid is not None and gid.cluster != self._cluster()[:8]:
            gid = None
        name = holder.gid if gid is None else str(gid)
        if name not in self._reported:
            self._reported.add(name)
            self._counters.add("in_doubt.waits")
            logger.warning(
                "shard %s: process %d waits for %s, which the prepared transaction %s"
                " has had for %.1f s. %s",
                holder.shard,
                holder.waiter,
                holder.lock,
                holder.gid,
                holder.age,
                "It is not one of this cluster's and is left alone: whoever has"
                " prepared it has to commit it or to roll it back."
                if gid is None
                else "It is in doubt, and is resolved now.",
            )
        if (
            gid is not None
            and name not in self._resolving
            and len(self._resolving) < _AT_ONCE
            and time.monotonic() >= self._tried.get(name, 0.0)
        ):
            self._resolving.add(name)
            threading.Thread(
                target=self._resolve,
                args=(gid,),
                name="shardalchemy-resolve",
                daemon=True,
            ).start()

    def _resolve(self, gid: Gid) -> None:
        name = str(gid)
        try:
            outcome = self._recovery.resolve(gid)
        except Exception as error:
            # It is tried again as long as something waits.
            logger.warning("%s could not be resolved: %s", gid, error)
        else:
            if outcome is Decision.RECOVER:
                logger.warning("%s stays in doubt: a participant is away", gid)
            else:
                self._counters.add("in_doubt.resolved")
        self._tried[name] = time.monotonic() + _AGAIN
        self._resolving.discard(name)
