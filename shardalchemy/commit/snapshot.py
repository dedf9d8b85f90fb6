"""Open a snapshot of every shard in which no cross-shard transaction is torn.

All shards open at once, each in one message; `cut` has what has to be asked in it and
why that is enough. A cut that tears a transaction is repaired where it is missing. It
is decided, so that a shard on which it is still prepared may be told to commit it: so a
coordinator that is slow, or dead, delays a snapshot by milliseconds. Only where this
does not lead to an end is the gate shut for a moment, or where it is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy.util import await_only

from shardalchemy.commit import finisher
from shardalchemy.commit.cut import Base, Evidence
from shardalchemy.commit.gate import PATIENCE, Gate
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision
from shardalchemy.engine import ask_all, broadcast
from shardalchemy.engine.wire import driver_of, in_transaction, is_lost
from shardalchemy.errors import SnapshotUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology
    from shardalchemy.commit.counters import Counters
    from shardalchemy.commit.cut import Torn
    from shardalchemy.commit.recovery import Recovery
    from shardalchemy.engine.broadcast import Rows

__all__ = ["Snapshots"]

logger = logging.getLogger(__name__)

_BASE = "SELECT pg_current_snapshot()"

# What stands in {} is a cluster's id, a number, or a snapshot as PostgreSQL writes it.
# Prepared transactions are looked at before the snapshot is taken: the view is not of
# the snapshot, but of the moment.
_PREPARED = (
    "BEGIN; SELECT string_agg(gid, ' ') FROM pg_prepared_xact()"
    " WHERE gid ~ '^{ours}[0-9a-f:]+/{number}$'; COMMIT; "
)
_OPEN = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    " SELECT pg_current_snapshot(), (SELECT string_agg(gid, ' ') FROM shardalchemy.txn"
    " WHERE xid >= '{xmin}' AND NOT pg_visible_in_snapshot(xid, '{base}')"
    " AND outcome = 'committed' AND gid ~ '^{ours}[0-9a-f:]+$')"
)
# No gid that comes from above holds more than [0-9a-z:].
_VISIBLE = (
    "SELECT string_agg(gid, ' ') FROM shardalchemy.txn"
    " WHERE gid = ANY ('{{{gids}}}') AND outcome = 'committed'"
)
_COMMIT_PREPARED = "COMMIT PREPARED '{gid}/{number}'"
_DONE_BY_ANOTHER = (
    psycopg.errors.UndefinedObject,
    psycopg.errors.ObjectNotInPrerequisiteState,  # it is busy
    psycopg.errors.ObjectInUse,
)

_BASE_IS_RECENT = 0.25
"""Seconds for which an accepted cut is the base of the next.

Without one there is a round trip more; with an old one there are many fresh
transactions to be looked at.
"""
_REPAIRS = 24  # of one cut, before the gate is shut for another
_HELP_AFTER = 0.005  # seconds for which a transaction may be torn
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.01
_GATE_PAUSE, _LONGEST_GATE_PAUSE = 0.02, 0.2


class Snapshots:
    """Opens snapshots of one cluster; the last one is the base of the next."""

    def __init__(self, counters: Counters, recovery: Recovery) -> None:
        self._counters = counters
        self._recovery = recovery
        self._last: Base | None = None

    def open(
        self,
        topology: Topology,
        connections: Mapping[str, Connection],
        connect: Callable[[str], Connection],
        *,
        until: float,
        strict: bool,
    ) -> None:
        """Begin a transaction on each of *connections*, all with one whole snapshot.

        They are those of all shards, in no transaction of their server; ``connect``
        opens further ones, for the gate. *until* is a moment of ``time.monotonic()``.
        Raises SnapshotUnavailable, with the connections left in any state.
        """
        shards = _Shards(topology, connections, until)
        opening = _Opening(shards, self._counters)
        gated = strict
        while True:
            last = self._last
            if last is not None and not (
                time.monotonic() - last.began < _BASE_IS_RECENT
                and last.snapshots.keys() == connections.keys()
            ):
                last = None
            with self._gate(shards, connect) if gated else nullcontext():
                cut = opening.run(last)
            if cut is not None:
                break
            gated = True
        self._last = cut
        self._counters.add("snapshots")

    @contextmanager
    def _gate(
        self, shards: _Shards, connect: Callable[[str], Connection]
    ) -> Iterator[None]:
        """Shut the gate of all shards for the length of a ``with`` block."""
        connections: dict[str, Connection] = {}
        try:
            for _, shard in sorted(shards.numbers.items()):
                connections[shard] = connect(shard)
            gate = Gate(connections, shards.until)
            self._shut(gate, shards)
            try:
                yield
            finally:
                gate.open()
        finally:
            for connection in connections.values():
                if is_lost(driver_of(connection)):
                    connection.invalidate()
                connection.close()

    def _shut(self, gate: Gate, shards: _Shards) -> None:
        pause = _GATE_PAUSE
        while True:
            waiting = gate.shut()
            if not waiting:
                self._counters.add("snapshot.gates")
                return
            doubtful = None
            for shard, branches in gate.in_doubt(waiting, shards.ours).items():
                for gid in filter(None, map(Gid.parse, branches)):
                    if not self._decided(gid, shards):
                        doubtful = _in_doubt(gid, shard)
            if time.monotonic() + PATIENCE >= shards.until:
                raise doubtful or _always_busy(waiting)
            shards.pause(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_GATE_PAUSE)

    def _decided(self, gid: Gid, shards: _Shards) -> bool:
        """Have recovery finish or undo what keeps the gate open."""
        if time.monotonic() >= shards.until:
            return False
        resolve = self._recovery.resolve
        # It waits in ordinary ways, so an event loop has to be let go meanwhile.
        decision = (
            await_only(asyncio.to_thread(resolve, gid))
            if shards.is_async
            else resolve(gid)
        )
        return decision is not Decision.RECOVER


class _Shards:
    """The shards of one snapshot, their connections, and until when they may take."""

    def __init__(
        self, topology: Topology, connections: Mapping[str, Connection], until: float
    ) -> None:
        self.connections = connections
        self.until = until
        self.ours = f"sa1:{topology.cluster[:8]}:"
        self.number_of = {s: topology.addresses[s].number for s in connections}
        self.numbers = {number: shard for shard, number in self.number_of.items()}
        self.is_async = next(iter(connections.values())).dialect.is_async

    def ask(
        self, commands: Mapping[str, str], *, anew: bool = False
    ) -> dict[str, Rows]:
        """Send each shard its command; return the rows of its statements.

        *anew* ends the transaction before, where there is one.
        """
        if anew:
            commands = {
                shard: f"COMMIT; {command}" if self._is_open(shard) else command
                for shard, command in commands.items()
            }
        found = {}
        outcomes = ask_all(self.connections, commands, until=self.until)
        for shard, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                raise self._unavailable(shard, outcome) from outcome
            found[shard] = outcome
        return found

    def try_each(self, command: str, parts: Mapping[str, Sequence[str]]) -> None:
        """Run *command* outside any transaction for each transaction of each shard."""
        closing = {s: "COMMIT" for s in parts if self._is_open(s)}
        self.ask(closing)
        for turn in range(max(map(len, parts.values()))):
            commands = {
                shard: command.format(gid=gids[turn], number=self.number_of[shard])
                for shard, gids in parts.items()
                if turn < len(gids)
            }
            outcomes = broadcast(self.connections, commands, until=self.until)
            for shard, outcome in outcomes.items():
                if not isinstance(outcome, Exception):
                    continue
                if is_lost(driver_of(self.connections[shard])):
                    raise self._unavailable(shard, outcome) from outcome
                if not isinstance(getattr(outcome, "orig", None), _DONE_BY_ANOTHER):
                    logger.warning("shard %s: %s", shard, outcome)

    def pause(self, seconds: float) -> None:
        """Let time pass, but not beyond the end."""
        seconds = min(seconds, max(0.0, self.until - time.monotonic()))
        if self.is_async:
            await_only(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    def _is_open(self, shard: str) -> bool:
        return in_transaction(driver_of(self.connections[shard]))

    def _unavailable(self, shard: str, error: Exception) -> SnapshotUnavailable:
        if time.monotonic() >= self.until:
            return SnapshotUnavailable(
                f"shard {shard} did not answer within the snapshot's timeout."
            )
        return SnapshotUnavailable(f"shard {shard} gave no snapshot: {error}")


class _Opening:
    """Opens a cut, and repairs it until it is whole."""

    def __init__(self, shards: _Shards, counters: Counters) -> None:
        self._shards = shards
        self._counters = counters
        self._snapshots: dict[str, str] = {}
        self._torn_since: dict[str, float] = {}

    def run(self, base: Base | None) -> Base | None:
        """Open a cut that is compared with *base*; return it, or None without success.

        That is where something stays torn, or where it took so long that markers may
        have been deleted meanwhile.
        """
        began = time.monotonic()
        evidence = self._open(base) if base is not None else self._open_first()
        for turn in range(_REPAIRS + 1):
            self._ask(evidence)
            torn = evidence.torn()
            if not torn:
                since = began if base is None else base.began
                if time.monotonic() - since > finisher.RETENTION / 2:
                    break
                return Base(dict(self._snapshots), began, is_whole=True)
            self._counters.add("snapshot.retries")
            if time.monotonic() >= self._shards.until:
                raise _never_whole(torn[0])
            self._repair(evidence, torn, turn)
        return None

    def _open(self, base: Base) -> Evidence:
        """Open all shards, with a cut that was accepted as base."""
        evidence = Evidence(self._shards.numbers, base_is_whole=True)
        for shard, fresh in self._begin(base.snapshots).items():
            evidence.opened(shard, fresh)
        return evidence

    def _open_first(self) -> Evidence:
        """Open all shards, with any snapshots as base."""
        shards = self._shards
        asked = shards.ask(dict.fromkeys(shards.connections, _BASE), anew=True)
        bases = {shard: str(answer[0][0]) for shard, answer in asked.items()}
        evidence = Evidence(shards.numbers, base_is_whole=False)
        prepared: dict[str, list[str]] = {}
        for shard, fresh in self._begin(bases, prepared).items():
            evidence.opened(shard, fresh, prepared[shard])
        return evidence

    def _begin(
        self, bases: Mapping[str, str], prepared: dict[str, list[str]] | None = None
    ) -> dict[str, list[str]]:
        """Open a snapshot on each shard of *bases*; return what is fresh in it.

        Where *prepared* is given, what was prepared just before is put in.
        """
        shards = self._shards
        commands = {}
        for shard, base in bases.items():
            xmin = base.partition(":")[0]
            command = _OPEN.format(xmin=xmin, base=base, ours=shards.ours)
            if prepared is not None:
                number = shards.number_of[shard]
                command = _PREPARED.format(ours=shards.ours, number=number) + command
            commands[shard] = command
        found = {}
        for shard, answer in shards.ask(commands, anew=True).items():
            snapshot, fresh = answer[-1]
            self._snapshots[shard] = str(snapshot)
            found[shard] = _names(fresh)
            if prepared is not None:
                prepared[shard] = [b.rpartition("/")[0] for b in _names(answer[0][0])]
        return found

    def _ask(self, evidence: Evidence) -> None:
        """Ask for what is not known of transactions that may be torn."""
        questions = evidence.questions()
        if questions:
            commands = {
                shard: _VISIBLE.format(gids=",".join(gids))
                for shard, gids in questions.items()
            }
            for shard, answer in self._shards.ask(commands).items():
                evidence.told(shard, questions[shard], _names(answer[0][0]))

    def _repair(self, evidence: Evidence, torn: Sequence[Torn], turn: int) -> None:
        """Open anew where something is missing that is visible elsewhere."""
        now = time.monotonic()
        late: dict[str, list[str]] = {}
        for one in torn:
            if now - self._torn_since.setdefault(one.gid, now) > _HELP_AFTER:
                for shard in one.missing:
                    late.setdefault(shard, []).append(one.gid)
        if turn:
            pause = _SHORTEST_PAUSE * 2 ** min(turn, 10)
            self._shards.pause(min(pause, _LONGEST_PAUSE))
        if late:
            self._shards.try_each(_COMMIT_PREPARED, late)
        bases = {s: self._snapshots[s] for one in torn for s in one.missing}
        for shard, fresh in self._begin(bases).items():
            evidence.reopened(shard, fresh)


def _never_whole(torn: Torn) -> SnapshotUnavailable:
    return SnapshotUnavailable(
        f"transaction {torn.gid} is committed on some of its shards and not on"
        f" {', '.join(torn.missing)}, where it stayed so until the timeout. Call"
        " cluster.recover(), and look at pg_prepared_xacts there."
    )


def _in_doubt(gid: Gid, shard: str) -> SnapshotUnavailable:
    return SnapshotUnavailable(
        f"transaction {gid} is prepared on shard {shard}, and a participant that cannot"
        " be reached keeps it in doubt. Call cluster.recover() when that is back, or"
        " leave out strict=True."
    )


def _always_busy(shards: Sequence[str]) -> SnapshotUnavailable:
    return SnapshotUnavailable(
        f"shard {', '.join(shards)} has had commits under way all the time, so that the"
        " gate could not be shut. Give a longer timeout=, or leave out strict=True."
    )


def _names(joined: str | None) -> list[str]:
    return [] if joined is None else joined.split(" ")
