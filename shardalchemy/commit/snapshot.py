"""Open a snapshot of every shard in which no cross-shard transaction is torn.

All shards open at once, each in one message; `cut` has what has to be asked in it and
why that is enough. A cut that tears a transaction is repaired where it is missing. It
is decided, so that it is waited for there, and the shard told to commit it if that
takes long: a coordinator that is slow, or dead, delays a snapshot by milliseconds. Only
where this does not lead to an end is the gate shut for a moment, or for *strict*.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy.util import await_only

from shardalchemy.commit import finisher
from shardalchemy.commit.cut import Base, Evidence
from shardalchemy.commit.gate import PATIENCE, Gate
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Reply
from shardalchemy.commit.settling import settled
from shardalchemy.engine import ask_all, broadcast, kept_if_sound
from shardalchemy.engine.wire import driver_of, in_transaction, is_lost
from shardalchemy.errors import SnapshotUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
    " WHERE gid LIKE '{ours}%/{number}'; COMMIT; "
)
_OPEN = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    " SELECT pg_current_snapshot(), (SELECT string_agg(gid, ' ') FROM shardalchemy.txn"
    " WHERE xid >= '{xmin}' AND NOT pg_visible_in_snapshot(xid, '{base}')"
    " AND outcome = 'committed')"
)
_VISIBLE = (
    "SELECT string_agg(gid, ' ') FROM shardalchemy.txn"
    " WHERE gid = ANY ('{{{gids}}}') AND outcome = 'committed'"
)
# What else may be in the table, or prepared, is not to get into the text of a command.
_NAMES = re.compile(r"sa1:[0-9a-f:]+(?:/\d+)?(?: sa1:[0-9a-f:]+(?:/\d+)?)*")

_COMMIT_PREPARED = "COMMIT PREPARED '{gid}/{number}'"

_BASE_IS_RECENT = 0.25
"""Seconds for which an accepted cut is the base of the next.

Without one there is a round trip more; with an old one there are many fresh
transactions to be looked at.
"""
_GATE_AFTER = 0.05  # seconds of repairs before commits are held up for a cut
_HELP_AFTER = 0.01  # seconds for which a torn transaction is waited for
_SHORTEST_PAUSE = 0.001
_GATE_PAUSE, _LONGEST_GATE_PAUSE = 0.02, 0.2

# The marker of a transaction that is prepared keeps another one from coming in until it
# has committed there. Of what has none, nothing stays either. The xid is given, lest
# its default has this transaction take one.
_BEGIN_WAIT = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
    f" SET LOCAL lock_timeout = {_HELP_AFTER * 1000:.0f}; "
)
_WAIT = (
    "INSERT INTO shardalchemy.txn (gid, outcome, xid) VALUES ('{gid}', 'aborted', '0')"
    " ON CONFLICT (gid) DO NOTHING; "
)
_LAPSED = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.InsufficientPrivilege,  # of a role that only reads
)


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
        opening = _Opening(shards, self._counters, self._recovery, finishes_all=strict)
        cut = None if strict else opening.run(self._base(connections), _GATE_AFTER)
        pause = _GATE_PAUSE
        while cut is None:
            if time.monotonic() >= until:
                raise _never_shut(connections)
            with self._gate(shards, connect) as gate:
                if shards.waits_for(gate.is_shut, PATIENCE):
                    cut = opening.run(self._base(connections), PATIENCE)
                    # If a gate is open by now, it may have been all the while.
                    cut = cut if gate.is_shut() else None
            if cut is None:
                shards.pause(random.uniform(pause / 2, pause))
                pause = min(2 * pause, _LONGEST_GATE_PAUSE)
        self._last = cut
        self._counters.add("snapshots")

    def _base(self, connections: Mapping[str, Connection]) -> Base | None:
        """Return the last cut, if it is recent and of the same shards."""
        last = self._last
        if (
            last is not None
            and time.monotonic() - last.began < _BASE_IS_RECENT
            and last.snapshots.keys() == connections.keys()
        ):
            return last
        return None

    @contextmanager
    def _gate(
        self, shards: _Shards, connect: Callable[[str], Connection]
    ) -> Iterator[Gate]:
        """Ask for the gates of all shards, and open them at the block's end."""
        with ExitStack() as stack:
            holders = {
                shard: stack.enter_context(kept_if_sound(connect(shard)))
                for shard in shards.connections
            }
            gate = Gate(holders, shards.connections, shards.until)
            try:
                gate.shut()
                self._counters.add("snapshot.gates")
                yield gate
            finally:
                gate.open()


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
        self,
        commands: Mapping[str, str],
        *,
        anew: bool = False,
        may_lapse: bool = False,
    ) -> dict[str, Rows]:
        """Send each shard its command; return the rows of its statements.

        *anew* ends the transaction before, where there is one. *may_lapse* leaves out a
        shard that has waited for too long, or may not wait.
        """
        if anew:
            commands = {
                shard: f"COMMIT; {command}" if self._is_open(shard) else command
                for shard, command in commands.items()
            }
        found = {}
        outcomes = ask_all(self.connections, commands, until=self.until)
        for shard, outcome in outcomes.items():
            if not isinstance(outcome, Exception):
                found[shard] = outcome
            elif not (may_lapse and _is_one_of(outcome, _LAPSED)):
                raise self._unavailable(shard, outcome) from outcome
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
                if settled(outcome) is Reply.REFUSED:
                    logger.warning("shard %s: %s", shard, outcome)

    def conclude(self, recovery: Recovery, gid: str) -> None:
        """Have a transaction recovered that is not known to be decided."""
        found = Gid.parse(gid)
        if found is not None and self.is_async:
            await_only(asyncio.to_thread(recovery.resolve, found))
        elif found is not None:
            recovery.resolve(found)

    def waits_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until *condition* holds; return whether it did so in time."""
        until = min(time.monotonic() + seconds, self.until)
        while not condition():
            if time.monotonic() >= until:
                return False
            self.pause(_SHORTEST_PAUSE)
        return True

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

    def __init__(
        self,
        shards: _Shards,
        counters: Counters,
        recovery: Recovery,
        *,
        finishes_all: bool,
    ) -> None:
        self._shards = shards
        self._counters = counters
        self._recovery = recovery
        self._finishes_all = finishes_all
        self._snapshots: dict[str, str] = {}

    def run(self, base: Base | None, seconds: float) -> Base | None:
        """Open a cut that is compared with *base*; return it, or None without success.

        That is where transactions are still torn after so many *seconds* of repairs, or
        where it took so long that markers may have been deleted meanwhile.
        """
        began = time.monotonic()
        evidence = self._open(base) if base is not None else self._open_first()
        while True:
            self._ask(evidence)
            torn = evidence.torn()
            if self._finishes_all:
                torn += evidence.decided()
            if not torn:
                since = began if base is None else base.began
                if time.monotonic() - since > finisher.RETENTION / 2:
                    return None
                return Base(dict(self._snapshots), began, is_whole=True)
            if time.monotonic() >= self._shards.until:
                raise _never_whole(torn[0])
            if time.monotonic() - began > seconds:
                return None
            self._repair(evidence, torn)

    def _open(self, base: Base) -> Evidence:
        """Open all shards, with a cut that was accepted as base."""
        evidence = Evidence(self._shards.numbers, base_is_whole=True)
        for shard, said in self._begin(base.snapshots, look=self._finishes_all).items():
            evidence.opened(shard, *said)
        return evidence

    def _open_first(self) -> Evidence:
        """Open all shards, with any snapshots as base."""
        shards = self._shards
        asked = shards.ask(dict.fromkeys(shards.connections, _BASE), anew=True)
        bases = {shard: str(answer[0][0]) for shard, answer in asked.items()}
        evidence = Evidence(shards.numbers, base_is_whole=False)
        for shard, said in self._begin(bases, look=True).items():
            evidence.opened(shard, *said)
        return evidence

    def _begin(
        self,
        bases: Mapping[str, str],
        *,
        look: bool,
        after: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, tuple[list[str], list[str]]]:
        """Open a snapshot on each shard; return what is fresh in it, against *bases*.

        And what was prepared just before, if there is to be a *look*. *after* are
        transactions that are to end first; where they do not, there is no answer.
        """
        shards = self._shards
        commands = {}
        for shard, base in bases.items():
            xmin = base.partition(":")[0]
            command = _OPEN.format(xmin=xmin, base=base)
            if look:
                number = shards.number_of[shard]
                command = _PREPARED.format(ours=shards.ours, number=number) + command
            if after is not None:
                waits = "".join(_WAIT.format(gid=gid) for gid in after[shard])
                command = f"{_BEGIN_WAIT}{waits}ROLLBACK; {command}"
            commands[shard] = command
        asked = shards.ask(commands, anew=True, may_lapse=after is not None)
        found = {}
        for shard, answer in asked.items():
            snapshot, fresh = answer[-1]
            self._snapshots[shard] = str(snapshot)
            branches = _names(answer[0][0]) if look else []
            found[shard] = (_names(fresh), [b.rpartition("/")[0] for b in branches])
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

    def _repair(self, evidence: Evidence, torn: Sequence[Torn]) -> None:
        """Open anew the shards where something is missing, as soon as it is there.

        No later, for what commits there in between and elsewhere afterwards is torn by
        the new cut; what stays away is committed by this process.
        """
        missing: dict[str, list[str]] = {}
        for one in torn:
            for shard in one.missing:
                missing.setdefault(shard, []).append(one.gid)
        self._counters.add("snapshot.retries")
        said = self._begin(self._bases(missing), look=self._finishes_all, after=missing)
        late = {s: gids for s, gids in missing.items() if s not in said}
        if late:
            self._help(late, [t.gid for t in torn if not t.is_shown])
            said |= self._begin(self._bases(late), look=self._finishes_all)
        for shard, heard in said.items():
            evidence.reopened(shard, *heard)

    def _help(
        self, late: Mapping[str, Sequence[str]], not_shown: Iterable[str]
    ) -> None:
        """Have transactions committed where they are still prepared.

        Those that are *not shown* anywhere are prepared everywhere, which can be seen
        before a synchronous standby has it: recovery, which waits for that, concludes.
        """
        to_conclude = set(not_shown)
        decided = {
            shard: [gid for gid in gids if gid not in to_conclude]
            for shard, gids in late.items()
        }
        for gid in to_conclude & set().union(*late.values()):
            self._shards.conclude(self._recovery, gid)
        decided = {shard: gids for shard, gids in decided.items() if gids}
        if decided:
            self._shards.try_each(_COMMIT_PREPARED, decided)

    def _bases(self, shards: Iterable[str]) -> dict[str, str]:
        return {shard: self._snapshots[shard] for shard in shards}


def _never_whole(torn: Torn) -> SnapshotUnavailable:
    return SnapshotUnavailable(
        f"transaction {torn.gid} is committed on some of its shards and not on"
        f" {', '.join(torn.missing)}, where it stayed so until the timeout. Call"
        " cluster.recover(), and look at pg_prepared_xacts there."
    )


def _never_shut(shards: Iterable[str]) -> SnapshotUnavailable:
    return SnapshotUnavailable(
        f"commits on shards {', '.join(shards)} could not be held up until the snapshot"
        " was open, within its timeout. Give a longer timeout=."
    )


def _is_one_of(error: Exception, kinds: tuple[type[psycopg.Error], ...]) -> bool:
    return isinstance(getattr(error, "orig", None), kinds)


def _names(joined: str | None) -> list[str]:
    """Return the names in what string_agg() gave; none that is not one of ours."""
    if joined is None:
        return []
    names = joined.split(" ")
    if _NAMES.fullmatch(joined) is None:
        names = [name for name in names if _NAMES.fullmatch(name)]
    return names
