"""Who waits for whom, on all shards together, and whose wait has to be ended.

A server knows which of its backends waits for which. A session has a backend on each
shard that its transaction has reached, and if one of them waits, the session does. So
backends of one session are one node of the graph, and a cycle over several shards is a
deadlock that no server sees. One within a single shard is that server's own to end.

A backend is named by its shard, its process id and when its transaction began: the
next transaction of the same process is another backend here. So that two backends are
of one session, once published, stays true, and needs no look at the same moment.

A wait is named by its two backends and its own beginning. A look at a server lasts, and
one at several servers longer; what it shows need never have been so all at once. But a
wait that two looks show, one begun after the other had ended, has lasted all the time
between them. So waits that both show were there together, and a cycle of them is real.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

__all__ = ["Backend", "Deadlock", "Owner", "Wait", "deadlocks"]


@dataclass(frozen=True, slots=True)
class Backend:
    """A transaction of one server process.

    ``since`` is when it began, by its server's clock; None where it belongs to another
    role, of which a server does not say.
    """

    shard: str
    pid: int
    since: datetime | None


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """A session that has published its backends; orders as its transactions began."""

    began: datetime
    process: str
    session: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A backend waits for what another of the same shard has, or will have before it.

    ``since`` is when it began to wait. ``lock`` and ``query`` say for what, in words.
    """

    waiter: Backend
    blocker: Backend
    since: datetime
    lock: str = field(default="", compare=False)
    query: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Deadlock:
    """A cycle of waits over several shards; each waits for the next one's waiter.

    The first wait is the victim's: the youngest of its sessions.
    """

    victim: Owner
    waits: tuple[Wait, ...]

    def __str__(self) -> str:
        shards = sorted({wait.waiter.shard for wait in self.waits})
        lines = [
            f"deadlock detected between shards {', '.join(shards)}; this transaction is"
            " the youngest in it and was cancelled"
        ]
        for before, wait in zip(
            (self.waits[-1], *self.waits), self.waits, strict=False
        ):
            waiter, blocker = wait.waiter, wait.blocker
            same = (
                ""
                if before.blocker == waiter
                else f", in one transaction with process {before.blocker.pid} on shard"
                f" {before.blocker.shard},"
            )
            lines.append(
                f"Process {waiter.pid} on shard {waiter.shard}{same} waits for"
                f" {wait.lock}; blocked by process {blocker.pid}."
            )
            if wait.query:
                lines.append(f"Process {waiter.pid}: {wait.query}")
        return "\n".join(lines)


_Node: TypeAlias = Owner | Backend
# Where a way has come to, and its waits' shard: "" for none yet, None for several.
_Place: TypeAlias = tuple[_Node, str | None]
_Leaving: TypeAlias = "Mapping[_Node, list[tuple[Wait, _Node]]]"


def deadlocks(
    waits: Iterable[Wait], owners: Mapping[Backend, Owner]
) -> tuple[Deadlock, ...]:
    """Return deadlocks over several shards, with victims enough to end all of them.

    *waits* are those of all shards that held at one moment, and *owners* the sessions
    of the backends that are published. Whoever sees the same waits and owners finds
    the same victims. Sessions are looked at from the oldest on, and one is a victim if
    it closes a cycle of older ones that no victim before it has opened already. So
    each is the youngest session of a cycle, and one cycle costs one victim.
    """
    leaving: defaultdict[_Node, list[tuple[Wait, _Node]]] = defaultdict(list)
    for wait in sorted(waits, key=_order):
        waiter: _Node = owners.get(wait.waiter, wait.waiter)
        blocker: _Node = owners.get(wait.blocker, wait.blocker)
        if waiter != blocker:
            leaving[waiter].append((wait, blocker))
    found: list[Deadlock] = []
    out: set[_Node] = {node for node in leaving if isinstance(node, Owner)}
    for session in sorted(node for node in leaving if isinstance(node, Owner)):
        out.discard(session)
        cycle = _shortest_cycle(session, leaving, out)
        if cycle:
            found.append(Deadlock(session, cycle))
            out.add(session)
    return tuple(found)


def _order(wait: Wait) -> tuple[str, int, int, datetime]:
    return wait.waiter.shard, wait.waiter.pid, wait.blocker.pid, wait.since


def _shortest_cycle(
    start: Owner, leaving: _Leaving, out: set[_Node]
) -> tuple[Wait, ...]:
    """Return the waits of a shortest cycle over several shards, or none.

    It leads from *start* back to it, past the nodes that are *out*.
    """
    came: dict[_Place, tuple[_Place, Wait]] = {}
    ahead: deque[_Place] = deque([(start, "")])
    while ahead:
        here = ahead.popleft()
        node, shard = here
        for wait, blocker in leaving.get(node, ()):
            on = wait.waiter.shard
            there = (blocker, on if shard in ("", on) else None)
            if blocker == start:
                if there[1] is None:
                    return _simple(here, wait, came)
            elif blocker not in out and there not in came:
                came[there] = (here, wait)
                ahead.append(there)
    return ()


def _simple(
    last: _Place, closing: Wait, came: Mapping[_Place, tuple[_Place, Wait]]
) -> tuple[Wait, ...]:
    """Return the cycle that ends with *closing*, unless it meets a node twice.

    Such a one is several cycles that meet in a node, and none of them is over several
    shards, or it would be shorter: their servers end them.
    """
    waits = [closing]
    nodes = [last[0]]
    while last in came:
        last, wait = came[last]
        waits.append(wait)
        nodes.append(last[0])
    return tuple(reversed(waits)) if len(set(nodes)) == len(nodes) else ()
