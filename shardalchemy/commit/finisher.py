"""The second step of commits that nobody waits for, and the markers' removal.

One thread a cluster, started with its first commit that leaves a marker. It sends
``COMMIT PREPARED`` for transactions acknowledged when they were prepared, repeats what
failed elsewhere, and deletes markers in batches once every participant has committed
and `RETENTION` has passed. What it cannot do before the process ends, recovery will,
and `housekeeping` deletes the markers.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc

from shardalchemy.engine import attempt_all
from shardalchemy.engine.wire import driver_of, is_lost, simple_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import Connection

    from shardalchemy.commit.gid import Gid

__all__ = ["RETENTION", "Finisher"]

RETENTION = 10.0
"""Seconds for which the marker of a transaction over several shards is kept.

From when it is known to have committed everywhere. Snapshots rely on it.
"""

logger = logging.getLogger(__name__)

_BATCH = 500
_GIVE_UP = 300.0  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_FORGET_EVERY = 1.0  # seconds
_VACUUM_AFTER = 20_000  # markers deleted on one shard

# A gid holds only [0-9a-f:/], so it stands in these literals as it is.
_SETTLE = "{command} PREPARED '{branch}'"
# Whose loss in a crash changes nothing: so it need not wait for the disk.
_FORGET = """
    BEGIN;
    SET LOCAL synchronous_commit = off;
    DELETE FROM shardalchemy.txn WHERE gid = ANY ('{{{gids}}}');
    COMMIT
"""
# Autovacuum looks once a minute: too seldom for a table that is all new by then. On one
# that this role may not vacuum, it is all there is.
_VACUUM = "VACUUM (SKIP_LOCKED, TRUNCATE FALSE) shardalchemy.txn"


@dataclass(slots=True, eq=False)
class _Work:
    """The second step of one transaction on some of its participants."""

    gid: Gid
    command: str
    branches: dict[str, str]
    done: Future[None] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    marker_on: tuple[str, ...] = ()


class Finisher:
    """Finishes decided transactions of one cluster; ``connect`` opens connections."""

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._markers: deque[tuple[float, Gid, tuple[str, ...]]] = deque()
        self._lone: deque[tuple[Gid, str]] = deque()
        self._deleted: defaultdict[str, int] = defaultdict(int)
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def commit(
        self, gid: Gid, branches: Mapping[str, str], *, marked: Iterable[str]
    ) -> Future[None]:
        """Commit what is prepared; the result is done when every shard has.

        *marked* are the shards with the transaction's markers, to be deleted after it.
        """
        work = _Work(gid, "COMMIT", dict(branches), marker_on=tuple(marked))
        return self._put(work)

    def roll_back(self, gid: Gid, branches: Mapping[str, str]) -> Future[None]:
        """Roll back what is prepared."""
        return self._put(_Work(gid, "ROLLBACK", dict(branches)))

    def forget(self, gid: Gid, shards: Iterable[str]) -> None:
        """Delete the markers of a transaction over several shards, in time."""
        self._started()
        self._markers.append((time.monotonic(), gid, tuple(shards)))

    def forget_alone(self, gid: Gid, shard: str) -> None:
        """Delete the marker of a transaction on one shard, whose outcome is known."""
        self._started()
        self._lone.append((gid, shard))

    def close(self) -> None:
        """Finish what is queued, delete markers that are old, and end the thread."""
        with self._lock:
            thread = self._thread
            self._thread = None
        if thread is not None and self._process == os.getpid():
            self._queue.put(None)
            thread.join()

    def _put(self, work: _Work) -> Future[None]:
        self._started()
        self._queue.put(work)
        return work.done

    def _started(self) -> None:
        if self._thread is not None and self._process == os.getpid():
            return
        with self._lock:
            if self._process != os.getpid():
                self._reset()  # a fork has the queue, but not the thread
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="shardalchemy-finisher", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        ending = False
        waiting: list[_Work] = []
        pause = _SHORTEST_PAUSE
        forgot_at = time.monotonic()
        while not ending:
            works, ending = self._next(wait=pause if waiting else _FORGET_EVERY)
            waiting = self._finish(waiting + works) if waiting or works else []
            pause = min(pause * 2, _LONGEST_PAUSE) if waiting else _SHORTEST_PAUSE
            now = time.monotonic()
            if now - forgot_at >= _FORGET_EVERY:
                forgot_at = now
                self._forget(now - RETENTION)
        for work in waiting:
            logger.warning("%s is left to recovery on %s", work.gid, [*work.branches])
            work.done.cancel()
        # Other processes' snapshots may need the younger ones: `housekeeping` has them.
        self._forget(time.monotonic() - RETENTION)

    def _next(self, wait: float) -> tuple[list[_Work], bool]:
        works: list[_Work] = []
        try:
            item = self._queue.get(timeout=wait)
            while item is not None:
                works.append(item)
                if len(works) == _BATCH:
                    return works, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return works, False
        return works, True

    def _finish(self, works: list[_Work]) -> list[_Work]:
        """Carry out a batch; return what has to be tried again."""
        by_shard: defaultdict[str, list[_Work]] = defaultdict(list)
        for work in works:
            for shard in work.branches:
                by_shard[shard].append(work)

        def settle(shard: str, connection: Connection) -> None:
            for work in by_shard[shard]:
                branch = work.branches[shard]
                try:
                    simple_query(
                        connection, _SETTLE.format(command=work.command, branch=branch)
                    )
                except sa_exc.DBAPIError as error:
                    # Where another has done it, the name is not to be found.
                    if not isinstance(error.orig, psycopg.errors.UndefinedObject):
                        raise
                del work.branches[shard]

        self._visit(settle, by_shard)
        again = []
        for work in works:
            if not work.branches:
                if work.marker_on:
                    self._markers.append((time.monotonic(), work.gid, work.marker_on))
                work.done.set_result(None)
            elif time.monotonic() - work.since < _GIVE_UP:
                again.append(work)
            else:
                shards = [*work.branches]
                logger.warning("%s is left to recovery on %s", work.gid, shards)
                work.done.cancel()
        return again

    def _visit(
        self, step: Callable[[str, Connection], None], shards: Iterable[str]
    ) -> set[str]:
        """Run a step on every shard at once; return where it was done."""
        with ExitStack() as stack:
            connections: dict[str, Connection] = {}
            for shard in shards:
                try:
                    connection = self._connect(shard)
                except sa_exc.SQLAlchemyError as error:
                    logger.warning("shard %s is not to be reached: %s", shard, error)
                else:
                    connections[shard] = stack.enter_context(connection)
            outcomes = attempt_all(step, connections)
            done = set()
            for shard, outcome in outcomes.items():
                if isinstance(outcome, Exception):
                    logger.warning("shard %s: %s", shard, outcome)
                    if is_lost(driver_of(connections[shard])):
                        connections[shard].invalidate()
                else:
                    done.add(shard)
            return done

    def _forget(self, older_than: float) -> None:
        """Delete the markers of transactions that were finished before a time."""
        by_shard: defaultdict[str, list[Gid]] = defaultdict(list)
        while self._markers and self._markers[0][0] <= older_than:
            _, gid, shards = self._markers.popleft()
            for shard in shards:
                by_shard[shard].append(gid)
        while self._lone:
            gid, shard = self._lone.popleft()
            by_shard[shard].append(gid)
        if not by_shard:
            return

        def delete(shard: str, connection: Connection) -> None:
            gids = by_shard[shard]
            for start in range(0, len(gids), _BATCH):
                some = ",".join(map(str, gids[start : start + _BATCH]))
                simple_query(connection, _FORGET.format(gids=some))
            self._deleted[shard] += len(gids)
            if self._deleted[shard] >= _VACUUM_AFTER:
                self._deleted[shard] = 0
                simple_query(connection, _VACUUM)

        # What stays where it failed is left to housekeeping.
        self._visit(delete, by_shard)
