"""A participant that dies before, during and after PREPARE.

Whatever the client is told, no shard ends committed alone: told of a failure, nothing
is anywhere; told of success, it is everywhere; told that it is unknown, recovery makes
it one of the two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shardalchemy import Cluster, CommitOutcomeUnknown, TransactionAborted
from shardalchemy.commit import driver, finisher
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers
from tests.proxy import CuttingProxy

BALANCES = "SELECT number, balance FROM accounts"


class Bank:
    """Two shards of their own, to be killed, with a client that can be told lies."""

    def __init__(self, local: LocalCluster, cluster: Cluster) -> None:
        self.local = local
        self.cluster = cluster
        self.servers = Servers(local)
        self.numbers = {s: number_on(cluster, s) for s in ("s1", "s2")}

    def begin(self) -> object:
        session = self.cluster.sessionmaker()()
        session.add_all(Account(number=n, balance=1) for n in self.numbers.values())
        session.flush()
        return session

    def everywhere(self) -> bool:
        """Return whether the transaction is on both shards; fail if it is on one."""
        held = self.servers.where(BALANCES)
        assert held in ({}, {s: [(n, 1)] for s, n in self.numbers.items()})
        return bool(held)


@pytest.fixture(scope="module")
def killable() -> Iterator[LocalCluster]:
    with LocalCluster(2, with_redis=False) as local:
        yield local


@pytest.fixture
def bank(killable: LocalCluster) -> Iterator[Bank]:
    with killable.cluster() as cluster:
        cluster.create_all(Base.metadata)
        made = Bank(killable, cluster)
        made.servers.run("TRUNCATE accounts; DELETE FROM shardalchemy.txn")
        yield made
        made.cluster.recover(grace=0)
        assert made.servers.prepared() == {}


def later(seconds: float, do: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, do)
    timer.start()
    return timer


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


def test_killed_before_prepare_and_back_soon(bank: Bank) -> None:
    session = bank.begin()
    server = bank.local.servers["s2"]
    server.kill()
    timer = later(0.5, server.start)
    with pytest.raises(TransactionAborted):
        session.commit()
    session.close()
    timer.join()
    assert not bank.everywhere()


def test_killed_before_the_commit(bank: Bank) -> None:
    session = bank.begin()
    server = bank.local.servers["s2"]
    server.kill()
    # It is known before anything is sent, so there is no doubt although it is away.
    with pytest.raises(TransactionAborted, match="shard s2"):
        session.commit()
    session.close()
    assert bank.servers.rows("s1", "SELECT gid FROM pg_prepared_xacts") == []
    server.start()
    assert not bank.everywhere()


def test_killed_before_prepare_and_gone_for_long(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank.cluster._transactions.recovery, "_patience", 0.5)
    session = bank.begin()
    server = bank.local.servers["s2"]
    prepare = driver._prepare

    def kill_then_prepare(*arguments: object) -> object:
        server.kill()
        return prepare(*arguments)

    monkeypatch.setattr(driver, "_prepare", kill_then_prepare)
    with pytest.raises(CommitOutcomeUnknown) as caught:
        session.commit()
    session.close()
    # What was prepared waits, in doubt, and is no less than it was said to be.
    assert caught.value.gid in str(bank.servers.rows("s1", "TABLE pg_prepared_xacts"))
    assert bank.cluster.recover(grace=0).in_doubt == (caught.value.gid,)
    server.start()
    report = bank.cluster.recover(grace=0)
    assert report.rolled_back == (caught.value.gid,)
    assert not bank.everywhere()
    # Recovery leaves no setting of its own on a connection that a session gets.
    with bank.cluster.sessionmaker()() as session:
        for shard in bank.numbers:
            connection = session.connection(bind_arguments={"shard": shard})
            assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "0"


def test_killed_while_it_prepares(bank: Bank) -> None:
    session = bank.begin()
    server = bank.local.servers["s2"]
    server.pause()
    told: list[BaseException] = []

    def commit() -> None:
        try:
            session.commit()
        except Exception as error:
            told.append(error)
        session.close()

    client = threading.Thread(target=commit)
    client.start()
    until(lambda: bank.servers.rows("s1", "SELECT gid FROM pg_prepared_xacts"))
    server.kill()
    server.start()
    client.join()
    assert [type(error) for error in told] == [TransactionAborted]
    assert not bank.everywhere()


def test_killed_after_it_has_prepared(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher, "RETENTION", 0.0)
    session = bank.begin()
    server = bank.local.servers["s2"]
    settle = driver._settle

    def kill_then_settle(*arguments: object) -> object:
        server.kill()
        return settle(*arguments)

    monkeypatch.setattr(driver, "_settle", kill_then_settle)
    session.commit()  # told of success, since both have promised
    session.close()
    assert bank.servers.rows("s1", BALANCES)
    # The marker on s1 is the proof of it for as long as s2 is away, whatever its age.
    time.sleep(2.5)
    assert bank.servers.rows("s1", "SELECT outcome FROM shardalchemy.txn") == [
        ("committed",)
    ]
    server.start()
    until(lambda: not bank.servers.prepared())
    assert bank.everywhere()
    until(lambda: not bank.servers.where("SELECT 1 FROM shardalchemy.txn"))


@pytest.mark.parametrize("request_", [b"PREPARE TRANSACTION", b"COMMIT PREPARED"])
def test_a_lost_reply_is_resolved_not_rolled_back(bank: Bank, request_: bytes) -> None:
    port = bank.local.servers["s2"].port
    with CuttingProxy(port) as proxy:
        urls = dict(bank.local.urls)
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        with Cluster(urls) as cluster, cluster.sessionmaker()() as session:
            session.add_all(Account(number=n, balance=1) for n in bank.numbers.values())
            session.flush()
            proxy.cut_on = request_
            session.commit()
        assert proxy.cuts == 1
    until(lambda: not bank.servers.prepared())
    assert bank.everywhere()


def test_a_lost_reply_to_the_commit_on_one_shard_is_resolved(bank: Bank) -> None:
    port = bank.local.servers["s2"].port
    number = bank.numbers["s2"]
    with CuttingProxy(port) as proxy:
        urls = dict(bank.local.urls)
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        with Cluster(urls) as cluster, cluster.sessionmaker()() as session:
            session.add(Account(number=number, balance=7))
            session.flush()
            proxy.cut_on = b"; COMMIT"
            session.commit()
            assert session.get_one(Account, number).balance == 7
            assert cluster._transactions.counters.read()["lost_replies"] == 1
        assert proxy.cuts == 1


def test_a_commit_on_one_shard_that_dies_with_the_server_is_told_as_it_is(
    bank: Bank,
) -> None:
    server = bank.local.servers["s2"]
    session = bank.cluster.sessionmaker()()
    session.add(Account(number=bank.numbers["s2"], balance=7))
    session.flush()
    server.pause()
    told: list[BaseException | None] = []

    def commit() -> None:
        try:
            session.commit()
            told.append(None)
        except Exception as error:
            told.append(error)
        session.close()

    client = threading.Thread(target=commit)
    client.start()
    time.sleep(0.2)
    server.kill()
    server.start()
    client.join()
    (answer,) = told
    assert answer is None or type(answer) is TransactionAborted
    assert bool(bank.servers.rows("s2", BALANCES)) is (answer is None)


def test_a_recoverer_that_is_too_early_makes_the_session_fail_cleanly(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = bank.begin()
    prepare = driver._prepare

    def recover_first(gid: object, *arguments: object) -> object:
        # A tombstone under this gid, as recovery would leave it on a slow participant.
        with bank.servers.connect("s2") as connection:
            connection.execute(
                "INSERT INTO shardalchemy.txn VALUES (%s, 'aborted')", [str(gid)]
            )
        return prepare(gid, *arguments)

    monkeypatch.setattr(driver, "_prepare", recover_first)
    with pytest.raises(TransactionAborted, match="recovery"):
        session.commit()
    session.close()
    assert not bank.everywhere()


async def test_killed_before_prepare_in_an_event_loop(bank: Bank) -> None:
    server = bank.local.servers["s2"]
    session = bank.cluster.async_sessionmaker()()
    session.add_all(Account(number=n, balance=1) for n in bank.numbers.values())
    await session.flush()
    server.kill()
    timer = later(0.5, server.start)
    with pytest.raises(TransactionAborted):
        await session.commit()
    await session.close()
    timer.join()
    await bank.cluster.aclose()
    assert not bank.everywhere()
