"""Shards with standbys: commits that wait for one, and a failover."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import exc, select, text

from shardalchemy import Cluster, ShardAlchemyError
from shardalchemy.local import LocalCluster
from shardalchemy.local.postgres import PostgresServer
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers

BALANCES = "SELECT number, balance FROM accounts ORDER BY number"
NOBODY = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'"
ANYBODY = "ALTER SYSTEM SET synchronous_standby_names = '*'"
NO_STANDBY = "ALTER SYSTEM RESET synchronous_standby_names"
WAITS = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    with LocalCluster(2, with_redis=False) as made:
        yield made


@pytest.fixture
def servers(local: LocalCluster) -> Servers:
    return Servers(local)


@pytest.fixture
def bank(local: LocalCluster, servers: Servers) -> Iterator[Cluster]:
    # No patrol, which would finish what a test wants to look at.
    with local.cluster(recover_in_background=False) as cluster:
        cluster.create_all(Base.metadata)
        servers.run("TRUNCATE accounts; DELETE FROM shardalchemy.txn")
        yield cluster


def configure(servers: Servers, shard: str, setting: str) -> None:
    with servers.connect(shard) as connection:
        connection.execute(setting)
        connection.execute("SELECT pg_reload_conf()")
        wanted = "" if "RESET" in setting else setting.split("'")[1]
        until(
            lambda: servers.rows(shard, "SHOW synchronous_standby_names") == [(wanted,)]
        )


@contextmanager
def waiting_for_nobody(servers: Servers, shard: str) -> Iterator[None]:
    """Let commits on *shard* wait for a standby that there is not."""
    configure(servers, shard, NOBODY)
    try:
        yield
    finally:
        configure(servers, shard, NO_STANDBY)


def until(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


def accounts(bank: Cluster, *shards: str) -> list[Account]:
    return [Account(number=number_on(bank, s), balance=1) for s in shards]


def check_works(bank: Cluster) -> None:
    """Every connection of the pools does, and sees what is committed."""
    with bank.sessionmaker()() as session:
        for shard in ("s1", "s2"):
            one = session.scalar(text("SELECT 1"), execution_options={"shard": shard})
            assert one == 1


# -- a standby that does not come ------------------------------------------------------


def test_a_ctrl_c_ends_the_wait_for_a_standby(bank: Cluster, servers: Servers) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        with waiting_for_nobody(servers, "s2"):

            def interrupt() -> None:
                until(lambda: servers.rows("s2", WAITS))
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                session.commit()
    check_works(bank)
    # Whether the transaction is committed is not said; it is seen to in the background.
    until(lambda: not servers.prepared())
    assert set(servers.where(BALANCES)) == {"s1", "s2"}


@pytest.mark.parametrize("ack", ["committed", "prepared"])
async def test_a_task_s_timeout_ends_the_wait_for_a_standby(
    bank: Cluster, servers: Servers, ack: str
) -> None:
    async with bank.async_sessionmaker(ack=ack)() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        await session.flush()
        with waiting_for_nobody(servers, "s2"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await session.commit()
            await session.close()
        await asyncio.to_thread(until, lambda: not servers.prepared())
        numbers = {a.number for a in await session.scalars(select(Account))}
        assert len(numbers) == 2
    await bank.aclose()


def test_a_ctrl_c_ends_the_wait_of_a_single_writer(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s2"))
        session.flush()
        with waiting_for_nobody(servers, "s2"):

            def interrupt() -> None:
                until(lambda: servers.rows("s2", WAITS))
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                session.commit()
    check_works(bank)
    # PostgreSQL has committed: it only does not wait any more.
    assert set(servers.where(BALANCES)) == {"s2"}


def test_recovery_does_not_build_on_what_a_standby_lacks(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a commit on s1 would be alone when the standby of s2 takes over."""
    monkeypatch.setattr(bank._transactions.recovery, "_patience", 0.5)
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        with waiting_for_nobody(servers, "s2"):
            client = threading.Thread(target=session.commit)
            client.start()
            until(lambda: servers.rows("s2", WAITS))
            until(lambda: set(servers.prepared()) == {"s1", "s2"})
            assert len(bank.recover(grace=0).in_doubt) == 1
            assert servers.where(BALANCES) == {}
            assert set(servers.prepared()) == {"s1", "s2"}
        client.join()
        assert len(session.scalars(select(Account)).all()) == 2
    assert set(servers.where(BALANCES)) == {"s1", "s2"}


# -- one that does ---------------------------------------------------------------------


@contextmanager
def standby_of(local: LocalCluster, shard: str) -> Iterator[PostgresServer]:
    """Run a streaming standby of *shard*, made by pg_basebackup."""
    primary = local.servers[shard]
    binaries, account = primary._binaries, primary._account
    program = binaries.postgres.with_name("pg_basebackup")
    directory = primary.directory.with_name(f"{shard}_standby")
    directory.mkdir(mode=0o700)
    account.own([directory])
    standby = PostgresServer(
        f"{shard}_standby",
        directory,
        binaries=binaries,
        password=primary._password,
        settings=primary._settings,
        account=account,
        watchdog=primary._watchdog,
    )
    try:
        made = account.run(
            [
                program,
                *("-d", primary.url.replace("+psycopg", "").rpartition("/")[0]),
                *("-D", standby.data_directory),
                *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
            ]
        )
        assert made.returncode == 0, made.stdout
        standby.start()
        yield standby
    finally:
        standby.stop()
        shutil.rmtree(directory, ignore_errors=True)


def test_no_acknowledged_commit_is_lost_at_a_failover() -> None:
    """With a synchronous standby, which takes over in the middle of a commit."""
    with LocalCluster(2, with_redis=False) as local, standby_of(local, "s2") as standby:
        servers = Servers(local)
        options = {"recover_in_background": False}
        told: list[object] = []
        with local.cluster(**options) as cluster:
            cluster.create_all(Base.metadata)
            cluster._transactions.recovery._patience = 0.5
            configure(servers, "s2", ANYBODY)

            def commit(ack: str) -> None:
                start = 1000 * (1 + len(told))
                with cluster.sessionmaker(ack=ack)() as session:
                    for shard in ("s1", "s2"):
                        number = number_on(cluster, shard, start)
                        session.add(Account(number=number, balance=len(told)))
                    try:
                        session.commit()
                        told.append(True)
                    except (ShardAlchemyError, exc.DBAPIError) as error:
                        told.append(error)

            for ack in ("committed", "prepared") * 3:
                commit(ack)
            assert told == [True] * 6
            # One that the standby does not hear of, and the end of the primary.
            standby.kill()
            client = threading.Thread(target=commit, args=("prepared",))
            client.start()
            until(lambda: servers.rows("s2", WAITS))
            local.servers["s2"].kill()
            client.join()
            assert told[-1] is not True
            standby.start()
        with psycopg.connect(
            standby.url.replace("+psycopg", ""), autocommit=True
        ) as connection:
            connection.execute("SELECT pg_promote(wait => true)")
        urls = {**local.urls, "s2": standby.url}
        with Cluster(urls, **options) as cluster:
            cluster.recover(grace=0)
            with cluster.sessionmaker()() as session:
                found = session.scalars(select(Account.balance).order_by(text("1")))
                assert found.all() == [n for n in range(6) for _ in ("s1", "s2")]
                # And it goes on from there.
                session.add_all(accounts(cluster, "s1", "s2"))
                session.commit()
        with psycopg.connect(standby.url.replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT count(*) FROM accounts").fetchone() == (
                7,
            )
            rows = connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall()
            assert rows == []
