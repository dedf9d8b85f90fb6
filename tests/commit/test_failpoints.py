"""Death at every line between two messages, of a session, a recoverer, housekeeping.

A child process dies by SIGKILL at one point that it reaches; each point is met by a
child of its own (`crasher`, `failpoints`). Whatever it was doing is then finished by
another process: all of it or nothing, and what the dead had been told is true.

Of the points of each path 100 are met, evenly spread, or SHARDALCHEMY_FAILPOINTS; all
of them by ``python -m tests.commit.failpoints``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import psycopg
import pytest

from shardalchemy import Cluster
from shardalchemy.commit import Gid
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base
from tests.commit.crasher import APPLICATION, Crasher, Task
from tests.commit.failpoints import Death
from tests.conftest import Servers, roll_back_prepared

pytestmark = pytest.mark.timeout(900)

MOST = int(os.environ.get("SHARDALCHEMY_FAILPOINTS", "100"))
START = 100  # of every account
# Fewer than max_prepared_transactions, and each may leave one on every server.
AT_ONCE = 80

MARK = "INSERT INTO shardalchemy.txn (gid, outcome) VALUES ('{gid}', '{outcome}')"


def some_of(deaths: Sequence[Death]) -> list[Death]:
    """Return `MOST` of them, the first and the last among them."""
    if len(deaths) <= MOST:
        return list(deaths)
    return [deaths[i * (len(deaths) - 1) // (MOST - 1)] for i in range(MOST)]


class Bank:
    """Three servers, a cluster that outlives the dead, and their successor's eyes."""

    def __init__(self, local: LocalCluster, cluster: Cluster) -> None:
        self.urls = dict(local.urls)
        self.cluster = cluster
        self.servers = Servers(local)
        self.connections = {s: self.servers.connect(s) for s in self.servers}
        self._numbers: dict[str, list[int]] = {s: [] for s in self.servers}
        for number in range(1, 6000):
            self._numbers[cluster.shard_for(Account, number)].append(number)

    def accounts(self, shards: Sequence[str], count: int) -> list[tuple[int, ...]]:
        """Make *count* times an account on each of *shards*; return their numbers."""
        roll_back_prepared(self.servers)  # of a test that has failed
        for connection in self.connections.values():
            connection.execute("TRUNCATE accounts; DELETE FROM shardalchemy.txn")
        columns = []
        for i, shard in enumerate(shards):
            columns.append(self._numbers[shard][i * count : (i + 1) * count])
            self.connections[shard].execute(
                "INSERT INTO accounts (number, balance) SELECT unnest(%s::int[]), %s",
                [columns[-1], START],
            )
        return list(zip(*columns, strict=True))

    def task(self, do: str, **how: object) -> Task:
        return Task(do, self.urls, **how)

    def has_moved(self, numbers: tuple[int, ...]) -> bool:
        """Return whether the transfer took place; fail where it did in part."""
        found = {
            number: balance
            for connection in self.connections.values()
            for number, balance in connection.execute(
                "SELECT number, balance FROM accounts WHERE number = ANY (%s)",
                [list(numbers)],
            )
        }
        balances = [found[number] for number in numbers]
        before = [START] * len(numbers)
        after = [START - len(numbers) + 1, *[START + 1] * (len(numbers) - 1)]
        assert balances in (before, after), f"half done: {balances}"
        return balances == after

    def wait_for_the_dead(self) -> None:
        """Return when no server has a backend of theirs at work any more."""
        for connection in self.connections.values():
            end = time.monotonic() + 20
            while connection.execute(
                "SELECT 1 FROM pg_stat_activity WHERE application_name = %s",
                [APPLICATION],
            ).fetchone():
                assert time.monotonic() < end, "a backend does not end"
                time.sleep(0.005)

    def clean(self) -> None:
        """Delete what a round of housekeeping notes, with no regard to its age."""
        for _ in range(2):
            self.cluster._transactions.housekeeping.clean(age=0)

    def prepared(self) -> list[str]:
        return [
            f"{shard}: {gid}"
            for shard, connection in self.connections.items()
            for (gid,) in connection.execute("SELECT gid FROM pg_prepared_xacts")
        ]

    def markers(self) -> dict[str, set[str]]:
        """Return the gids of what stands in each server's table of markers."""
        found = {
            shard: {
                gid for (gid,) in connection.execute("SELECT gid FROM shardalchemy.txn")
            }
            for shard, connection in self.connections.items()
        }
        return {shard: gids for shard, gids in found.items() if gids}


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    with (
        LocalCluster(3, with_redis=False) as local,
        local.cluster(recover_in_background=False) as cluster,
    ):
        cluster.create_all(Base.metadata)
        made = Bank(local, cluster)
        yield made
        for connection in made.connections.values():
            connection.close()


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    with Crasher() as made:
        yield made


TRANSFERS = {
    "sync": (("s1", "s2"), {}),
    "async": (("s1", "s2"), {"is_async": True}),
    "sync, told when prepared": (("s1", "s2"), {"ack": "prepared"}),
    "async, told when prepared": (
        ("s1", "s2"),
        {"is_async": True, "ack": "prepared"},
    ),
    "one shard": (("s1", "s1"), {}),
    "three shards": (("s1", "s2", "s3"), {}),
    "in the finisher": (("s1", "s2"), {"thread": "shardalchemy-finisher"}),
    "in the finisher, told when prepared": (
        ("s1", "s2"),
        {"thread": "shardalchemy-finisher", "ack": "prepared"},
    ),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_a_client_that_dies_leaves_all_or_nothing(
    bank: Bank, crasher: Crasher, name: str
) -> None:
    shards, how = TRANSFERS[name]
    (first,) = bank.accounts(shards, 1)
    (whole,) = crasher.run([bank.task("transfer", numbers=first, **how)])
    assert whole.told == "committed"
    deaths = some_of(whole.reached)
    numbers = bank.accounts(shards, len(deaths))
    met: list[Death] = []
    moved: set[bool] = set()
    orphans = 0
    for start in range(0, len(deaths), AT_ONCE):
        some = list(zip(deaths, numbers, strict=True))[start : start + AT_ONCE]
        ends = crasher.run(
            bank.task("transfer", numbers=its, death=death, **how)
            for death, its in some
        )
        ended = list(zip(some, ends, strict=True))
        bank.wait_for_the_dead()
        report = bank.cluster.recover(grace=0)
        assert report.in_doubt == ()
        assert bank.prepared() == []
        orphans += len(report.committed) + len(report.rolled_back)
        for (death, its), end in ended:
            has_moved = bank.has_moved(its)
            moved.add(has_moved)
            if end.told is not None or not end.died:
                assert end.told == "committed"
                assert has_moved, f"told that it has committed before {death}"
            if end.died:
                met.append(death)
    # Replies may come in another order than they did at first, so that a line is not
    # reached as often; but each was the last of some process.
    if len(deaths) == len(whole.reached):
        assert {d.point for d in met} == {d.point for d in deaths}
    assert len(met) > 0.8 * len(deaths)
    in_finisher = "thread" in how
    assert moved == ({True} if in_finisher else {False, True})
    if len(set(shards)) == 1 or (in_finisher and "ack" not in how):
        assert orphans == 0
    else:
        assert orphans > 0
    # What the dead have not deleted, housekeeping does.
    bank.clean()
    assert bank.markers() == {}
    print(
        f"{name}: {len(met)} deaths at {len(whole.reached)} points,"
        f" {orphans} of them left something prepared"
    )


class Orphans:
    """Transfers between s1 and s2 whose clients have died, one of every kind."""

    ENDS = {
        ("prepared", "prepared"): True,
        ("prepared", "absent"): False,
        ("absent", "prepared"): False,
        ("prepared", "committed"): True,
        ("prepared", "fenced"): False,
    }

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.transfers = dict(
            zip(self.ENDS, bank.accounts(["s1", "s2"], len(self.ENDS)), strict=True)
        )
        for kinds, numbers in self.transfers.items():
            gid = new_gid(bank)
            for shard, kind, number, change in zip(
                ("s1", "s2"), kinds, numbers, (-1, 1), strict=True
            ):
                connection = bank.connections[shard]
                if kind == "fenced":
                    connection.execute(MARK.format(gid=gid, outcome="aborted"))
                elif kind != "absent":
                    leave_prepared(bank, shard, gid, number, change)
                if kind == "committed":
                    connection.execute(
                        f"COMMIT PREPARED '{gid.on(_number(bank, shard))}'"
                    )

    def assert_ended(self) -> None:
        for kinds, numbers in self.transfers.items():
            assert self._bank.has_moved(numbers) is self.ENDS[kinds], kinds
        assert self._bank.prepared() == []


def _number(bank: Bank, shard: str) -> int:
    return bank.cluster.topology.addresses[shard].number


def new_gid(bank: Bank) -> Gid:
    """Return the name of a new transaction on s1 and s2."""
    numbers = [_number(bank, shard) for shard in ("s1", "s2")]
    return Gid.new(bank.cluster.topology.cluster, numbers)


def leave_prepared(bank: Bank, shard: str, gid: Gid, number: int, change: int) -> None:
    bank.connections[shard].execute(
        f"BEGIN; UPDATE accounts SET balance = balance + {change}"
        f" WHERE number = {number}; {MARK.format(gid=gid, outcome='committed')};"
        f" PREPARE TRANSACTION '{gid.on(_number(bank, shard))}'"
    )


def test_a_recoverer_that_dies_is_followed_by_another(
    bank: Bank, crasher: Crasher
) -> None:
    recover = {"numbers": bank.accounts(["s1", "s2"], 1)[0], "thread": None}
    Orphans(bank)
    (whole,) = crasher.run([bank.task("recover", **recover)])
    assert not whole.died
    deaths = some_of(whole.reached)
    met = []
    for death in deaths:
        orphans = Orphans(bank)
        (end,) = crasher.run([bank.task("recover", death=death, **recover)])
        if end.died:
            met.append(death)
        assert bank.cluster.recover(grace=0).in_doubt == ()
        bank.wait_for_the_dead()
        orphans.assert_ended()
    assert len(met) > 0.8 * len(deaths)
    print(f"{len(met)} recoverers have died at {len(whole.reached)} points")


def test_housekeeping_that_dies_has_deleted_nothing_that_is_needed(
    bank: Bank, crasher: Crasher
) -> None:
    clean = {"numbers": bank.accounts(["s1", "s2"], 1)[0], "thread": None}

    def leave_markers(active: psycopg.Connection) -> tuple[Gid, Gid, tuple[int, ...]]:
        """Leave markers of every kind; return whose are still needed, on s1 and s2."""
        numbers, *_ = bank.accounts(["s1", "s2"], 2)
        one, two = (bank.connections[shard] for shard in ("s1", "s2"))
        complete, over, fenced, half = (new_gid(bank) for _ in range(4))
        for connection in (one, two):
            connection.execute(MARK.format(gid=complete, outcome="committed"))
        one.execute(MARK.format(gid=over, outcome="aborted"))
        # Whoever began this may still send its PREPARE, though it has not written.
        active.execute("BEGIN; SELECT 1")
        two.execute(MARK.format(gid=fenced, outcome="aborted"))
        for shard, number, change in zip(("s1", "s2"), numbers, (-1, 1), strict=True):
            leave_prepared(bank, shard, half, number, change)
        one.execute(f"COMMIT PREPARED '{half.on(_number(bank, 's1'))}'")
        return half, fenced, numbers

    with bank.servers.connect("s2") as active:
        leave_markers(active)
        (whole,) = crasher.run([bank.task("clean", **clean)])
        assert whole.told == 3
        bank.cluster.recover(grace=0)
        active.execute("ROLLBACK")
        deaths = some_of(whole.reached)
        met = []
        for death in deaths:
            half, fenced, numbers = leave_markers(active)
            (end,) = crasher.run([bank.task("clean", death=death, **clean)])
            if end.died:
                met.append(death)
            bank.wait_for_the_dead()
            bank.clean()
            assert bank.markers() == {"s1": {str(half)}, "s2": {str(fenced)}}
            assert bank.cluster.recover(grace=0).committed == (str(half),)
            assert bank.has_moved(numbers)
            active.execute("ROLLBACK")
    assert len(met) > 0.8 * len(deaths)
    print(f"{len(met)} housekeepers have died at {len(whole.reached)} points")
