"""Cycles of waits over several shards, and whose wait ends them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from shardalchemy.commit.waitgraph import Backend, Deadlock, Owner, Wait, deadlocks

START = datetime(2026, 1, 1, tzinfo=UTC)
SHARDS = ("s1", "s2", "s3")
SESSIONS = 4
PLAIN = 2

Node = Owner | Backend


def moment(second: int) -> datetime:
    return START + timedelta(seconds=second)


def backend(shard: str, pid: int) -> Backend:
    return Backend(shard, pid, moment(pid))


def wait(shard: str, waiter: int, blocker: int, since: int = 0) -> Wait:
    return Wait(backend(shard, waiter), backend(shard, blocker), moment(since))


def sessions(*members: int) -> dict[Backend, Owner]:
    """Return the owners of backends on every shard; a session's number is its age."""
    return {
        backend(shard, number): Owner(moment(number), "p", number)
        for number in members
        for shard in SHARDS
    }


def victims(waits: list[Wait], owners: dict[Backend, Owner]) -> list[int]:
    return [found.victim.session for found in deadlocks(waits, owners)]


def test_the_youngest_of_a_cycle_is_its_victim() -> None:
    waits = [wait("s1", 1, 2), wait("s2", 2, 1)]
    assert victims(waits, sessions(1, 2)) == [2]
    waits = [wait("s1", 3, 1), wait("s2", 1, 2), wait("s3", 2, 3)]
    assert victims(waits, sessions(1, 2, 3)) == [3]


def test_a_cycle_within_one_shard_is_its_servers_own() -> None:
    assert victims([wait("s1", 1, 2), wait("s1", 2, 1)], sessions(1, 2)) == []


def test_two_such_cycles_that_meet_in_a_session_are_their_servers_own() -> None:
    waits = [wait("s1", 1, 3), wait("s1", 3, 1), wait("s2", 2, 3), wait("s2", 3, 2)]
    assert victims(waits, sessions(1, 2, 3)) == []


def test_a_cycle_leads_through_transactions_that_are_nobodys() -> None:
    waits = [wait("s2", 1, 2), wait("s1", 2, 9), wait("s1", 9, 1)]
    assert victims(waits, sessions(1, 2)) == [2]
    # Without the last of them it is none.
    assert victims(waits[:2], sessions(1, 2)) == []


def test_backends_of_sessions_that_are_not_published_are_not_one_node() -> None:
    waits = [wait("s1", 1, 2), wait("s2", 2, 1)]
    assert victims(waits, sessions(1)) == []


def test_the_next_transaction_of_a_process_is_another() -> None:
    later = Backend("s2", 1, moment(50))
    waits = [wait("s1", 1, 2), Wait(backend("s2", 2), later, moment(60))]
    assert victims(waits, sessions(1, 2)) == []


def test_one_victim_is_enough_where_it_opens_every_cycle() -> None:
    # 2 closes a cycle with 1, and a longer one leads through 3, which is younger.
    waits = [wait("s1", 1, 2), wait("s2", 2, 1), wait("s2", 2, 3), wait("s3", 3, 1)]
    assert victims(waits, sessions(1, 2, 3)) == [2]


def test_two_deadlocks_have_a_victim_each() -> None:
    waits = [wait("s1", 1, 2), wait("s2", 2, 1), wait("s1", 3, 4), wait("s3", 4, 3)]
    assert victims(waits, sessions(1, 2, 3, 4)) == [2, 4]


def test_a_wait_that_began_anew_is_another_wait() -> None:
    assert wait("s1", 1, 2, since=5) != wait("s1", 1, 2, since=6)
    described = Wait(backend("s1", 1), backend("s1", 2), moment(5), "ShareLock", "x")
    assert described == wait("s1", 1, 2, since=5)


def test_the_message_names_every_member() -> None:
    waits = [
        Wait(
            backend("s1", 1), backend("s1", 2), moment(5), "ShareLock on x", "UPDATE 1"
        ),
        Wait(
            backend("s2", 2), backend("s2", 1), moment(5), "ShareLock on y", "UPDATE 2"
        ),
    ]
    (found,) = deadlocks(waits, sessions(1, 2))
    assert str(found).splitlines() == [
        "deadlock detected between shards s1, s2; this transaction is the youngest in"
        " it and was cancelled",
        "Process 2 on shard s2, in one transaction with process 2 on shard s1, waits"
        " for ShareLock on y; blocked by process 1.",
        "Process 2: UPDATE 2",
        "Process 1 on shard s1, in one transaction with process 1 on shard s2, waits"
        " for ShareLock on x; blocked by process 2.",
        "Process 1: UPDATE 1",
    ]


# -- against every cycle there is ---------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Wait], dict[Backend, Owner]]:
    """Sessions on every shard, transactions of others on each, and waits at random."""
    members = st.integers(1, SESSIONS + PLAIN)
    pairs = st.tuples(st.sampled_from(SHARDS), members, members)
    drawn = draw(st.lists(pairs, max_size=10))
    waits = [wait(s, a, b) for s, a, b in drawn if a != b]
    return waits, sessions(*range(1, SESSIONS + 1))


def cycles(waits: list[Wait], owners: dict[Backend, Owner]) -> Iterator[list[Wait]]:
    """Yield every cycle that meets no node twice, from each of its nodes on."""

    def further(path: list[Wait]) -> Iterator[list[Wait]]:
        here = node(path[-1].blocker)
        if here == node(path[0].waiter):
            yield path
        elif here not in [node(w.waiter) for w in path]:
            for following in waits:
                if node(following.waiter) == here:
                    yield from further([*path, following])

    def node(one: Backend) -> Node:
        return owners.get(one, one)

    for first in waits:
        yield from further([first])


def is_over_several(cycle: list[Wait] | tuple[Wait, ...]) -> bool:
    return len({w.waiter.shard for w in cycle}) > 1


def members(found: Deadlock, owners: dict[Backend, Owner]) -> list[Node]:
    return [owners.get(w.waiter, w.waiter) for w in found.waits]


@given(graphs())
def test_every_victim_is_the_youngest_of_a_cycle_over_several_shards(
    graph: tuple[list[Wait], dict[Backend, Owner]],
) -> None:
    waits, owners = graph
    there = [tuple(c) for c in cycles(waits, owners) if is_over_several(c)]
    for found in deadlocks(waits, owners):
        assert found.waits in there
        youngest = max(m for m in members(found, owners) if isinstance(m, Owner))
        assert found.victim == youngest == owners[found.waits[0].waiter]


@given(graphs())
def test_without_the_victims_no_deadlock_is_left(
    graph: tuple[list[Wait], dict[Backend, Owner]],
) -> None:
    waits, owners = graph
    out = {found.victim for found in deadlocks(waits, owners)}
    left = [w for w in waits if not out & {owners.get(w.waiter), owners.get(w.blocker)}]
    remaining = list(cycles(left, owners))
    # One that is tied to a server's own is found when the server has ended that.
    if all(is_over_several(cycle) for cycle in remaining):
        assert remaining == []


@given(graphs(), st.randoms(use_true_random=False))
def test_whoever_looks_finds_the_same(graph: tuple, random: object) -> None:
    waits, owners = graph
    shuffled = list(waits)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert deadlocks(shuffled, owners) == deadlocks(waits, owners)
