"""Recovery and housekeeping, by what the servers hold afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from shardalchemy import Cluster
from shardalchemy.commit import patrol
from shardalchemy.commit.housekeeping import Housekeeping
from tests.commit.accounts import Account, Base, number_on
from tests.commit.orphans import Orphan
from tests.conftest import Servers

MARKERS = "SELECT outcome FROM shardalchemy.txn"


@pytest.fixture
def bank(empty_servers: Servers) -> Iterator[Cluster]:
    # Nothing but what a test asks for: the background would be faster than its asserts.
    with empty_servers.local.cluster(recover_in_background=False) as cluster:
        cluster.create_all(Base.metadata)
        empty_servers.run("DELETE FROM shardalchemy.txn")
        yield cluster


def until(condition: Callable[[], object], seconds: float = 10) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come about in time"
        time.sleep(0.02)
    return time.monotonic() - start


def test_what_all_have_prepared_is_committed(bank: Cluster, servers: Servers) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2", "s3"]).prepare()
    report = bank.recover(grace=0)
    assert report.committed == (str(orphan.gid),)
    assert orphan.is_on() == {"s1", "s2", "s3"}
    assert servers.prepared() == {}
    assert bank.recover(grace=0).committed == ()


def test_what_one_has_committed_is_committed_with_another_out_of_reach(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2", "s3"]).prepare().commit("s1")
    connect = bank._transactions.recovery._connect

    def refuse(shard: str) -> object:
        if shard == "s3":
            raise ConnectionRefusedError
        return connect(shard)

    monkeypatch.setattr(bank._transactions.recovery, "_connect", refuse)
    monkeypatch.setattr(bank._transactions.recovery, "_patience", 0.3)
    # Decided, but not told everywhere: it stays on the list.
    assert bank.recover(grace=0).in_doubt == (str(orphan.gid),)
    assert orphan.is_on() == {"s1", "s2"}
    monkeypatch.undo()
    assert bank.recover(grace=0).committed == (str(orphan.gid),)
    assert orphan.is_on() == {"s1", "s2", "s3"}


def test_what_one_has_not_prepared_is_rolled_back_and_never_can(
    bank: Cluster, servers: Servers
) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2"]).prepare("s1")
    assert bank.recover(grace=0).rolled_back == (str(orphan.gid),)
    assert servers.where(MARKERS) == {"s2": [("aborted",)]}
    with pytest.raises(psycopg.errors.UniqueViolation):
        orphan.prepare("s2")
    assert orphan.is_on() == set()


def test_recovery_waits_for_one_between_its_marker_and_prepare(
    bank: Cluster, servers: Servers
) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2"]).prepare("s1")
    with servers.connect("s2") as slow:
        slow.execute("BEGIN")
        orphan.mark(slow)
        recovery = threading.Thread(target=lambda: bank.recover(grace=0))
        recovery.start()
        time.sleep(0.6)
        assert recovery.is_alive()
        slow.execute(f"PREPARE TRANSACTION '{orphan.branch('s2')}'")
        recovery.join()
    assert servers.prepared() == {}
    assert servers.where(MARKERS) == {"s1": [("committed",)], "s2": [("committed",)]}


def test_young_ones_are_left_to_who_prepared_them(
    bank: Cluster, servers: Servers
) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2"]).prepare()
    assert bank.recover(grace=60) == type(bank.recover(grace=60))()
    assert orphan.is_on() == set()
    bank.recover(grace=0)


def test_what_is_not_ours_is_never_touched(bank: Cluster, servers: Servers) -> None:
    ours = Orphan(bank, servers, ["s1", "s2"])
    foreign = [
        "someone's".replace("'", "''"),
        # Of another cluster.
        str(ours.gid).replace(ours.gid.cluster, "ffffffff") + "/0",
    ]
    with servers.connect("s1") as connection:
        for gid in foreign:
            connection.execute("BEGIN")
            connection.execute(f"PREPARE TRANSACTION '{gid}'")
        connection.execute("CREATE DATABASE beside")
        url = servers.local.urls["s1"].replace("+psycopg", "").rpartition("/")[0]
        with psycopg.connect(f"{url}/beside", autocommit=True) as beside:
            beside.execute("BEGIN")
            beside.execute(f"PREPARE TRANSACTION '{ours.branch('s1')}'")
        assert bank.recover(grace=0) == type(bank.recover(grace=0))()
        assert len(servers.prepared()["s1"]) == 3
        for gid in foreign:
            connection.execute(f"ROLLBACK PREPARED '{gid}'")
        with psycopg.connect(f"{url}/beside", autocommit=True) as beside:
            beside.execute(f"ROLLBACK PREPARED '{ours.branch('s1')}'")
        connection.execute("DROP DATABASE beside")


def test_many_recoveries_at_once_agree(bank: Cluster, servers: Servers) -> None:
    start = 1
    orphans = []
    for turn in range(30):
        orphan = Orphan(bank, servers, ["s1", "s2", "s3", "s4"], start)
        start = max(orphan.accounts.values()) + 1
        orphans.append(orphan.prepare(*["s1", "s2", "s3", "s4"][: 4 - turn % 2]))
    clusters = [servers.local.cluster(recover_in_background=False) for _ in range(4)]
    threads = [
        threading.Thread(target=cluster.recover, kwargs={"grace": 0})
        for cluster in clusters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cluster in clusters:
        cluster.close()
    assert servers.prepared() == {}
    for turn, orphan in enumerate(orphans):
        assert len(orphan.is_on()) == (4 if turn % 2 == 0 else 0)


def test_recovery_goes_on_in_the_background_of_every_cluster(
    bank: Cluster, servers: Servers
) -> None:
    whole = Orphan(bank, servers, ["s1", "s2"]).prepare()
    half = Orphan(bank, servers, ["s3", "s4"]).prepare("s3")
    with servers.local.cluster() as cluster:
        cluster.topology  # noqa: B018  (which is what opens it)
        took = until(lambda: not servers.prepared())
        assert whole.is_on() == {"s1", "s2"}
        assert half.is_on() == set()
        print(f"resolved in the background after {took:.1f} s")


def test_the_background_can_be_left_out(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol, "INTERVAL", 0.05)
    monkeypatch.setattr(patrol, "GRACE", 0.0)
    orphan = Orphan(bank, servers, ["s1", "s2"]).prepare()
    with bank.sessionmaker()() as session:
        session.get(Account, 1)
        time.sleep(0.5)
    assert set(servers.prepared()) == {"s1", "s2"}
    assert bank.recover(grace=0).committed == (str(orphan.gid),)


def test_one_process_at_a_time_recovers_at_a_shard(
    bank: Cluster, servers: Servers
) -> None:
    Orphan(bank, servers, ["s1", "s2"]).prepare()
    recovery = bank._transactions.recovery
    lock = "SELECT pg_advisory_xact_lock(hashtext('shardalchemy.recovery'))"
    with servers.connect("s1") as one, servers.connect("s2") as two:
        for other in (one, two):
            other.execute("BEGIN")
            other.execute(lock)
        assert recovery.recover(0, alone=True).committed == ()
        two.execute("COMMIT")
        assert len(recovery.recover(0, alone=True).committed) == 1
    assert servers.prepared() == {}


def test_a_server_that_hangs_holds_up_nothing_else(
    bank: Cluster, servers: Servers
) -> None:
    Orphan(bank, servers, ["s1", "s2"]).prepare()
    stuck = Orphan(bank, servers, ["s3", "s4"]).prepare()
    bank._transactions.recovery._patience = 1.0
    servers.local.servers["s4"].pause()
    try:
        report = bank.recover(grace=0)
        assert len(report.committed) == 1
        assert report.in_doubt == (str(stuck.gid),)
        pool = bank._sync.of("s4").engine.pool
        held = pool.checkedout()
        for _ in range(3):
            assert bank.recover(grace=0).in_doubt == (str(stuck.gid),)
        # Each look at it costs nothing more: neither threads nor connections pile up.
        assert pool.checkedout() <= max(held, 1)
    finally:
        servers.local.servers["s4"].resume()
    until(lambda: bank.recover(grace=0).in_doubt == () and not servers.prepared())
    assert stuck.is_on() == {"s3", "s4"}


def clean(cluster: Cluster) -> int:
    """Clean twice, since what one call finds complete a later one deletes."""
    housekeeping = cluster._transactions.housekeeping
    return housekeeping.clean(age=0) + housekeeping.clean(age=0)


def test_markers_that_a_dead_process_left_are_removed(
    bank: Cluster, servers: Servers
) -> None:
    done = Orphan(bank, servers, ["s1", "s2"]).prepare().commit("s1", "s2")
    half = Orphan(bank, servers, ["s1", "s2"], 1000).prepare().commit("s1")
    assert clean(bank) == 2
    # That of the other is the proof that it has committed.
    assert servers.rows("s1", "SELECT gid FROM shardalchemy.txn") == [(str(half.gid),)]
    assert bank.recover(grace=0).committed == (str(half.gid),)
    assert clean(bank) == 2
    assert servers.where(MARKERS) == {}
    assert done.is_on() == half.is_on() == {"s1", "s2"}


def test_a_marker_stays_while_a_participant_cannot_be_asked(
    bank: Cluster, servers: Servers
) -> None:
    Orphan(bank, servers, ["s1", "s2"]).prepare().commit("s1", "s2")
    transactions = bank._transactions

    def refuse(shard: str) -> object:
        if shard == "s2":
            from sqlalchemy.exc import OperationalError

            raise OperationalError("", {}, psycopg.OperationalError("down"))
        return bank._sync.connect(shard)

    careful = Housekeeping(refuse, lambda: bank.topology)
    careful.clean(age=0)
    assert careful.clean(age=0) == 0
    assert set(servers.where(MARKERS)) == {"s1", "s2"}
    assert transactions.housekeeping.clean(age=60) == 0
    assert clean(bank) == 2


def test_a_tombstone_stays_while_its_participant_may_still_prepare(
    bank: Cluster, servers: Servers
) -> None:
    orphan = Orphan(bank, servers, ["s1", "s2"]).prepare("s1")
    with servers.connect("s2") as slow:
        slow.execute("BEGIN")
        slow.execute(
            "INSERT INTO accounts (number, balance) VALUES (%s, 1)",
            [orphan.accounts["s2"]],
        )
        assert bank.recover(grace=0).rolled_back == (str(orphan.gid),)
        assert clean(bank) == 0
        with pytest.raises(psycopg.errors.UniqueViolation):
            orphan.mark(slow)
        slow.execute("ROLLBACK")
    assert clean(bank) == 1
    assert servers.where(MARKERS) == {}


def test_the_markers_of_a_busy_process_do_not_pile_up(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardalchemy.commit import finisher

    monkeypatch.setattr(finisher, "RETENTION", 0.5)
    monkeypatch.setattr(finisher, "_FORGET_EVERY", 0.2)
    monkeypatch.setattr(finisher, "_VACUUM_AFTER", 100)
    numbers = [number_on(bank, shard) for shard in ("s1", "s2")]
    Session = bank.sessionmaker()
    with Session.begin() as session:
        session.add_all(Account(number=n, balance=1) for n in numbers)
    most = 0
    end = time.monotonic() + 3
    commits = 0
    with Session() as session:
        while time.monotonic() < end:
            for number in numbers[: 1 + commits % 2]:
                session.get_one(Account, number).balance += 1
            session.commit()
            commits += 1
            if commits % 50 == 0:
                rows = servers.rows("s1", "SELECT count(*) FROM shardalchemy.txn")
                most = max(most, rows[0][0])
    assert most < commits / 2
    until(lambda: not servers.where(MARKERS))
    ((size,),) = servers.rows("s1", "SELECT pg_relation_size('shardalchemy.txn')")
    # Vacuum has given the space of deleted markers to new ones.
    assert size <= 128 * 1024
