"""Finish or undo what crashes and lost replies have left prepared.

A recoverer looks at every participant of a transaction. One that is not prepared has
either committed, and then its marker says so, or can be kept from ever preparing: by a
tombstone under the marker's own unique key. The insert of a tombstone waits while the
participant is between its marker and its end, so a short ``lock_timeout`` and another
look decide. Any number of recoverers, and the session itself, may do this at once.

What is asked, and what follows from the answers, is `protocol.Recoverer`. Here many of
them are carried out together: one visit a shard and round, each in a thread of its own,
so that a server which accepts connections and says nothing holds up no other.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc

from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision, Recoverer, Reply, Request
from shardalchemy.commit.settling import settled
from shardalchemy.engine import Visits, kept_if_sound
from shardalchemy.engine.wire import driver_of, is_lost, simple_query, simple_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology
    from shardalchemy.commit.counters import Counters

__all__ = ["Recovery", "RecoveryReport"]

logger = logging.getLogger(__name__)

# A gid holds only [0-9a-f:/], so it stands in these literals as it is.
_ORPHANS = """
    SELECT gid FROM pg_prepared_xacts
    WHERE database = current_database() AND gid LIKE '{ours}'
      AND prepared < clock_timestamp() - make_interval(secs => {grace})
"""
# What is prepared is there to be seen before a synchronous standby has it, and a commit
# elsewhere that follows from it could not be undone if the standby took over. Ending a
# transaction that has written to the log waits for all that the standby lacks.
_PREPARED = """
    SELECT gid, pg_logical_emit_message(true, 'shardalchemy', '')
    FROM pg_prepared_xacts
    WHERE database = current_database() AND gid = ANY ('{{{branches}}}')
"""
_FENCE = """
    BEGIN;
    SET LOCAL lock_timeout = '200ms';
    INSERT INTO shardalchemy.txn (gid, outcome)
    SELECT gid, 'aborted' FROM unnest('{{{gids}}}'::text[]) AS t (gid) ORDER BY gid
    ON CONFLICT (gid) DO NOTHING;
    COMMIT;
    SELECT gid, outcome FROM shardalchemy.txn WHERE gid = ANY ('{{{gids}}}')
"""
# Whoever hangs with the lock must not keep all others from recovering.
_ALONE = """
    BEGIN;
    SET LOCAL idle_in_transaction_session_timeout = '10s';
    SELECT pg_try_advisory_xact_lock(hashtext('shardalchemy.recovery'))
"""

_COUNTERS = {
    Decision.COMMIT: "recovery.committed",
    Decision.ABORT: "recovery.rolled_back",
    Decision.RECOVER: "recovery.in_doubt",
}

_PAUSE = 0.05  # seconds between two rounds that have learnt nothing
_BATCH = 500  # transactions that are looked at together


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """The transactions that a recovery met, by their gids."""

    committed: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()


class Recovery:
    """Recovers transactions of one cluster.

    ``connect`` opens a connection to a shard; ``topology`` returns the current one.
    ``patience`` is how many seconds an unreachable participant is tried for.
    """

    def __init__(
        self,
        connect: Callable[[str], Connection],
        topology: Callable[[], Topology],
        counters: Counters,
        patience: float = 5.0,
    ) -> None:
        self._connect = connect
        self._topology = topology
        self._counters = counters
        self._patience = patience
        self._visits = Visits()

    def recover(self, grace: float, *, alone: bool = False) -> RecoveryReport:
        """Resolve every transaction that was prepared over *grace* seconds ago.

        *alone* leaves out shards at which another process does the same.
        """
        topology = self._topology()
        ours = f"sa1:{topology.cluster[:8]}:%"
        sql = _ORPHANS.format(ours=ours, grace=float(grace))
        deadline = time.monotonic() + self._patience

        def look(shard: str) -> list[Gid]:
            with kept_if_sound(self._connect(shard)) as connection:
                return Gid.parse_all(simple_rows(connection, sql))

        found = self._visits.at_once(look, topology.shards, deadline)
        for shard, answer in found.items():
            if isinstance(answer, Exception):
                logger.warning("recovery cannot look at shard %s: %s", shard, answer)
        orphans = {s: a for s, a in found.items() if not isinstance(a, Exception) and a}
        with ExitStack() as stack:
            if alone:
                orphans = {
                    shard: gids
                    for shard, gids in orphans.items()
                    if self._is_alone(shard, stack)
                }
            gids = dict.fromkeys(gid for gids in orphans.values() for gid in gids)
            machines = self._resolve_all(gids)
        ended: dict[Decision, list[str]] = {decision: [] for decision in Decision}
        for gid, machine in machines.items():
            decision = machine.decision if machine.is_finished else None
            ended[decision or Decision.RECOVER].append(str(gid))
        return RecoveryReport(
            tuple(ended[Decision.COMMIT]),
            tuple(ended[Decision.ABORT]),
            tuple(ended[Decision.RECOVER]),
        )

    def resolve(self, gid: Gid) -> Decision:
        """Commit or roll back *gid* on every participant; RECOVER means in doubt.

        A participant that is out of reach by then is told when somebody recovers again.
        """
        return self.conclude(gid).decision or Decision.RECOVER

    def conclude(self, gid: Gid) -> Recoverer:
        """Do the same; return what was seen of each participant as well."""
        return self._resolve_all([gid])[gid]

    def _resolve_all(self, gids: Iterable[Gid]) -> dict[Gid, Recoverer]:
        gids = list(gids)
        machines: dict[Gid, Recoverer] = {}
        for start in range(0, len(gids), _BATCH):
            machines |= self._resolve(gids[start : start + _BATCH])
        for machine in machines.values():
            decision = machine.decision if machine.is_finished else None
            self._counters.add(_COUNTERS[decision or Decision.RECOVER])
        return machines

    def _resolve(self, gids: list[Gid]) -> dict[Gid, Recoverer]:
        numbers = {n: a.number for n, a in self._topology().addresses.items()}
        names = {number: name for name, number in numbers.items()}
        # A shard that this process does not know yet is one that it cannot reach.
        machines = {
            gid: Recoverer.of(names.get(n, f"number {n}") for n in gid.numbers)
            for gid in gids
        }
        deadline = time.monotonic() + self._patience
        while wanted := _by_shard(machines):

            def visit(
                shard: str, wanted: Mapping[str, dict[Gid, Request]] = wanted
            ) -> dict[Gid, Reply]:
                with kept_if_sound(self._connect(shard)) as connection:
                    return _ask(connection, numbers[shard], wanted[shard])

            answers = self._visits.at_once(visit, wanted, deadline)
            is_late = time.monotonic() > deadline
            learnt = False
            for shard, answer in answers.items():
                if isinstance(answer, Exception):
                    if is_late or shard not in numbers:
                        logger.warning("shard %s is out of reach: %s", shard, answer)
                    answer = dict.fromkeys(wanted[shard], Reply.LOST)
                for gid, reply in answer.items():
                    if reply not in (Reply.LOST, Reply.BUSY):
                        learnt = True
                    elif is_late or shard not in numbers:
                        reply = Reply.UNREACHABLE
                    machines[gid] = machines[gid].after({shard: reply})
            if not learnt:
                time.sleep(_PAUSE)
        return machines

    def _is_alone(self, shard: str, stack: ExitStack) -> bool:
        """Keep other processes from recovering at *shard* until *stack* is closed."""
        try:
            connection = stack.enter_context(kept_if_sound(self._connect(shard)))
            ((got,),) = simple_rows(connection, _ALONE)
            stack.callback(_ended, connection)
        except sa_exc.DBAPIError:
            return False
        return got == "t"


def _by_shard(
    machines: Mapping[Gid, Recoverer],
) -> dict[str, dict[Gid, Request]]:
    """Return what is to be asked of each shard next."""
    wanted: defaultdict[str, dict[Gid, Request]] = defaultdict(dict)
    for gid, machine in machines.items():
        for shard, request in machine.requests.items():
            wanted[shard][gid] = request
    return wanted


def _ended(connection: Connection) -> None:
    # Where it took so long that the server has hung up, it has ended.
    with suppress(sa_exc.DBAPIError):
        simple_query(connection, "ROLLBACK")


def _ask(
    connection: Connection, number: int, requests: Mapping[Gid, Request]
) -> dict[Gid, Reply]:
    """Carry out what is asked of one shard; what is lost on the way has no reply."""
    replies: dict[Gid, Reply] = dict.fromkeys(requests, Reply.LOST)

    def asked(*kinds: Request) -> list[Gid]:
        return [gid for gid, request in requests.items() if request in kinds]

    try:
        if looking := asked(Request.LOOK):
            branches = ",".join(gid.on(number) for gid in looking)
            found = simple_rows(connection, _PREPARED.format(branches=branches))
            prepared = {gid for gid, _ in found}
            for gid in looking:
                here = gid.on(number) in prepared
                replies[gid] = Reply.PREPARED if here else Reply.ABSENT
        if fencing := asked(Request.FENCE):
            replies |= _fence(connection, fencing)
        for gid in asked(Request.COMMIT, Request.ROLLBACK):
            replies[gid] = _settle(connection, gid.on(number), requests[gid])
    except sa_exc.DBAPIError as error:
        logger.info("shard number %d: %s", number, error)
    return replies


def _fence(connection: Connection, gids: list[Gid]) -> dict[Gid, Reply]:
    sql = _FENCE.format(gids=",".join(map(str, gids)))
    try:
        found = simple_rows(connection, sql)
    except sa_exc.OperationalError as error:
        if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise
        simple_query(connection, "ROLLBACK")
        if len(gids) == 1:
            return {gids[0]: Reply.BUSY}
        # One of them was: each by itself.
        return {g: r for gid in gids for g, r in _fence(connection, [gid]).items()}
    outcomes = {gid: Reply(outcome) for gid, outcome in found}
    # None stands there if it was deleted a moment ago: to be looked at again.
    return {gid: outcomes.get(str(gid), Reply.BUSY) for gid in gids}


def _settle(connection: Connection, branch: str, request: Request) -> Reply:
    command = "COMMIT" if request is Request.COMMIT else "ROLLBACK"
    try:
        simple_query(connection, f"{command} PREPARED '{branch}'")
    except sa_exc.DBAPIError as error:
        reply = settled(error)
        if reply is Reply.REFUSED:
            logger.warning("%s PREPARED '%s' is refused: %s", command, branch, error)
            return Reply.UNREACHABLE
        if is_lost(driver_of(connection)):
            raise
        return reply
    return Reply.DONE
