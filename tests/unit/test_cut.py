"""What a cut tears, by a model in which everything may come between everything.

Transactions prepare on their shards and commit on them once they have on all. A
snapshot is opened in the same steps as on servers, each of which is one moment of one
shard. Whatever the interleaving, a cut that is accepted tears nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardalchemy.commit.cut import Evidence
from shardalchemy.commit.gid import Gid

CLUSTER = "0123456789abcdef"
SHARDS = {1: "s1", 2: "s2", 3: "s3"}

Choose = Callable[[int], int]
"""Returns one of so many possibilities, from 0."""


def gid(*numbers: int, transaction: int = 0) -> str:
    """Return a name that is the same every time, as is the order of a set of them."""
    return str(Gid(CLUSTER[:8], f"{transaction:032x}", tuple(sorted(numbers))))


# -- one cut at a time -----------------------------------------------------------------


def test_visible_on_one_and_missing_on_another_is_torn() -> None:
    whole, torn, other = gid(1, 2), gid(1, 2, 3), gid(2, 3)
    evidence = Evidence(SHARDS, base_is_whole=True)
    evidence.opened("s1", [whole, torn])
    evidence.opened("s2", [whole, other])
    evidence.opened("s3", [other])
    assert evidence.questions() == {}
    assert [(t.gid, t.missing) for t in evidence.torn()] == [(torn, ("s2", "s3"))]
    evidence.reopened("s3", [torn])
    assert [t.missing for t in evidence.torn()] == [("s2",)]
    evidence.reopened("s2", [torn])
    assert evidence.torn() == []


def test_what_a_base_that_may_be_torn_leaves_open_is_asked_for() -> None:
    fresh, prepared = gid(1, 2), gid(1, 3)
    evidence = Evidence(SHARDS, base_is_whole=False)
    evidence.opened("s1", [fresh], [])
    evidence.opened("s2", [], [])
    evidence.opened("s3", [], [prepared])
    assert evidence.questions() == {"s2": [fresh], "s1": [prepared]}
    evidence.told("s2", [fresh], [fresh])
    evidence.told("s1", [prepared], [prepared])
    assert evidence.questions() == {}
    assert [(t.gid, t.missing) for t in evidence.torn()] == [(prepared, ("s3",))]


def test_prepared_and_then_committed_before_the_snapshot_is_visible() -> None:
    evidence = Evidence(SHARDS, base_is_whole=False)
    name = gid(1, 2)
    evidence.opened("s1", [name], [name])
    evidence.opened("s2", [name], [])
    assert evidence.questions() == {}
    assert evidence.torn() == []


def test_shards_that_the_cut_does_not_have_are_not_looked_at() -> None:
    evidence = Evidence({1: "s1"}, base_is_whole=False)
    evidence.opened("s1", [gid(1, 2)])
    assert evidence.questions() == {}
    assert evidence.torn() == []


# -- the model -------------------------------------------------------------------------


class Servers:
    """Shards on which transactions of others go on, a step at a time."""

    def __init__(self, transactions: list[str]) -> None:
        self.participants = {t: self._shards(t) for t in transactions}
        self.prepared: dict[str, set[str]] = {s: set() for s in SHARDS.values()}
        self.committed: dict[str, set[str]] = {s: set() for s in SHARDS.values()}
        self.had_prepared: set[tuple[str, str]] = set()

    @staticmethod
    def _shards(transaction: str) -> list[str]:
        parsed = Gid.parse(transaction)
        assert parsed is not None
        return [SHARDS[number] for number in parsed.numbers]

    def possible(self) -> list[tuple[str, str, bool]]:
        """Return the steps that transactions may take: which, where, a commit."""
        steps = []
        for transaction, shards in self.participants.items():
            decided = all((transaction, s) in self.had_prepared for s in shards)
            for shard in shards:
                if (transaction, shard) not in self.had_prepared:
                    steps.append((transaction, shard, False))
                elif decided and transaction in self.prepared[shard]:
                    steps.append((transaction, shard, True))
        return steps

    def take(self, step: tuple[str, str, bool]) -> None:
        transaction, shard, commits = step
        if commits:
            self.help(transaction, shard)
        else:
            self.prepared[shard].add(transaction)
            self.had_prepared.add((transaction, shard))

    def help(self, transaction: str, shard: str) -> None:
        """Commit what is decided and still prepared."""
        assert transaction in self.prepared[shard] | self.committed[shard]
        self.prepared[shard].discard(transaction)
        self.committed[shard].add(transaction)


Step = Callable[[], None]


def opening(
    servers: Servers,
    cut: dict[str, frozenset[str]],
    base: dict[str, frozenset[str]] | None,
    *,
    looks_at_prepared: bool,
) -> Iterator[list[list[Step]]]:
    """Open *cut* as `snapshot` does; yields for each round the steps on each shard."""
    evidence = Evidence(SHARDS, base_is_whole=base is not None)
    prepared: dict[str, list[str]] = {s: [] for s in SHARDS.values()}

    def look(shard: str) -> None:
        if looks_at_prepared:
            prepared[shard] = list(servers.prepared[shard])

    def open_(shard: str, compared: dict[str, frozenset[str]]) -> list[str]:
        cut[shard] = frozenset(servers.committed[shard])
        return list(cut[shard] - compared[shard])

    if base is None:
        taken: dict[str, frozenset[str]] = {}

        def take(shard: str) -> None:
            taken[shard] = frozenset(servers.committed[shard])

        def open_first(shard: str) -> None:
            evidence.opened(shard, open_(shard, taken), prepared[shard])

        yield [[lambda s=s: take(s)] for s in SHARDS.values()]
        yield [
            [lambda s=s: look(s), lambda s=s: open_first(s)] for s in SHARDS.values()
        ]
    else:
        yield [
            [lambda s=s: evidence.opened(s, open_(s, base))] for s in SHARDS.values()
        ]
    for turn in count():
        for shard, asked in evidence.questions().items():
            evidence.told(shard, asked, [t for t in asked if t in cut[shard]])
        torn = evidence.torn()
        if not torn:
            return
        missing = sorted({shard for one in torn for shard in one.missing})
        if turn > 2:
            for one in torn:
                for shard in one.missing:
                    servers.help(one.gid, shard)
        yield [[lambda s=s: evidence.reopened(s, open_(s, dict(cut)))] for s in missing]


def torn_in(servers: Servers, cut: dict[str, frozenset[str]]) -> list[str]:
    return [
        transaction
        for transaction, shards in servers.participants.items()
        if 0 < sum(transaction in cut[s] for s in shards) < len(shards)
    ]


def run(
    choose: Choose,
    transactions: list[str],
    snapshots: int,
    *,
    looks_at_prepared: bool = True,
    before: bool = True,
) -> list[str]:
    """Open snapshots among the transactions' steps; return what one of them tears.

    *choose* says at every point which of the next steps is taken.
    """
    servers = Servers(transactions)
    while before and (possible := servers.possible()):
        step = choose(len(possible) + 1)
        if step == len(possible):
            break
        servers.take(possible[step])
    base: dict[str, frozenset[str]] | None = None
    for _ in range(snapshots):
        cut: dict[str, frozenset[str]] = {}
        for round_ in opening(servers, cut, base, looks_at_prepared=looks_at_prepared):
            left = [list(steps) for steps in round_]
            while left:
                possible = servers.possible()
                choice = choose(len(left) + len(possible))
                if choice < len(left):
                    left[choice].pop(0)()
                    left = [steps for steps in left if steps]
                else:
                    servers.take(possible[choice - len(left)])
        torn = torn_in(servers, cut)
        if torn:
            return torn
        base = cut
    return []


def every_way(most: int) -> Iterator[Choose]:
    """Yield choosers that go together through every sequence of choices, up to *most*.

    What the model asks for at a point depends on the choices before it alone.
    """
    path: list[tuple[int, int]] = []
    for _ in range(most):
        place = 0

        def choose(possibilities: int) -> int:
            nonlocal place
            if place == len(path):
                path.append((0, possibilities))
            place += 1
            return path[place - 1][0]

        yield choose
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1] = (path[-1][0] + 1, path[-1][1])
    raise AssertionError("there are more ways than were to be tried")


@given(st.data())
@settings(max_examples=400)
def test_no_interleaving_has_a_torn_cut_accepted(data: st.DataObject) -> None:
    sets = st.sets(st.sampled_from(sorted(SHARDS)), min_size=2)
    number = data.draw(st.integers(1, 5))
    transactions = [gid(*data.draw(sets), transaction=n) for n in range(number)]
    random = data.draw(st.randoms(use_true_random=False))
    assert run(random.randrange, transactions, snapshots=3) == []


@pytest.fixture
def two_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SHARDS, 3)


@pytest.mark.usefixtures("two_shards")
def test_nor_has_any_of_one_transaction_on_two_shards() -> None:
    transaction = gid(1, 2)
    ways = 0
    for choose in every_way(200_000):
        assert run(choose, [transaction], snapshots=1, before=False) == []
        ways += 1
    assert ways > 1_000


@pytest.mark.usefixtures("two_shards")
def test_the_model_finds_what_is_torn_without_a_look_at_what_is_prepared() -> None:
    transaction = gid(1, 2)
    found = [
        run(choose, [transaction], 1, before=False, looks_at_prepared=False)
        for choose in every_way(200_000)
    ]
    assert [transaction] in found
