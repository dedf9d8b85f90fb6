"""Explore every interleaving of the commit protocol's own state machines.

What the session and the recoverers send, and what they conclude from a reply, is
`shardalchemy.commit.protocol` itself. Here is only the world around it: participants, a
network that delays and loses messages for as long as it likes, processes that stop at
any step (one that stops is one that is given no further step), backends that die, and
housekeeping at any moment.

A participant's transaction is Active, Marked (its marker is inserted), Prepared,
Committed, Forgotten (committed, and its marker deleted) or X, ended without effect.
Every state is checked: no participant has committed beside one that never will; what
the session was told is what has happened; and whatever is prepared, one more recoverer
that reaches all shards ends it everywhere alike.

    python -m tests.commit.model          what the tests explore, and the seeded bugs
    python -m tests.commit.model full     more participants and recoverers as well
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

from shardalchemy.commit import protocol
from shardalchemy.commit.protocol import (
    Coordinator,
    Decision,
    Recoverer,
    Reply,
    Request,
)

_NAMES = "abcd"

# Messages are their values, as text: an Enum's hash is computed in Python.
PREPARE, COMMIT, ROLLBACK, LOOK, FENCE = (request.value for request in Request)
_REQUESTS = frozenset(request.value for request in Request)
LOST, UNREACHABLE = Reply.LOST.value, Reply.UNREACHABLE.value
PREPARED, REFUSED, DONE = Reply.PREPARED.value, Reply.REFUSED.value, Reply.DONE.value
ABSENT, BUSY = Reply.ABSENT.value, Reply.BUSY.value
COMMITTED, ABORTED = Reply.COMMITTED.value, Reply.ABORTED.value

assert not _REQUESTS & {reply.value for reply in Reply}


@dataclass(frozen=True)
class Rules:
    """What the servers and housekeeping do; the seeded bugs change it."""

    fence_leaves_a_tombstone: bool = True
    tombstone_outlives: str = "AMP"
    """The states of a transaction in which housekeeping leaves its tombstone alone."""
    markers_outlive_the_prepared: bool = True


@dataclass(frozen=True)
class Size:
    """How much is explored.

    ``replies_travel``: other things happen between a request's effect and the arrival
    of its reply. ``late``: a request may arrive after its sender has given it up and
    gone on. Without these two, it still arrives at any time at which it is waited for,
    or after the process that has sent it has stopped. ``gives_up``: a recoverer may
    find any participant out of reach; without it, it asks until it knows.
    """

    participants: int
    recoverers: int
    replies_travel: bool = True
    late: bool = True
    gives_up: bool = True

    def __str__(self) -> str:
        without = [
            what
            for what, there in (
                ("replies that travel", self.replies_travel),
                ("late requests", self.late),
                ("giving up", self.gives_up),
            )
            if not there
        ]
        text = f"{self.participants} participants, {self.recoverers} recoverers"
        return text + (f", without {', '.join(without)}" if without else "")


class Participant(NamedTuple):
    """One server's part of the transaction."""

    transaction: str = "A"
    tombstone: bool = False
    late: tuple[str, ...] = ()
    """Requests whose senders have given them up, and which may yet arrive."""


Machine = Coordinator | Recoverer
Mail = tuple[str, ...]
"""For each participant a request on its way to it, a reply on its way back, or ""."""

World = tuple[tuple[int, ...], int, str, tuple[int, ...]]


def _carried_out(
    rules: Rules, participant: Participant, request: str
) -> tuple[tuple[Participant, str], ...]:
    """Return what may become of a participant by a request, and the reply, if any."""
    state = participant.transaction

    def became(transaction: str) -> Participant:
        return _relevant(participant._replace(transaction=transaction))

    if request == PREPARE:
        if state == "A":
            # The marker's key is the tombstone's; and any statement may fail.
            failed = (became("X"), REFUSED)
            return (failed,) if participant.tombstone else (failed, (became("M"), ""))
        if state == "M":
            return (became("P"), PREPARED), (became("X"), REFUSED)
        return ()  # its backend has died, and says nothing
    if request == LOOK:
        return ((participant, PREPARED if state == "P" else ABSENT),)
    if request == FENCE:
        if state == "C":
            return ((participant, COMMITTED),)
        if state in "MP":
            return ((participant, BUSY),)
        left = participant._replace(tombstone=rules.fence_leaves_a_tombstone)
        return ((_relevant(left), ABORTED),)
    after = "C" if request == COMMIT else "X"
    return ((became(after) if state == "P" else participant, DONE),)


_MAY_ACT = {
    "A": (PREPARE, COMMIT, ROLLBACK, FENCE),
    "M": (PREPARE, COMMIT, ROLLBACK),
    "P": (COMMIT, ROLLBACK),
}
"""The requests that may change a transaction, at once or later, in each state."""


def _relevant(participant: Participant) -> Participant:
    """Leave out what makes no difference any more.

    Where the transaction can no longer insert its marker, a tombstone says nothing that
    its absence does not: to FENCE, either answers "aborted".
    """
    state = participant.transaction
    late = tuple(r for r in participant.late if r in _MAY_ACT.get(state, ()))
    return Participant(state, participant.tombstone and state == "A", late)


def _given_up(participant: Participant, request: str) -> Participant:
    """Return a participant that a request may reach when nobody waits for it."""
    late = tuple(sorted({*participant.late, request}))
    return _relevant(participant._replace(late=late))


def _by_itself(rules: Rules, participant: Participant) -> tuple[Participant, ...]:
    """Return what may become of a participant with nobody's further doing."""
    steps = []
    if participant.transaction in "AM":
        steps.append(_relevant(participant._replace(transaction="X")))
    if participant.tombstone and (
        participant.transaction not in rules.tombstone_outlives
    ):
        steps.append(participant._replace(tombstone=False))
    for request in participant.late:
        steps += [after for after, _ in _carried_out(rules, participant, request)]
    return tuple(steps)


@dataclass
class Outcome:
    """What an exploration has found; ``trace`` leads to the violation."""

    states: int
    seconds: float
    violation: str | None = None
    trace: list[str] = field(default_factory=list)


class Numbered(dict[Any, int]):
    """Values, as keys, with their numbers; ``list`` has them in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.list: list[Any] = []

    def __missing__(self, value: Hashable) -> int:
        number = self[value] = len(self.list)
        self.list.append(value)
        return number


class Exploration:
    """A breadth-first walk through every state of a world of some size.

    A world is ``(participants, session, told, recoverers)``, of numbers: what they
    stand for, and what follows from them, is computed once.
    """

    def __init__(self, size: Size, rules: Rules = Rules()) -> None:
        self.size = size
        self.rules = rules
        self._names = _NAMES[: size.participants]
        self._participants = Numbered()
        self._actors = Numbered()
        self._columns = Numbered()
        for step in (
            self._alone,
            self._column,
            self._moves,
            self._reordered,
            self._same,
            self._states,
            self._told,
            self._unended,
        ):
            setattr(self, step.__name__, lru_cache(maxsize=None)(step))

    def run(self) -> Outcome:
        """Walk until there is nothing new, or something that must not be."""
        began = time.monotonic()
        first = (
            (self._participants[Participant()],) * self.size.participants,
            self._started(Coordinator.of(self._names)),
            "",
            (self._started(Recoverer.of(self._names)),) * self.size.recoverers,
        )
        came_from: dict[World, World | None] = {first: None}
        todo = deque([first])
        while todo:
            world = todo.popleft()
            violation = self._violation(world)
            if violation is not None:
                trace = self._trace(world, came_from)
                seconds = time.monotonic() - began
                return Outcome(len(came_from), seconds, violation, trace)
            for step in self._steps(world):
                if step not in came_from:
                    came_from[step] = world
                    todo.append(step)
        return Outcome(len(came_from), time.monotonic() - began)

    def _steps(self, world: World) -> Iterator[World]:
        """Yield all that may happen next."""
        there, session, told, recoverers = world
        same = self._same
        alone = self._alone
        for i, participant in enumerate(there):
            before, behind = there[:i], there[i + 1 :]
            for after in alone(participant):
                yield same((*before, after, *behind), session, told, recoverers)
            for after, actor in self._moves(session, i, participant):
                now = (*before, after, *behind)
                actor, said = self._told(actor, told, "F" in self._states(now))
                yield same(now, actor, said, recoverers)
            for k, recoverer in enumerate(recoverers):
                if k and recoverer == recoverers[k - 1]:
                    continue
                for after, actor in self._moves(recoverer, i, participant):
                    others = (*recoverers[:k], actor, *recoverers[k + 1 :])
                    yield same((*before, after, *behind), session, told, others)
        states = self._states(there)
        if "C" in states and not (
            "P" in states and self.rules.markers_outlive_the_prepared
        ):
            for i, state in enumerate(states):
                if state == "C":
                    after = self._participants[Participant("F")]
                    now = (*there[:i], after, *there[i + 1 :])
                    yield same(now, session, told, recoverers)

    def _states(self, there: tuple[int, ...]) -> str:
        found = self._participants.list
        return "".join([found[p].transaction for p in there])

    def _alone(self, participant: int) -> list[int]:
        found = _by_itself(self.rules, self._participants.list[participant])
        return [self._participants[after] for after in found]

    def _moves(self, actor: int, i: int, participant: int) -> list[tuple[int, int]]:
        """Return what may happen to what *actor* has on the wire with participant *i*.

        Pairs of the participant and the actor after it.
        """
        machine, mail = self._actors.list[actor]
        there = self._participants.list[participant]
        letter = mail[i]
        found: list[tuple[Participant, int]] = []
        if not letter:
            return []
        left = there
        if letter in _REQUESTS:
            for after, reply in _carried_out(self.rules, there, letter):
                if not reply:
                    found.append((after, actor))
                elif self.size.replies_travel:
                    sent = (*mail[:i], reply, *mail[i + 1 :])
                    found.append((after, self._actors[machine, sent]))
                else:
                    found.append((after, self._heard(machine, mail, i, reply)))
            if self.size.late:
                left = _given_up(there, letter)
        else:
            found.append((there, self._heard(machine, mail, i, letter)))
        found.append((left, self._heard(machine, mail, i, LOST)))
        if self.size.gives_up and isinstance(machine, Recoverer):
            found.append((left, self._heard(machine, mail, i, UNREACHABLE)))
        return [(self._participants[after], to) for after, to in dict.fromkeys(found)]

    def _started(self, machine: Coordinator | Recoverer) -> int:
        """Return an actor that has sent its first requests."""
        return self._actors[machine, _wanted(machine)]

    def _heard(self, machine: Machine, mail: Mail, i: int, reply: str) -> int:
        """Return an actor that has got a reply, and has sent what it wants now."""
        machine = machine.after({machine.participants[i]: Reply(reply)})
        wanted = _wanted(machine)
        sent = tuple(
            wanted[j] if j == i or not letter else letter
            for j, letter in enumerate(mail)
        )
        return self._actors[machine, sent]

    def _told(self, actor: int, told: str, is_forgotten: bool) -> tuple[int, str]:
        """Return the session, and what it is told, once it has got so far.

        It is told as soon as the outcome is decided, which is what ``ack="prepared"``
        does; everything that must hold then has to hold later too. That a marker may
        have been forgotten it knows by the time that has passed.
        """
        machine, _ = self._actors.list[actor]
        decision = machine.decision
        if told or decision is None:
            return actor, told
        is_first_hand = isinstance(machine, Coordinator)
        if decision is Decision.COMMIT:
            return actor, "committed"
        if decision is Decision.RECOVER and is_first_hand:
            return self._started(Recoverer.of(self._names)), ""
        if decision is Decision.ABORT and (is_first_hand or not is_forgotten):
            return actor, "rolled back"
        return actor, "unknown"

    def _same(
        self,
        there: tuple[int, ...],
        session: int,
        told: str,
        recoverers: tuple[int, ...],
    ) -> World:
        """Return the one world that stands for all that differ by names alone."""
        column = self._column
        keys = [
            (p, column(session, i), *[column(r, i) for r in recoverers])
            for i, p in enumerate(there)
        ]
        ordered = sorted(keys)
        if keys != ordered:
            order = tuple(sorted(range(len(keys)), key=keys.__getitem__))
            there = tuple(there[i] for i in order)
            session = self._reordered(session, order)
            recoverers = tuple(self._reordered(r, order) for r in recoverers)
        return there, session, told, tuple(sorted(recoverers))

    def _column(self, actor: int, i: int) -> int:
        machine, mail = self._actors.list[actor]
        return self._columns[_known(machine)[i], mail[i]]

    def _reordered(self, actor: int, order: tuple[int, ...]) -> int:
        machine, mail = self._actors.list[actor]
        known = tuple(_known(machine)[i] for i in order)
        machine = (
            replace(machine, heard=known)
            if isinstance(machine, Coordinator)
            else replace(machine, seen=known)
        )
        return self._actors[machine, tuple(mail[i] for i in order)]

    def _violation(self, world: World) -> str | None:
        there, _, told, _ = world
        states = self._states(there)
        committed = "C" in states or "F" in states
        if "X" in states:
            if committed:
                return "one participant has committed and another never will"
            if told == "committed":
                return "told that it has committed, and a participant never will"
        if committed and told == "rolled back":
            return "told that it was rolled back, and a participant has committed"
        return self._unended(there) if "P" in states else None

    def _unended(self, there: tuple[int, ...]) -> str | None:
        """Return what one more recoverer, that reaches all, would leave behind."""
        participants = [self._participants.list[p] for p in there]
        # The backends of processes that have stopped end too, within its patience.
        participants = [
            p._replace(transaction="X") if p.transaction in "AM" else p
            for p in participants
        ]
        actor = self._started(Recoverer.of(self._names))
        for _ in range(10):
            for i in range(len(participants)):
                machine, mail = self._actors.list[actor]
                if mail[i]:
                    ((participants[i], reply),) = _carried_out(
                        self.rules, participants[i], mail[i]
                    )
                    actor = self._heard(machine, mail, i, reply)
        machine, mail = self._actors.list[actor]
        states = "".join(sorted({p.transaction for p in participants}))
        if any(mail) or not machine.is_finished or states not in ("C", "CF", "X"):
            return f"one more recoverer leaves {states}"
        return None

    def _trace(
        self, world: World | None, came_from: dict[World, World | None]
    ) -> list[str]:
        steps: list[str] = []
        while world is not None:
            steps.append(self._text(world))
            world = came_from[world]
        return steps[::-1]

    def _text(self, world: World) -> str:
        there, session, told, recoverers = world

        def of_one(actor: int, i: int) -> str:
            machine, mail = self._actors.list[actor]
            known = _known(machine)[i]
            return f"{'-' if known is None else known.value}|{mail[i]}"

        lines = []
        for i, number in enumerate(there):
            p = self._participants.list[number]
            lines.append(
                p.transaction
                + (" tombstone" if p.tombstone else "")
                + (f" late: {', '.join(p.late)}" if p.late else "")
                + f" (session {of_one(session, i)}"
                + "".join(f"; recoverer {of_one(r, i)}" for r in recoverers)
                + ")"
            )
        return "; ".join(lines) + (f"; told {told}" if told else "")


def _known(machine: Coordinator | Recoverer) -> tuple[Reply | None, ...]:
    return machine.heard if isinstance(machine, Coordinator) else machine.seen


def _wanted(machine: Coordinator | Recoverer) -> tuple[str, ...]:
    """Return what *machine* wants to send to each participant, or ""."""
    requests = machine.requests
    return tuple(
        requests[name].value if name in requests else ""
        for name in machine.participants
    )


@dataclass(frozen=True)
class Bug:
    """A mistake that the exploration has to find: in the rules, or in the machines."""

    name: str
    rules: Rules = Rules()
    patches: Callable[[ExitStack], object] = lambda stack: None
    size: Size = Size(2, 1, replies_travel=False)

    def found(self) -> Outcome:
        with ExitStack() as stack:
            self.patches(stack)
            return Exploration(self.size, self.rules).run()


def _deciding(
    decide: Callable[[Coordinator], Decision],
) -> Callable[[ExitStack], object]:
    """Return a patch by which the session decides so, once it has heard of all."""

    def decision(self: Coordinator) -> Decision | None:
        return None if None in self.heard else decide(self)

    return lambda stack: stack.enter_context(
        mock.patch.object(Coordinator, "decision", property(decision))
    )


def _concluding(
    conclude: Callable[[tuple[Reply | None, ...]], Decision | None],
) -> Callable[[ExitStack], object]:
    """Return a patch by which recoverers conclude so where they would not conclude."""
    right = protocol._concluded

    def concluded(seen: tuple[Reply | None, ...]) -> Decision | None:
        return right(seen) or conclude(seen)

    return lambda stack: stack.enter_context(
        mock.patch.object(protocol, "_concluded", concluded)
    )


def _commit_if(condition: bool) -> Decision:
    return Decision.COMMIT if condition else Decision.ABORT


BUGS = (
    Bug("no tombstone", Rules(fence_leaves_a_tombstone=False)),
    Bug(
        "a tombstone is deleted while its participant may still prepare",
        Rules(tombstone_outlives=""),
    ),
    Bug(
        "markers are forgotten before all have committed",
        Rules(markers_outlive_the_prepared=False),
    ),
    Bug(
        "a lost reply counts as a failure",
        patches=_deciding(
            lambda c: _commit_if(set(c.heard) <= {Reply.PREPARED, Reply.DONE})
        ),
    ),
    Bug(
        "a lost reply counts as prepared",
        patches=_deciding(lambda c: _commit_if(Reply.REFUSED not in c.heard)),
    ),
    Bug(
        "a session commits after one refusal",
        patches=_deciding(
            lambda c: (
                Decision.RECOVER
                if Reply.LOST in c.heard
                else _commit_if(set(c.heard) != {Reply.REFUSED})
            )
        ),
    ),
    Bug(
        "a recoverer commits although one is out of reach",
        patches=_concluding(
            lambda seen: (
                Decision.COMMIT
                if set(seen) == {Reply.PREPARED, Reply.UNREACHABLE}
                else None
            )
        ),
    ),
    Bug(
        "a recoverer rolls back what is absent without fencing it",
        patches=_concluding(
            lambda seen: Decision.ABORT if Reply.ABSENT in seen else None
        ),
    ),
    Bug(
        "a recoverer takes a busy marker for a refusal",
        patches=_concluding(
            lambda seen: Decision.ABORT if Reply.BUSY in seen else None
        ),
    ),
)

SIZES = (
    Size(2, 1),
    Size(2, 2, replies_travel=False, late=False),
    Size(3, 1, replies_travel=False, late=False),
)
MORE_SIZES = (
    Size(2, 2, replies_travel=False),
    Size(3, 1, replies_travel=False),
    Size(3, 2, replies_travel=False, late=False, gives_up=False),
)


def main() -> None:
    """Print what is explored, and what is found of the seeded bugs."""
    for size in SIZES + (MORE_SIZES if "full" in sys.argv else ()):
        outcome = Exploration(size).run()
        verdict = f"VIOLATION: {outcome.violation}" if outcome.violation else "holds"
        print(
            f"{size}: {verdict} ({outcome.states:,} states, {outcome.seconds:.1f} s)",
            flush=True,
        )
        for step in outcome.trace:
            print("   ", step)
    for bug in BUGS:
        outcome = bug.found()
        print(
            f"seeded bug, {bug.name}: {outcome.violation or 'NOT FOUND'}"
            f" (after {outcome.states:,} states)"
        )
        if "traces" in sys.argv:
            for step in outcome.trace:
                print("   ", step)


if __name__ == "__main__":
    main()
