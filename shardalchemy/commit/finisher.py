"""The second step of commits that nobody waits for, and the markers' removal.

One thread a cluster, started with its first commit that leaves a marker. It sends
``COMMIT PREPARED`` for transactions acknowledged when they were prepared, repeats what
failed elsewhere, and deletes markers in batches once every participant has committed
and `RETENTION` has passed. What it cannot do before the process ends, recovery will,
and `housekeeping` deletes the markers.
"""

from __future__ import annotations

import atexit
import logging
import queue
import time
import weakref
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import exc as sa_exc

from shardalchemy.commit.protocol import Reply
from shardalchemy.commit.settling import settled
from shardalchemy.engine import Background, Visits, kept_if_sound
from shardalchemy.engine.wire import simple_query

if TYPE_CHECKING:
    import threading
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
_PATIENCE = 5.0  # seconds for which a visit to a shard is waited for
_GIVE_UP = 300.0  # seconds
_ENDING = 10.0  # seconds that a close waits for the thread
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
    marker_on: tuple[str, ...] = ()
    since: float = field(default_factory=time.monotonic)
    done: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        # From here on nobody who waits for it can cancel it.
        self.done.set_running_or_notify_cancel()

    def leave(self) -> None:
        """Leave what is not done to recovery."""
        shards = ", ".join(self.branches)
        logger.warning("%s is left to recovery on %s", self.gid, shards)
        self.done.set_exception(TimeoutError(f"{self.gid} has not reached {shards}"))


class Finisher:
    """Finishes decided transactions of one cluster; ``connect`` opens connections."""

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._queue: _Queue = queue.SimpleQueue()
        self._markers: deque[tuple[float, Gid, tuple[str, ...]]] = deque()
        self._lone: deque[tuple[Gid, str]] = deque()
        self._deleted: defaultdict[str, int] = defaultdict(int)
        self._visits = Visits()
        self._thread = Background(
            "shardalchemy-finisher", partial(_run, weakref.ref(self), self._queue)
        )
        _finishers.add(self)

    def commit(
        self, gid: Gid, branches: Mapping[str, str], *, marked: Iterable[str]
    ) -> Future[None]:
        """Commit what is prepared; the result is done when every shard has.

        It has an exception if that was left to recovery. *marked* are the shards with
        the transaction's markers, to be deleted after it.
        """
        return self._put(_Work(gid, "COMMIT", dict(branches), tuple(marked)))

    def roll_back(self, gid: Gid, branches: Mapping[str, str]) -> Future[None]:
        """Roll back what is prepared."""
        return self._put(_Work(gid, "ROLLBACK", dict(branches)))

    def forget(self, gid: Gid, shards: Iterable[str]) -> None:
        """Delete the markers of a transaction over several shards, in time."""
        self._thread.start()
        self._markers.append((time.monotonic(), gid, tuple(shards)))

    def forget_alone(self, gid: Gid, shard: str) -> None:
        """Delete the marker of a transaction on one shard, whose outcome is known."""
        self._thread.start()
        self._lone.append((gid, shard))

    def close(self) -> None:
        """Finish what is queued, delete the markers that are due, and end the thread.

        What a server that hangs holds up for too long is left to recovery.
        """
        self._thread.close(_ENDING, wake=lambda: self._queue.put(None))

    def _put(self, work: _Work) -> Future[None]:
        self._queue.put(work)
        self._thread.start()
        return work.done

    # -- in the thread -----------------------------------------------------------------

    def finish(self, works: list[_Work]) -> list[_Work]:
        """Carry out a batch; return what has to be tried again."""
        by_shard: defaultdict[str, list[_Work]] = defaultdict(list)
        for work in works:
            for shard in work.branches:
                by_shard[shard].append(work)
        told: defaultdict[str, list[_Work]] = defaultdict(list)

        def settle(shard: str, connection: Connection) -> None:
            for work in by_shard[shard]:
                sql = _SETTLE.format(command=work.command, branch=work.branches[shard])
                try:
                    simple_query(connection, sql)
                except sa_exc.DBAPIError as error:
                    if settled(error) is not Reply.DONE:
                        raise
                told[shard].append(work)

        self._visit(settle, by_shard)
        for shard, done in told.items():
            for work in list(done):
                work.branches.pop(shard, None)
        again = []
        for work in works:
            if not work.branches:
                if work.marker_on:
                    self._markers.append((time.monotonic(), work.gid, work.marker_on))
                work.done.set_result(None)
            elif time.monotonic() - work.since < _GIVE_UP:
                again.append(work)
            else:
                work.leave()
        return again

    def forget_until(self, older_than: float) -> None:
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

    def _visit(
        self, step: Callable[[str, Connection], None], shards: Iterable[str]
    ) -> None:
        """Run a step on every shard at once; one that hangs holds up no other."""

        def visit(shard: str) -> None:
            with kept_if_sound(self._connect(shard)) as connection:
                step(shard, connection)

        answers = self._visits.at_once(visit, shards, time.monotonic() + _PATIENCE)
        for shard, answer in answers.items():
            if isinstance(answer, Exception):
                logger.warning("shard %s: %s", shard, answer)


_Queue = queue.SimpleQueue[_Work | None]

_finishers: weakref.WeakSet[Finisher] = weakref.WeakSet()


def _run(
    finisher: weakref.ref[Finisher], works: _Queue, ending: threading.Event
) -> None:
    """Do what is queued, until it is to end and nothing is; a `Finisher`'s thread."""
    waiting: list[_Work] = []
    pause = _SHORTEST_PAUSE
    forgot_at = time.monotonic()
    is_last = False
    while not is_last:
        waiting += _next(works, wait=pause if waiting else _FORGET_EVERY)
        is_last = ending.is_set() and works.empty()
        present = finisher()
        if present is None:
            break
        try:
            if waiting:
                waiting = present.finish(waiting)
            now = time.monotonic()
            if is_last or now - forgot_at >= _FORGET_EVERY:
                forgot_at = now
                # Younger ones are still needed by snapshots: at the end they are left
                # to housekeeping.
                present.forget_until(now - RETENTION)
        except Exception:
            logger.exception("commits are finished on after an error")
        pause = min(pause * 2, _LONGEST_PAUSE) if waiting else _SHORTEST_PAUSE
        del present
    for work in waiting:
        work.leave()


def _next(works: _Queue, wait: float) -> list[_Work]:
    """Return what is queued, up to a batch of it; None only wakes who waits."""
    found: list[_Work] = []
    try:
        item = works.get(timeout=wait)
        while True:
            if item is not None:
                found.append(item)
            if len(found) == _BATCH:
                return found
            item = works.get_nowait()
    except queue.Empty:
        return found


@atexit.register
def _close_all() -> None:
    """Finish what was acknowledged before the interpreter ends, if servers let it."""
    for finisher in list(_finishers):
        finisher.close()
