"""What is prepared on the shards of a cluster, as a person wants to see it.

Nothing is changed, not even a tombstone left: to look is always safe. The servers are
asked for what they have prepared, and then for the markers of what one of them has and
another has not; `listed` puts the answers together, without I/O.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from shardalchemy.commit.gid import Gid
from shardalchemy.engine import Visits, kept_if_sound
from shardalchemy.engine.wire import simple_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = [
    "Found",
    "Here",
    "Listing",
    "PreparedTransaction",
    "State",
    "listed",
    "prepared_transactions",
]

PATIENCE = 5.0
"""Seconds for which a shard may take to answer."""

_PREPARED = """
    SELECT gid, extract(epoch FROM clock_timestamp() - prepared)
    FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
"""
_OUTCOMES = "SELECT gid, outcome FROM shardalchemy.txn WHERE gid = ANY ('{{{gids}}}')"


class State(StrEnum):
    """How far a prepared transaction has come."""

    PREPARED = "prepared"
    """Not on all of its participants yet, or never: its session may be at it."""
    DECIDED = "decided"
    """Prepared on all, or ended on one; what is left has to follow."""
    IN_DOUBT = "in doubt"
    """A participant that would say what becomes of it is out of reach."""
    FOREIGN = "foreign"
    """Prepared by something else; nothing here touches it."""


class Here(StrEnum):
    """What one participant has of a transaction."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    NOT_PREPARED = "not prepared"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Found:
    """One row of a shard's ``pg_prepared_xacts``: a name, and its age in seconds."""

    gid: str
    age: float


@dataclass(frozen=True, slots=True)
class PreparedTransaction:
    """A transaction that is prepared on at least one shard.

    ``age`` is in seconds by the clock of the server that prepared it first;
    ``outcome`` is ``"commit"`` or ``"roll back"`` once that is decided; ``grace_left``
    is for how many seconds recovery leaves it alone yet.
    """

    gid: str
    age: float
    state: State
    participants: Mapping[str, Here]
    outcome: str | None = None
    grace_left: float = 0.0

    @property
    def unreachable(self) -> tuple[str, ...]:
        """The participants that could not be asked."""
        return tuple(s for s, h in self.participants.items() if h is Here.UNREACHABLE)

    @property
    def waits_for(self) -> str:
        """What recovery waits for, in words."""
        if self.state is State.FOREIGN:
            return "whoever prepared it; recovery leaves it alone"
        waits = []
        if self.grace_left > 0:
            waits.append(f"the grace time, {self.grace_left:.0f} s more")
        if self.unreachable:
            waits.append(f"shard {', '.join(self.unreachable)}, out of reach")
        return " and ".join(waits) or "nothing: run recover"


@dataclass(frozen=True, slots=True)
class Listing:
    """What is prepared, oldest first, and which shards could not be asked, and why."""

    transactions: tuple[PreparedTransaction, ...] = ()
    unreachable: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[PreparedTransaction]:
        return iter(self.transactions)

    def __len__(self) -> int:
        return len(self.transactions)


def prepared_transactions(
    connect: Callable[[str], Connection], topology: Topology, grace: float
) -> Listing:
    """Return what is prepared on the shards of *topology*.

    ``connect`` opens a connection to a shard; *grace* is for how many seconds recovery
    leaves a transaction to the session that prepared it.
    """
    visits = Visits()

    def ask(shard: str, sql: str) -> list[tuple[str | None, ...]]:
        with kept_if_sound(connect(shard)) as connection:
            return simple_rows(connection, sql)

    def look(shard: str) -> tuple[Found, ...]:
        found = ask(shard, _PREPARED)
        return tuple(Found(str(gid), float(age or 0)) for gid, age in found)

    answers = visits.at_once(look, topology.shards, time.monotonic() + PATIENCE)
    unreachable = {s: a for s, a in answers.items() if isinstance(a, Exception)}
    prepared = {s: a for s, a in answers.items() if not isinstance(a, Exception)}
    wanted = _to_be_looked_up(prepared, topology)

    def look_up(shard: str) -> dict[str, str]:
        sql = _OUTCOMES.format(gids=",".join(map(str, wanted[shard])))
        return {str(gid): str(outcome) for gid, outcome in ask(shard, sql)}

    outcomes: dict[str, Mapping[str, str]] = {}
    markers = visits.at_once(look_up, wanted, time.monotonic() + PATIENCE)
    for shard, answer in markers.items():
        if isinstance(answer, Exception):
            unreachable[shard] = answer
            prepared.pop(shard, None)
        else:
            outcomes[shard] = answer
    return Listing(
        listed(prepared, outcomes, topology, grace),
        {shard: _in_one_line(unreachable[shard]) for shard in sorted(unreachable)},
    )


def listed(
    prepared: Mapping[str, tuple[Found, ...]],
    outcomes: Mapping[str, Mapping[str, str]],
    topology: Topology,
    grace: float,
) -> tuple[PreparedTransaction, ...]:
    """Return the transactions that the shards' answers speak of, oldest first.

    *prepared* has what each shard that could be asked has prepared, *outcomes* the
    markers there, by gid.
    """
    branches, ages, foreign = _sorted_out(prepared, topology)
    made = list(foreign)
    names = {a.number: name for name, a in topology.addresses.items()}
    for gid, on in branches.items():
        participants = {}
        for number in gid.numbers:
            name = names.get(number, f"number {number}")
            outcome = outcomes.get(name, {}).get(str(gid))
            if name in on:
                participants[name] = Here.PREPARED
            elif name not in prepared:
                participants[name] = Here.UNREACHABLE
            elif outcome is None:
                participants[name] = Here.NOT_PREPARED
            else:
                ended = outcome == "committed"
                participants[name] = Here.COMMITTED if ended else Here.ROLLED_BACK
        state, decision = _state(participants.values())
        left = max(0.0, grace - ages[gid])
        made.append(
            PreparedTransaction(
                str(gid), ages[gid], state, participants, decision, left
            )
        )
    return tuple(sorted(made, key=lambda t: -t.age))


def _state(here: Iterable[Here]) -> tuple[State, str | None]:
    seen = set(here)
    if Here.ROLLED_BACK in seen:
        return State.DECIDED, "roll back"
    if Here.COMMITTED in seen or seen == {Here.PREPARED}:
        return State.DECIDED, "commit"
    if Here.UNREACHABLE in seen:
        return State.IN_DOUBT, None
    return State.PREPARED, None


def _sorted_out(
    prepared: Mapping[str, tuple[Found, ...]], topology: Topology
) -> tuple[dict[Gid, set[str]], dict[Gid, float], list[PreparedTransaction]]:
    """Return where ours are prepared, how old they are, and those of others."""
    branches: defaultdict[Gid, set[str]] = defaultdict(set)
    ages: defaultdict[Gid, float] = defaultdict(float)
    foreign = []
    for shard, found in prepared.items():
        number = topology.addresses[shard].number
        for one in found:
            gid = Gid.parse(one.gid)
            if (
                gid is not None
                and gid.cluster == topology.cluster[:8]
                and one.gid == gid.on(number)
            ):
                branches[gid].add(shard)
                ages[gid] = max(ages[gid], one.age)
            else:
                here = {shard: Here.PREPARED}
                foreign.append(
                    PreparedTransaction(one.gid, one.age, State.FOREIGN, here)
                )
    return branches, ages, foreign


def _to_be_looked_up(
    prepared: Mapping[str, tuple[Found, ...]], topology: Topology
) -> dict[str, list[Gid]]:
    """Return, by shard, the transactions that others have prepared and it has not."""
    names = {a.number: name for name, a in topology.addresses.items()}
    wanted: defaultdict[str, list[Gid]] = defaultdict(list)
    for gid, on in _sorted_out(prepared, topology)[0].items():
        for number in gid.numbers:
            name = names.get(number)
            if name is not None and name in prepared and name not in on:
                wanted[name].append(gid)
    return wanted


def _in_one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())
