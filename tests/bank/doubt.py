"""Watch what is prepared on the servers, and for how long."""

from __future__ import annotations

import contextlib
import threading
import time

import psycopg

from tests.conftest import Servers

__all__ = ["DoubtWatch", "wait_until_resolved"]

_LOOK_EVERY = 0.25
_IN_DOUBT_AFTER = 1.0
"""Seconds after which a prepared transaction's own session has certainly lost it."""

_PREPARED = "SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8"


class DoubtWatch:
    """The ages that prepared transactions have come to, seen in passing."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._ages: dict[str, float] = {}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(shard,), daemon=True)
            for shard in servers
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def in_doubt(self) -> dict[str, float]:
        """The branches that were seen in doubt, with the seconds they were."""
        return {g: age for g, age in self._ages.items() if age > _IN_DOUBT_AFTER}

    @property
    def transactions(self) -> int:
        """How many transactions were seen in doubt on any shard."""
        return len({branch.partition("/")[0] for branch in self.in_doubt})

    @property
    def longest(self) -> float:
        """How long one was in doubt, in seconds."""
        return max(self.in_doubt.values(), default=0.0)

    def _watch(self, shard: str) -> None:
        while not self._over.wait(_LOOK_EVERY):
            # A server that is down, or has just come up, is looked at again.
            with (
                contextlib.suppress(psycopg.Error),
                self._servers.connect(shard) as one,
            ):
                while not self._over.wait(_LOOK_EVERY):
                    rows = one.execute(f"{_PREPARED} FROM pg_prepared_xacts").fetchall()
                    for gid, age in rows:
                        self._ages[gid] = max(self._ages.get(gid, 0.0), age)


def wait_until_resolved(servers: Servers, timeout: float) -> float | None:
    """Return after how many seconds nothing is prepared that is prepared now.

    None if something still is, or a server does not answer, after *timeout* seconds.
    """
    began = time.monotonic()
    left: set[tuple[str, str]] | None = None
    while left is None or left:
        if time.monotonic() - began > timeout:
            return None
        # A server whose backend was killed is up again by itself, in a moment.
        with contextlib.suppress(psycopg.OperationalError):
            prepared = servers.prepared()
            now = {(shard, gid) for shard, rows in prepared.items() for (gid,) in rows}
            left = now if left is None else left & now
        time.sleep(0.05)
    return time.monotonic() - began
