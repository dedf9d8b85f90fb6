"""The second step of commits that nobody waits for, and the markers' removal.

One thread a cluster, started with its first cross-shard commit. It sends ``COMMIT
PREPARED`` for transactions acknowledged when they were prepared, repeats what failed
elsewhere, and deletes markers in batches once every participant has committed and
`RETENTION` has passed. What it cannot do before the process ends, recovery will.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

from shardalchemy.engine import attempt_all
from shardalchemy.engine.wire import simple_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import Connection

    from shardalchemy.commit.gid import Gid

__all__ = ["RETENTION", "Finisher"]

RETENTION = 10.0
"""Seconds for which the marker of a committed transaction is kept."""

logger = logging.getLogger(__name__)

_BATCH = 500
_GIVE_UP = 300.0  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_FORGET = text("DELETE FROM shardalchemy.txn WHERE gid = ANY(:gids)")


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
        self._connections: dict[str, Connection] = {}
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
        """Delete the transaction's markers when their time has come."""
        self._started()
        self._markers.append((time.monotonic(), gid, tuple(shards)))

    def close(self) -> None:
        """Finish what is queued, delete the markers, and end the thread."""
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
        while not ending:
            works, ending = self._next(wait=pause if waiting else 1.0)
            waiting = self._finish(waiting + works) if waiting or works else []
            pause = min(pause * 2, _LONGEST_PAUSE) if waiting else _SHORTEST_PAUSE
            self._forget(time.monotonic() - RETENTION)
        if waiting:
            logger.warning("%d transactions are left to recovery", len(waiting))
        self._forget(time.monotonic())
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _next(self, wait: float) -> tuple[list[_Work], bool]:
        works: list[_Work] = []
        try:
            item = self._queue.get(timeout=wait)
            while item is not None and len(works) < _BATCH:
                works.append(item)
                item = self._queue.get_nowait()
        except queue.Empty:
            return works, False
        return works, item is None

    def _finish(self, works: list[_Work]) -> list[_Work]:
        """Carry out a batch; return what has to be tried again."""
        by_shard: defaultdict[str, list[_Work]] = defaultdict(list)
        for work in works:
            for shard in work.branches:
                by_shard[shard].append(work)
        connections = {}
        for shard in by_shard:
            connection = self._open(shard)
            if connection is not None:
                connections[shard] = connection

        def settle(shard: str, connection: Connection) -> None:
            for work in by_shard[shard]:
                command = f"{work.command} PREPARED '{work.branches[shard]}'"
                try:
                    simple_query(connection, command)
                except sa_exc.DBAPIError as error:
                    # Where another has done it, the name is not to be found.
                    if not isinstance(error.orig, psycopg.errors.UndefinedObject):
                        raise
                del work.branches[shard]

        outcomes = attempt_all(settle, connections)
        for shard, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                logger.warning("shard %s: %s", shard, outcome)
                self._drop(shard)
        again = []
        for work in works:
            if not work.branches:
                if work.marker_on:
                    self._markers.append((time.monotonic(), work.gid, work.marker_on))
                work.done.set_result(None)
            elif time.monotonic() - work.since < _GIVE_UP:
                again.append(work)
            else:
                logger.warning("%s is left to recovery on %s", work.gid, work.branches)
                work.done.set_result(None)
        return again

    def _open(self, shard: str) -> Connection | None:
        connection = self._connections.get(shard)
        if connection is None:
            try:
                connection = self._connect(shard).execution_options(
                    isolation_level="AUTOCOMMIT"
                )
            except sa_exc.OperationalError as error:
                logger.warning("shard %s is not to be reached: %s", shard, error)
                return None
            self._connections[shard] = connection
        return connection

    def _drop(self, shard: str) -> None:
        connection = self._connections.pop(shard, None)
        if connection is not None:
            connection.invalidate()
            connection.close()

    def _forget(self, older_than: float) -> None:
        """Delete the markers of transactions that were finished before a time."""
        by_shard: defaultdict[str, list[str]] = defaultdict(list)
        while self._markers and self._markers[0][0] <= older_than:
            _, gid, shards = self._markers.popleft()
            for shard in shards:
                by_shard[shard].append(str(gid))
        for shard, gids in by_shard.items():
            connection = self._open(shard)
            if connection is not None:
                try:
                    connection.execute(_FORGET, {"gids": gids})
                except sa_exc.DBAPIError as error:
                    logger.warning("markers stay on shard %s: %s", shard, error)
                    self._drop(shard)
