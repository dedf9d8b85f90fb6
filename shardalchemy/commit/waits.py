"""Watching the sessions of this process that wait for locks.

One thread a cluster and process. Four times a second it looks, in memory, at which
sessions have a statement under way; one that is seen so for `SUSPICIOUS` seconds may be
waiting for a lock, and only then is its server asked. If it does wait,

- and for a prepared transaction, that is resolved (`indoubt`);
- the session's backends are published on the home shard, until it goes on. Where two
  such sessions are on several shards each, the waits of these shards are looked at
  (`blocking`), and what two looks have shown is searched for cycles (`waitgraph`).

Every process does that, all find the same victims, and each cancels those that are its
own: it can do that without hitting what the session does next.
"""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus

from shardalchemy.commit import blocking
from shardalchemy.commit.waitgraph import deadlocks
from shardalchemy.engine import Background, Beside, next_statement_held

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from shardalchemy.catalog import Topology
    from shardalchemy.commit.blocking import PreparedHolder
    from shardalchemy.commit.counters import Counters
    from shardalchemy.commit.indoubt import InDoubt
    from shardalchemy.commit.waitgraph import Backend, Deadlock, Owner, Wait

__all__ = ["SUSPICIOUS", "TICK", "WaitingSession", "Waits"]

TICK = 0.25
"""Seconds between two looks at the sessions."""

SUSPICIOUS = 0.75
"""Seconds of one statement after which its server is asked whether it waits."""

logger = logging.getLogger(__name__)

_ENDING = 5.0  # seconds that a close waits for the thread


class WaitingSession(Protocol):
    """What is asked of a session, in another thread than its own."""

    hash_key: int
    _deadlock: Deadlock | None
    """Why a statement of its present transaction has been cancelled."""
    _in_doubt: str | None
    """The prepared transaction that it waits for."""

    def _drivers_in_use(self) -> dict[str, Any]:
        """Return the psycopg connections of its transaction, by shard."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A session that waits for a lock on at least one shard."""

    session: weakref.ref[WaitingSession]
    backends: list[Backend] = field(default_factory=list)
    waiting: list[Backend] = field(default_factory=list)


class Waits:
    """Ends deadlocks over several shards, and waits for what is in doubt.

    *sessions* yields those of the cluster in this process, *connect* opens a connection
    beside their pools, and *topology* returns the present one.
    """

    def __init__(
        self,
        sessions: Callable[[], Iterator[WaitingSession]],
        connect: Callable[[str], psycopg.Connection[Any]],
        topology: Callable[[], Topology],
        in_doubt: InDoubt,
        counters: Counters,
    ) -> None:
        self._sessions = sessions
        self._connect = connect
        self._topology = topology
        self._in_doubt = in_doubt
        self._counters = counters
        self._thread = Background(
            "shardalchemy-waits", partial(_run, weakref.ref(self), connect)
        )
        self._name = str(uuid.uuid4())
        self._busy: dict[int, float] = {}
        self._published = False
        self._seen: frozenset[Wait] = frozenset()
        self._flagged: weakref.WeakSet[Any] = weakref.WeakSet()
        self._cancelled: Wait | None = None
        self._blind = False

    def start(self) -> None:
        """Start the thread, if it does not run."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; it can be started again."""
        self._thread.close(_ENDING)

    # -- in the thread -----------------------------------------------------------------

    def tick(self, beside: Beside) -> None:
        """Look at the sessions once, and do what is to be done for those that wait."""
        suspects = self._suspects(time.monotonic())
        if not suspects and not self._published and not self._flagged:
            beside.close_idle()
            return
        waiters = self._waiters(beside, suspects)
        owners = self._exchange(beside, waiters)
        looked = {b.shard for waiter in waiters.values() for b in waiter.waiting}
        over_several = _over_several(owners)
        if waiters and len(over_several) > 1:
            looked |= {b.shard for b, owner in owners.items() if owner in over_several}
        waits: set[Wait] = set()
        prepared: list[PreparedHolder] = []
        for shard in sorted(looked):
            try:
                # Many who wait for one row are many times more who block each other.
                if len(over_several) < 2 and not blocking.has_prepared(beside, shard):
                    continue
                here, holders = blocking.waits_on(beside, shard)
            except psycopg.Error as error:
                logger.info("waits on shard %s are not seen: %s", shard, error)
                continue
            waits.update(here)
            prepared += holders
        self._meet_prepared(waiters.values(), waits, prepared)
        if len(over_several) > 1:
            # What an earlier look has shown as well: see `waitgraph`.
            lasting = self._seen & waits
            for deadlock in deadlocks(lasting, owners):
                if deadlock.victim.process == self._name:
                    waiter = waiters.get(deadlock.victim.session)
                    if waiter is not None:
                        self._cancel(beside, waiter, deadlock)
        self._seen = frozenset(waits)

    def _suspects(self, now: float) -> dict[int, weakref.ref[WaitingSession]]:
        """Return the sessions that have had a statement under way for a while."""
        busy: dict[int, float] = {}
        suspects: dict[int, weakref.ref[WaitingSession]] = {}
        for session in self._sessions():
            for driver in session._drivers_in_use().values():
                if driver.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    key = session.hash_key
                    busy[key] = self._busy.get(key, now)
                    if now - busy[key] >= SUSPICIOUS:
                        suspects[key] = weakref.ref(session)
                    break
        self._busy = busy
        return suspects

    def _waiters(
        self, beside: Beside, suspects: Mapping[int, weakref.ref[WaitingSession]]
    ) -> dict[int, _Waiter]:
        """Return those that wait for a lock, as their servers say."""
        of_pid: dict[str, dict[int, int]] = {}
        for key, suspect in suspects.items():
            session = suspect()
            drivers = {} if session is None else session._drivers_in_use()
            for shard, driver in drivers.items():
                pid = driver.pgconn.backend_pid
                if pid:
                    of_pid.setdefault(shard, {})[pid] = key
        waiters = {key: _Waiter(suspect) for key, suspect in suspects.items()}
        for shard, keys in of_pid.items():
            try:
                found = blocking.transactions_of(beside, shard, keys)
            except psycopg.Error as error:
                logger.info("waits on shard %s are not seen: %s", shard, error)
                continue
            for backend, waits in found.items():
                waiter = waiters[keys[backend.pid]]
                waiter.backends.append(backend)
                if waits:
                    waiter.waiting.append(backend)
        return {key: waiter for key, waiter in waiters.items() if waiter.waiting}

    def _exchange(
        self, beside: Beside, waiters: Mapping[int, _Waiter]
    ) -> dict[Backend, Owner]:
        """Publish this process's sessions that wait; return those of all processes."""
        if not waiters and not self._published:
            return {}
        home = self._topology().home
        mine = {key: waiter.backends for key, waiter in waiters.items()}
        try:
            blocking.publish(beside, home, self._name, mine)
            self._published = bool(mine)
            owners = blocking.published(beside, home) if mine else {}
        except psycopg.Error as error:
            if not self._blind:
                logger.warning(
                    "deadlocks between shards are not detected, since shard %s cannot"
                    " be asked: %s",
                    home,
                    error,
                )
            self._blind = True
            return {}
        self._blind = False
        return owners

    def _meet_prepared(
        self,
        waiters: Iterable[_Waiter],
        waits: Iterable[Wait],
        prepared: Iterable[PreparedHolder],
    ) -> None:
        """See to prepared transactions for which sessions wait, through others too."""
        blockers: dict[tuple[str, int], set[tuple[str, int]]] = {}
        for wait in waits:
            blockers.setdefault(_process(wait.waiter), set()).add(
                _process(wait.blocker)
            )
        holders = {(holder.shard, holder.waiter): holder for holder in prepared}
        flagged: weakref.WeakSet[Any] = weakref.WeakSet()
        for waiter in waiters:
            reached = _reached({_process(b) for b in waiter.waiting}, blockers)
            for key in reached & holders.keys():
                holder = holders[key]
                self._in_doubt.meet(holder)
                session = waiter.session()
                if session is not None:
                    session._in_doubt = (
                        f"{holder.gid} on shard {holder.shard}, prepared"
                        f" {holder.age:.1f} s before"
                    )
                    flagged.add(session)
        for session in self._flagged - flagged:
            session._in_doubt = None
        self._flagged = flagged

    def _cancel(self, beside: Beside, waiter: _Waiter, deadlock: Deadlock) -> None:
        """Cancel the statement by which a session of this process waits in a deadlock.

        A deadlock that is still there at the next look is cancelled again.
        """
        wait = deadlock.waits[0]
        session = waiter.session()
        if session is None:
            return
        driver = session._drivers_in_use().get(wait.waiter.shard)
        if driver is None or driver.pgconn.backend_pid != wait.waiter.pid:
            return
        with next_statement_held(driver):
            if session._drivers_in_use().get(wait.waiter.shard) is not driver:
                return
            session._deadlock = deadlock
            try:
                done = blocking.cancel(beside, wait)
            except psycopg.Error as error:
                logger.warning("a deadlock could not be ended: %s", error)
                return  # it may have arrived all the same
            if not done:
                session._deadlock = None
        if done and wait != self._cancelled:
            self._cancelled = wait
            self._counters.add("deadlocks")
            logger.info("%s", deadlock)

    def end(self, beside: Beside) -> None:
        """Take back what is published; for the thread, at its end."""
        if self._published:
            try:
                blocking.publish(beside, self._topology().home, self._name, {})
            except psycopg.Error as error:
                logger.info("waits stay published for a while: %s", error)


def _run(
    waits: weakref.ref[Waits],
    connect: Callable[[str], psycopg.Connection[Any]],
    ending: threading.Event,
) -> None:
    beside = Beside(connect)
    pause = TICK
    failed = False
    while not ending.wait(pause):
        present = waits()
        if present is None:
            break
        began = time.monotonic()
        try:
            present.tick(beside)
            failed = False
        except Exception:
            if not failed:
                logger.exception("watching for deadlocks goes on after an error")
            failed = True
        del present
        # Servers under load are not asked the more often for it.
        pause = max(TICK, min(1.0, 4 * (time.monotonic() - began)))
    present = waits()
    if present is not None:
        present.end(beside)
    beside.close()


def _over_several(owners: Mapping[Backend, Owner]) -> set[Owner]:
    """Return the sessions that have backends on more than one shard.

    Fewer than two of them make no cycle over several shards.
    """
    shards: dict[Owner, set[str]] = {}
    for backend, owner in owners.items():
        shards.setdefault(owner, set()).add(backend.shard)
    return {owner for owner, on in shards.items() if len(on) > 1}


def _process(backend: Backend) -> tuple[str, int]:
    return backend.shard, backend.pid


def _reached(
    start: set[tuple[str, int]], blockers: Mapping[tuple[str, int], set[Any]]
) -> set[tuple[str, int]]:
    """Return the processes that are waited for from *start* on, it included."""
    reached: set[tuple[str, int]] = set()
    ahead = list(start)
    while ahead:
        here = ahead.pop()
        if here not in reached:
            reached.add(here)
            ahead += blockers.get(here, ())
    return reached
