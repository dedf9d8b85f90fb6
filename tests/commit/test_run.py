"""``cluster.run``: what is run again, what never is, by what the servers hold."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import stamina
from sqlalchemy import exc, text
from stamina.instrumentation import set_on_retry_hooks

from shardalchemy import (
    Cluster,
    CommitOutcomeUnknown,
    ConfigurationError,
    ShardedSession,
    TopologyChanged,
    TransactionAborted,
)
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers
from tests.proxy import CuttingProxy

BALANCES = "SELECT number, balance FROM accounts"


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    """An account with nothing in it on each of two shards."""
    cluster.create_all(Base.metadata)
    with cluster.sessionmaker().begin() as session:
        session.add_all(Account(number=number_on(cluster, s), balance=0) for s in TWO)
    return cluster


TWO = ("s1", "s2")


@pytest.fixture
def retries() -> Iterator[list[Any]]:
    """What stamina reports of each retry."""
    seen: list[Any] = []
    set_on_retry_hooks([seen.append])
    yield seen
    set_on_retry_hooks(None)


def deposit(session: Any, cluster: Cluster, shards: tuple[str, ...]) -> None:
    for shard in shards:
        session.get_one(Account, number_on(cluster, shard)).balance += 1
    session.flush()


def balances(servers: Servers) -> dict[str, list[int]]:
    found = servers.where(BALANCES)
    return {shard: [balance for _, balance in rows] for shard, rows in found.items()}


def kill_backend(session: ShardedSession, servers: Servers, shard: str) -> None:
    """End the session's connection to a shard, without its noticing."""
    connection = session.connection(bind_arguments={"shard": shard})
    pid = connection.connection.driver_connection.info.backend_pid
    with servers.connect(shard) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def test_it_commits_and_returns_what_the_function_returned(
    bank: Cluster, servers: Servers
) -> None:
    def both(session: ShardedSession) -> str:
        assert session.in_transaction()
        deposit(session, bank, TWO)
        return "done"

    assert bank.run(both) == "done"
    assert balances(servers) == {"s1": [1], "s2": [1]}


def test_objects_are_usable_where_the_sessionmaker_says_so(bank: Cluster) -> None:
    Session = bank.sessionmaker(expire_on_commit=False)
    number = number_on(bank, "s2")
    account = bank.run(lambda s: s.get_one(Account, number), sessionmaker=Session)
    assert account.balance == 0


def test_an_error_of_the_application_is_raised_at_once(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    def fail(session: ShardedSession) -> None:
        deposit(session, bank, TWO)
        raise KeyError("its own")

    with pytest.raises(KeyError):
        bank.run(fail)
    with pytest.raises(exc.IntegrityError):
        bank.run(lambda s: s.add(Account(number=number_on(bank, "s1"), balance=1)))
    assert retries == []
    assert balances(servers) == {"s1": [0], "s2": [0]}


def test_transactions_that_deadlock_on_a_shard_both_commit(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    a = number_on(bank, "s1")
    b = number_on(bank, "s1", a + 1)
    with bank.sessionmaker().begin() as session:
        session.add(Account(number=b, balance=0))
    barrier = threading.Barrier(2)

    def in_order(first: int, second: int) -> None:
        meets = True

        def both(session: ShardedSession) -> None:
            nonlocal meets
            session.get_one(Account, first, with_for_update=True).balance += 1
            session.flush()
            if meets:
                meets = False
                barrier.wait(10)
            session.get_one(Account, second, with_for_update=True).balance += 1

        bank.run(both)

    threads = [
        threading.Thread(target=in_order, args=pair) for pair in ((a, b), (b, a))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(servers.rows("s1", BALANCES)) == sorted([(a, 2), (b, 2)])
    (retry,) = retries
    assert isinstance(retry.caused_by.orig, psycopg.errors.DeadlockDetected)


@pytest.mark.parametrize("shards", [("s2",), TWO])
def test_a_connection_lost_before_the_commit_is_run_again(
    bank: Cluster, servers: Servers, retries: list[Any], shards: tuple[str, ...]
) -> None:
    sessions = []

    def work(session: ShardedSession) -> None:
        deposit(session, bank, shards)
        sessions.append(session)
        if len(sessions) == 1:
            kill_backend(session, servers, "s2")
        session.execute(text("SELECT 1"), execution_options={"shard": "s2"})

    bank.run(work)
    assert len(retries) == 1
    assert sessions[0] is not sessions[1]
    assert balances(servers) == {s: [1 if s in shards else 0] for s in TWO}


def test_a_connection_lost_in_the_last_flush_is_run_again(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    def work(session: ShardedSession) -> None:
        account = session.get_one(Account, number_on(bank, "s2"))
        if not retries:
            kill_backend(session, servers, "s2")
        account.balance += 1  # flushed by the commit

    bank.run(work)
    assert len(retries) == 1
    assert balances(servers) == {"s1": [0], "s2": [1]}


def test_a_participant_found_lost_by_the_commit_is_run_again(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    def work(session: ShardedSession) -> None:
        deposit(session, bank, TWO)
        if not retries:
            kill_backend(session, servers, "s2")

    bank.run(work)
    assert [type(retry.caused_by) for retry in retries] == [TransactionAborted]
    assert balances(servers) == {"s1": [1], "s2": [1]}


@pytest.mark.parametrize(
    ("shards", "request_"),
    [(("s2",), b"COMMIT"), (TWO, b"PREPARE TRANSACTION"), (TWO, b"COMMIT PREPARED")],
)
def test_a_lost_reply_to_a_commit_is_never_run_again(
    bank: Cluster, servers: Servers, shards: tuple[str, ...], request_: bytes
) -> None:
    port = servers.local.servers["s2"].port
    calls = []

    def work(session: ShardedSession) -> None:
        deposit(session, bank, shards)
        calls.append(session)
        proxy.cut_on = request_

    with CuttingProxy(port) as proxy:
        urls = dict(servers.local.urls)
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        # Told of it or not, the deposit is there, and there once.
        with Cluster(urls) as cluster, contextlib.suppress(exc.SQLAlchemyError):
            cluster.run(work)
        assert proxy.cuts == 1
    assert len(calls) == 1
    assert balances(servers) == {s: [1 if s in shards else 0] for s in TWO}


def test_an_unknown_outcome_is_never_run_again(retries: list[Any]) -> None:
    with (
        LocalCluster(2, with_redis=False) as local,
        local.cluster() as cluster,
    ):
        cluster.create_all(Base.metadata)
        cluster._transactions.recovery._patience = 0.5
        calls = []

        def work(session: ShardedSession) -> None:
            calls.append(session)
            session.add_all(
                Account(number=number_on(cluster, s), balance=0) for s in TWO
            )
            session.flush()
            local.servers["s2"].pause()

        def kill_while_it_prepares() -> None:
            while not Servers(local).rows("s1", "SELECT gid FROM pg_prepared_xacts"):
                time.sleep(0.01)
            local.servers["s2"].kill()

        killer = threading.Thread(target=kill_while_it_prepares)
        killer.start()
        with pytest.raises(CommitOutcomeUnknown):
            cluster.run(work)
        killer.join()
        assert len(calls) == 1
        assert retries == []
        # What cannot be reached before anything was asked of it is tried again.
        later = threading.Timer(0.3, local.servers["s2"].start)
        later.start()
        number = number_on(cluster, "s2")
        cluster.run(
            lambda session: session.get(Account, number), attempts=None, timeout=60
        )
        later.join()
        assert retries
        cluster.recover(grace=0)


def test_slots_for_prepared_transactions_are_waited_for(retries: list[Any]) -> None:
    settings = {"max_prepared_transactions": "1"}
    with (
        LocalCluster(2, with_redis=False, settings=settings) as local,
        local.cluster() as cluster,
    ):
        cluster.create_all(Base.metadata)
        servers = Servers(local)
        with servers.connect("s2") as other:
            other.execute("BEGIN")
            other.execute("CREATE TABLE taken (x int)")
            other.execute("PREPARE TRANSACTION 'another'")

            def work(session: ShardedSession) -> None:
                if retries:
                    other.execute("ROLLBACK PREPARED 'another'")
                session.add_all(
                    Account(number=number_on(cluster, s), balance=7) for s in TWO
                )

            cluster.run(work)
        assert len(retries) == 1
        assert balances(servers) == {"s1": [7], "s2": [7]}


def test_what_commits_by_itself_is_never_run_again(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    def work(session: ShardedSession) -> None:
        deposit(session, bank, TWO)
        session.commit()
        raise TopologyChanged("after it")

    with pytest.raises(TopologyChanged):
        bank.run(work)
    assert retries == []
    assert balances(servers) == {"s1": [1], "s2": [1]}


def test_attempts_bound_it_and_the_pause_is_random_up_to_a_doubling_bound(
    bank: Cluster, retries: list[Any]
) -> None:
    def fail(session: ShardedSession) -> None:
        raise TopologyChanged("each time")

    with pytest.raises(TopologyChanged) as caught:
        bank.run(fail, attempts=4)
    assert "after 4 attempts" in caught.value.__notes__[0]
    waits = [retry.wait_for for retry in retries]
    assert len(waits) == 3
    assert all(0 <= w <= 0.05 * 2**n for n, w in enumerate(waits))
    assert len(set(waits)) == 3


def test_a_timeout_bounds_it(bank: Cluster) -> None:
    def fail(session: ShardedSession) -> None:
        raise TopologyChanged("each time")

    with pytest.raises(TopologyChanged):
        bank.run(fail, attempts=None, timeout=0.3)


def test_staminas_switches_and_hooks_hold(bank: Cluster, retries: list[Any]) -> None:
    calls = []

    def transfer(session: ShardedSession, amount: int) -> None:
        calls.append(amount)
        raise TopologyChanged("each time")

    ten = functools.partial(transfer, amount=10)
    with stamina.set_testing(True, attempts=3), pytest.raises(TopologyChanged):
        bank.run(ten)
    assert len(calls) == 3
    assert {retry.wait_for for retry in retries} == {0.0}
    assert retries[0].name.endswith("transfer")
    stamina.set_active(False)
    try:
        with pytest.raises(TopologyChanged):
            bank.run(ten)
    finally:
        stamina.set_active(True)
    assert len(calls) == 4


def test_what_cannot_be_run_says_so(bank: Cluster, servers: Servers) -> None:
    async def work(session: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="run_async"):
        bank.run(work)
    with pytest.raises(ConfigurationError, match="attempts"):
        bank.run(lambda _: None, attempts=0)
    with (
        servers.local.cluster() as other,
        pytest.raises(ConfigurationError, match="not of this cluster"),
    ):
        bank.run(lambda _: None, sessionmaker=other.sessionmaker())


async def test_the_same_in_an_event_loop(
    bank: Cluster, servers: Servers, retries: list[Any]
) -> None:
    async def work(session: Any) -> str:
        await session.run_sync(deposit, bank, TWO)
        if not retries:
            await session.run_sync(kill_backend, servers, "s2")
        await session.execute(text("SELECT 1"), execution_options={"shard": "s2"})
        return "done"

    assert await bank.run_async(work) == "done"
    assert retries[0].name.endswith("work")

    async def fail(session: Any) -> None:
        await session.run_sync(deposit, bank, TWO)
        raise KeyError("its own")

    with pytest.raises(KeyError):
        await bank.run_async(fail, sessionmaker=bank.async_sessionmaker())

    async def dawdle(session: Any) -> None:
        await session.run_sync(deposit, bank, TWO)
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bank.run_async(dawdle), 0.5)
    assert len(retries) == 1
    await bank.aclose()
    assert balances(servers) == {"s1": [1], "s2": [1]}


async def test_a_lost_reply_in_an_event_loop_is_never_run_again(
    bank: Cluster, servers: Servers
) -> None:
    port = servers.local.servers["s2"].port
    calls = []

    async def work(session: Any) -> None:
        await session.run_sync(deposit, bank, ("s2",))
        calls.append(session)
        proxy.cut_on = b"COMMIT"

    with CuttingProxy(port) as proxy:
        urls = dict(servers.local.urls)
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        async with Cluster(urls) as cluster:
            # Told of it or not, the deposit is there, and there once.
            with contextlib.suppress(exc.SQLAlchemyError):
                await cluster.run_async(work)
        assert proxy.cuts == 1
    assert len(calls) == 1
    assert balances(servers) == {"s1": [0], "s2": [1]}


def test_importing_the_library_imports_no_stamina() -> None:
    program = "import shardalchemy, sys; print('stamina' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
