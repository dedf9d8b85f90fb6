"""The same through PgBouncer in transaction mode.

There a connection to a server is the client's for one transaction, and another's next:
what a session relies on has to be within its transactions, and what finishes a prepared
transaction need not be the connection that prepared it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import exc, func, select, text
from sqlalchemy.orm import Session

from shardalchemy import Cluster, StatementTimeout, TransactionAborted
from shardalchemy.commit import driver
from shardalchemy.local import LocalCluster
from tests.commit import test_commit, test_recovery, test_savepoints
from tests.commit.accounts import Account, Base, number_on
from tests.commit.torn import open_accounts, read
from tests.conftest import Servers
from tests.pooler import Pooler
from tests.proxy import CuttingProxy

BALANCES = "SELECT number, balance FROM accounts ORDER BY number"

# Statements that a driver prepares for itself live in a connection to a server.
OPTIONS: dict[str, Any] = {"connect_args": {"prepare_threshold": None}}


@pytest.fixture(scope="module")
def pooler(shard_servers: LocalCluster) -> Iterator[Pooler]:
    with Pooler(shard_servers, pool_size=20) as running:
        yield running


@pytest.fixture(autouse=True)
def through_pooler(pooler: Pooler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every cluster that a test makes go through the pooler."""

    def cluster(local: LocalCluster, **options: Any) -> Cluster:
        return Cluster(pooler.urls, redis=local.redis_url, **{**OPTIONS, **options})

    monkeypatch.setattr(LocalCluster, "cluster", cluster)


@pytest.fixture
def bank(empty_servers: Servers) -> Iterator[Cluster]:
    with empty_servers.local.cluster(recover_in_background=False) as cluster:
        cluster.create_all(Base.metadata)
        empty_servers.run("DELETE FROM shardalchemy.txn")
        yield cluster


@pytest.fixture
def numbers(bank: Cluster) -> dict[str, int]:
    return {shard: number_on(bank, shard) for shard in ("s1", "s2", "s3", "s4")}


# -- what is tested without a pooler, again with one -----------------------------------

for source, names in (
    (
        test_commit,
        """
        a_transaction_over_shards_is_on_all_of_them
        a_lock_for_update_makes_a_shard_a_writer
        rows_of_a_home_table_commit_with_the_others
        a_definite_failure_leaves_nothing_on_any_shard
        a_failed_statement_on_one_shard_keeps_all_from_committing
        a_rollback_is_on_all_shards
        a_token_of_a_process_that_is_gone_is_seen_all_the_same
        the_same_in_an_event_loop
        """,
    ),
    (
        test_savepoints,
        """
        a_shard_met_after_the_savepoint_is_rolled_back_to_it
        savepoints_within_savepoints
        an_error_on_one_shard_undoes_the_savepoint_on_another
        settings_of_a_savepoint_end_with_it_on_every_shard
        """,
    ),
    (
        test_recovery,
        """
        what_all_have_prepared_is_committed
        what_one_has_not_prepared_is_rolled_back_and_never_can
        recovery_waits_for_one_between_its_marker_and_prepare
        many_recoveries_at_once_agree
        recovery_goes_on_in_the_background_of_every_cluster
        one_process_at_a_time_recovers_at_a_shard
        """,
    ),
):
    for name in names.split():
        globals()[f"test_{name}"] = getattr(source, f"test_{name}")


def test_snapshots_are_whole_and_strict_ones_hold_up_commits(bank: Cluster) -> None:
    open_accounts(bank)
    for strict in (False, True):
        seen = read(bank, lambda strict=strict: bank.snapshot(strict=strict), 1.5)
        assert seen.reads > 3
        assert seen.torn == 0
    assert bank.counters["snapshot.gates"] > 3


# -- what a pooler is in the middle of -------------------------------------------------


def accounts(numbers: dict[str, int]) -> list[Account]:
    return [Account(number=n, balance=1) for n in numbers.values()]


@pytest.mark.parametrize("request_", [b"PREPARE TRANSACTION", b"COMMIT PREPARED"])
def test_a_reply_lost_before_the_pooler_is_resolved(
    bank: Cluster,
    servers: Servers,
    pooler: Pooler,
    numbers: dict[str, int],
    request_: bytes,
) -> None:
    with CuttingProxy(pooler.port) as proxy:
        urls = dict(pooler.urls)
        urls["s2"] = urls["s2"].replace(f":{pooler.port}/", f":{proxy.port}/")
        with Cluster(urls, **OPTIONS) as cluster, cluster.sessionmaker()() as session:
            session.add_all(accounts(numbers))
            session.flush()
            proxy.cut_on = request_
            session.commit()
        assert proxy.cuts == 1
    assert servers.prepared() == {}
    assert servers.where(BALANCES) == {s: [(n, 1)] for s, n in numbers.items()}


def test_a_pooler_that_ends_between_the_two_steps(
    bank: Cluster,
    servers: Servers,
    numbers: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Pooler(servers.local) as short, Cluster(short.urls, **OPTIONS) as cluster:
        settle = driver._settle

        def stop_then_settle(*arguments: Any) -> Any:
            short.stop()
            return settle(*arguments)

        with cluster.sessionmaker()() as session:
            session.add_all(accounts(numbers))
            session.flush()
            monkeypatch.setattr(driver, "_settle", stop_then_settle)
            session.commit()  # told of success, since all have promised
        monkeypatch.undo()
        assert set(servers.prepared()) == set(numbers)
        short.start()
        end = time.monotonic() + 10
        while servers.prepared():
            assert time.monotonic() < end
            time.sleep(0.05)
    assert servers.where(BALANCES) == {s: [(n, 1)] for s, n in numbers.items()}


def test_a_server_that_ends_the_connection_behind_the_pooler(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(numbers))
        session.flush()
        servers.rows(
            "s2",
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE state = 'idle in transaction'",
        )
        time.sleep(0.2)
        with pytest.raises((TransactionAborted, exc.DBAPIError)):
            session.commit()
        session.rollback()
        assert servers.where(BALANCES) == {}
        assert servers.prepared() == {}
        session.add_all(accounts(numbers))
        session.commit()
    assert set(servers.where(BALANCES)) == set(numbers)


# -- connections that are shared -------------------------------------------------------


@pytest.mark.parametrize("ack", ["committed", "prepared"])
def test_more_clients_than_connections(
    bank: Cluster, servers: Servers, ack: str
) -> None:
    """Each prepares on one connection and commits on another, as it comes."""
    with (
        Pooler(servers.local, pool_size=2) as narrow,
        Cluster(narrow.urls, ack=ack, **OPTIONS) as cluster,
    ):
        Sessions = cluster.sessionmaker()
        starts = [1000 * n for n in range(1, 9)]
        errors: list[BaseException] = []

        def client(start: int) -> None:
            try:
                for number in range(start, start + 300, 100):
                    with Sessions.begin() as session:
                        session.add_all(
                            Account(number=number_on(cluster, s, number), balance=1)
                            for s in ("s1", "s2", "s3")
                        )
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=client, args=(s,)) for s in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        with Sessions() as session:
            session.execute(select(Account).limit(1))
    counts = servers.where("SELECT count(*) FROM accounts")
    assert {shard: rows[0][0] for shard, rows in counts.items() if rows[0][0]} == {
        shard: len(starts) * 3 for shard in ("s1", "s2", "s3")
    }
    assert servers.prepared() == {}


def test_settings_of_a_transaction_are_nobody_elses(
    bank: Cluster, servers: Servers
) -> None:
    with (
        Pooler(servers.local, pool_size=1) as single,
        Cluster(single.urls, **OPTIONS) as cluster,
    ):
        shown = text("SHOW lock_timeout")

        def shown_on_all(session: Session) -> set[str]:
            return {
                session.scalar(shown, execution_options={"shard": shard})
                for shard in servers
            }

        with cluster.sessionmaker()() as session:
            session.execute(text("SET LOCAL lock_timeout = '77ms'"))
            assert shown_on_all(session) == {"77ms"}
            session.commit()
        cluster.recover(grace=0)
        with cluster.sessionmaker()() as session:
            assert shown_on_all(session) == {"0"}


def test_results_of_all_shards(bank: Cluster) -> None:
    numbers = range(1, 201)
    with bank.sessionmaker()() as session:
        session.add_all(Account(number=n, balance=n % 7) for n in numbers)
        session.commit()
        top = select(Account.number).order_by(Account.number.desc()).limit(3)
        assert session.scalars(top).all() == [200, 199, 198]
        grouped = select(Account.balance, func.count()).group_by(Account.balance)
        assert sum(count for _, count in session.execute(grouped)) == 200
        other = select(Account.balance).where(Account.number == 5).scalar_subquery()
        gathered = select(func.count()).where(Account.balance == other)
        assert session.scalar(gathered) == 28
        streamed = session.scalars(
            select(Account.number), execution_options={"yield_per": 10}
        )
        assert sorted(streamed) == [*numbers]


@pytest.mark.parametrize("strict", [False, True])
def test_snapshots(bank: Cluster, numbers: dict[str, int], strict: bool) -> None:
    with bank.sessionmaker(ack="prepared").begin() as session:
        session.add_all(accounts(numbers))
    with bank.snapshot(strict=strict) as session:
        total = session.scalar(select(func.sum(Account.balance)))
    assert total == 4 or (total is None and not strict)


def test_a_timeout_ends_its_own_statement_and_no_other(
    bank: Cluster, servers: Servers
) -> None:
    sleep = select(func.pg_sleep(20), Account.number)
    numbers = {s: number_on(bank, s) for s in servers}
    with bank.sessionmaker().begin() as session:
        session.add_all(accounts(numbers))
    slept: list[object] = []

    def sleep_beside() -> None:
        with bank.sessionmaker()() as other:
            slept.append(other.scalars(select(func.pg_sleep(1.5))).all())

    beside = threading.Thread(target=sleep_beside)
    beside.start()
    with bank.sessionmaker()() as session:
        start = time.monotonic()
        with pytest.raises(StatementTimeout):
            session.execute(sleep, execution_options={"timeout": 0.4})
        assert time.monotonic() - start < 5
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Account)) == 4
    beside.join()
    assert len(slept) == 1


async def test_a_cancelled_task_leaves_connections_that_work(
    bank: Cluster, servers: Servers
) -> None:
    numbers = {s: number_on(bank, s) for s in servers}
    async with bank.async_sessionmaker()() as session:
        session.add_all(accounts(numbers))
        await session.commit()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await session.execute(select(func.pg_sleep(20), Account.number))
        await session.rollback()
        assert len((await session.scalars(select(Account))).all()) == 4
    await bank.aclose()
