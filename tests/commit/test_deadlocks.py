"""Deadlocks that no single server sees, by who is told of them and what stays."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, exc, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from shardalchemy import (
    Cluster,
    DeadlockDetected,
    ShardAlchemyError,
    StatementTimeout,
)
from shardalchemy.engine import next_statement_held
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on
from tests.commit.contention import THREADS, contend
from tests.conftest import Servers
from tests.proxy import CuttingProxy

IN_TIME = 3.0
"""Seconds. A deadlock is found within two; a busy machine may take its time as well."""

WAITING = "SELECT 1 FROM shardalchemy.waiting"

# The longer, the more it says: an hour is 3600.
CONTENTION = float(os.environ.get("SHARDALCHEMY_CONTENTION", "10"))


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    """Three accounts of 100: one on each of the first three shards."""
    cluster.create_all(Base.metadata)
    with cluster.sessionmaker().begin() as session:
        session.add_all(Account(number=n, balance=100) for n in numbers(cluster))
    return cluster


def numbers(cluster: Cluster) -> list[int]:
    return [number_on(cluster, shard) for shard in ("s1", "s2", "s3")]


def take(session: Session, number: int) -> Account:
    return session.get_one(
        Account, number, with_for_update=True, populate_existing=True
    )


def counted(cluster: Cluster) -> int:
    return cluster._transactions.counters.read().get("deadlocks", 0)


@contextmanager
def at_once(*steps: Callable[[], Any]) -> Iterator[list[Future[Any]]]:
    """Run steps in threads of their own; their futures may hold errors."""
    with ThreadPoolExecutor(len(steps)) as threads:
        yield [threads.submit(step) for step in steps]


def told(future: Future[Any]) -> DeadlockDetected:
    error = future.exception(timeout=20)
    assert isinstance(error, DeadlockDetected), error
    return error


# -- who is told, and of what -------------------------------------------------------


@pytest.mark.parametrize("last", ["the older", "the younger"])
def test_the_younger_of_two_is_told_and_the_other_goes_on(
    bank: Cluster, servers: Servers, last: str
) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    with Session() as old, Session() as young:
        take(old, a).balance += 1
        take(young, b).balance += 10

        def wait_for(session: Session, number: int, pause: float) -> None:
            time.sleep(pause)
            take(session, number)

        late = 0.3 if last == "the older" else 0.0
        began = time.monotonic()
        with at_once(
            lambda: wait_for(old, b, late), lambda: wait_for(young, a, 0.3 - late)
        ) as (kept, cancelled):
            error = told(cancelled)
            assert time.monotonic() - began < IN_TIME
            young.rollback()
            kept.result(timeout=5)
        old.commit()
        # The session that was told of it goes on as after any error.
        assert take(young, a).balance == 101
        young.commit()
    assert isinstance(error, ShardAlchemyError)
    assert isinstance(error, exc.OperationalError)
    assert error.orig is not None
    assert error.orig.sqlstate == "40P01"
    assert counted(bank) == 1
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    until_gone(servers)


def until_gone(servers: Servers) -> None:
    """Wait until nothing is published any more."""
    end = time.monotonic() + 5
    while servers.rows("s1", WAITING):
        assert time.monotonic() < end, "a wait stays published"
        time.sleep(0.05)


def test_the_message_has_the_whole_cycle(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    with Session() as old, Session() as young:
        take(old, a)
        take(young, b)
        pids = {
            (name, shard): driver.pgconn.backend_pid
            for name, session in (("old", old), ("young", young))
            for shard, driver in session._drivers_in_use().items()
        }
        with at_once(lambda: take(old, b), lambda: take(young, a)) as (kept, cancelled):
            message = str(told(cancelled).orig)
            young.rollback()
            kept.result(timeout=5)
    row = r"ShareLock on transaction \d+ for tuple \(\d+,\d+\) of relation accounts"
    young_s2, old_s1 = pids["young", "s2"], pids["old", "s1"]
    assert re.fullmatch(
        "deadlock detected between shards s1, s2; this transaction is the youngest in"
        " it and was cancelled\n"
        rf"Process (\d+) on shard s1, in one transaction with process {young_s2} on"
        rf" shard s2, waits for {row}; blocked by process {old_s1}\.\n"
        r"Process \1: SELECT .* FROM accounts .* FOR UPDATE\n"
        rf"Process (\d+) on shard s2, in one transaction with process {old_s1} on shard"
        rf" s1, waits for {row}; blocked by process {young_s2}\.\n"
        r"Process \2: SELECT .* FROM accounts .* FOR UPDATE",
        message,
    )


def test_a_circle_of_three_shards_has_one_victim(bank: Cluster) -> None:
    a, b, c = numbers(bank)
    Session = bank.sessionmaker()
    with Session() as first, Session() as second, Session() as third:
        for session, number in ((first, a), (second, b), (third, c)):
            take(session, number)
        began = time.monotonic()
        with at_once(
            lambda: take(first, b), lambda: take(second, c), lambda: take(third, a)
        ) as (one, two, three):
            error = told(three)
            assert time.monotonic() - began < IN_TIME
            assert "between shards s1, s2, s3" in str(error)
            third.rollback()
            two.result(timeout=5)
            second.rollback()
            one.result(timeout=5)
    assert counted(bank) == 1


@pytest.mark.parametrize("older", ["this process", "the other"])
def test_two_processes_agree_on_the_victim(
    bank: Cluster, servers: Servers, older: str
) -> None:
    a, b, _ = numbers(bank)
    urls = json.dumps(dict(servers.local.urls))
    command = [sys.executable, "-m", "tests.commit.rival", urls, str(b), str(a)]
    with bank.sessionmaker()() as session:
        if older == "this process":
            take(session, a)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as rival:
            assert rival.stdin is not None
            assert rival.stdout is not None
            assert rival.stdout.readline() == "ready\n"
            if older == "the other":
                take(session, a)
            rival.stdin.write("\n")
            rival.stdin.flush()
            began = time.monotonic()
            if older == "this process":
                take(session, b)
                said = rival.stdout.read()
                assert said.startswith("DeadlockDetected")
                assert "deadlock detected between shards s1, s2" in said
            else:
                with pytest.raises(DeadlockDetected):
                    take(session, b)
                session.rollback()
                assert rival.stdout.read() == "committed\n"
            assert time.monotonic() - began < IN_TIME + 1  # and the process's end


async def test_tasks_of_one_event_loop(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    AsyncSession = bank.async_sessionmaker()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.05)
            ticks += 1

    async with AsyncSession() as old, AsyncSession() as young:
        await old.get(Account, a, with_for_update=True)
        await young.get(Account, b, with_for_update=True)
        ticking = asyncio.create_task(tick())
        began = time.monotonic()
        waiting = asyncio.create_task(old.get(Account, b, with_for_update=True))
        with pytest.raises(DeadlockDetected, match="between shards s1, s2"):
            await young.get(Account, a, with_for_update=True)
        assert time.monotonic() - began < IN_TIME
        await young.rollback()
        assert await waiting is not None
        ticking.cancel()
        assert ticks > 10  # the loop went on all the time
        await old.commit()
        assert await young.get(Account, a, with_for_update=True) is not None
    await bank.aclose()


def test_a_circle_through_a_plain_transaction(bank: Cluster, servers: Servers) -> None:
    a, b, _ = numbers(bank)
    c = number_on(bank, "s1", a + 1)
    Session = bank.sessionmaker()
    with Session.begin() as session:
        session.add(Account(number=c, balance=1))
    lock = "SELECT 1 FROM accounts WHERE number = %s FOR UPDATE"
    with (
        Session() as old,
        Session() as young,
        servers.connect("s1") as plain,
        plain.transaction(),
    ):
        take(old, a)
        take(young, b)
        plain.execute(lock, [c])
        # old waits for young on s2, young for plain on s1, and plain for old there.
        with at_once(
            lambda: take(old, b),
            lambda: take(young, c),
            lambda: plain.execute(lock, [a]),
        ) as (one, two, three):
            error = told(two)
            assert f"blocked by process {plain.info.backend_pid}." in str(error)
            young.rollback()
            one.result(timeout=5)
            old.rollback()
            three.result(timeout=5)


def test_a_session_on_one_shard_is_told_if_it_is_the_youngest(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    c = number_on(bank, "s1", a + 1)
    Session = bank.sessionmaker()
    with Session.begin() as session:
        session.add(Account(number=c, balance=1))
    with Session() as one, Session() as two, Session() as alone:
        take(one, a)
        take(two, b)
        take(alone, c)
        with at_once(
            lambda: take(one, b), lambda: take(two, c), lambda: take(alone, a)
        ) as (first, second, third):
            told(third)
            alone.rollback()
            second.result(timeout=5)
            two.rollback()
            first.result(timeout=5)


# -- whatever waits -----------------------------------------------------------------


def test_an_update_over_all_shards(bank: Cluster, servers: Servers) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    more = update(Account).values(balance=Account.balance + 1)
    with Session() as old, Session() as young:
        take(old, a)
        take(young, b)
        with at_once(lambda: old.execute(more), lambda: young.execute(more)) as (
            kept,
            cancelled,
        ):
            error = told(cancelled)
            assert "on shard s1" in str(error)
            young.rollback()
            kept.result(timeout=5)
        old.commit()
        assert young.scalars(select(Account.balance)).all() == [101] * 3


async def test_an_update_over_all_shards_in_an_event_loop(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    AsyncSession = bank.async_sessionmaker()
    more = update(Account).values(balance=Account.balance + 1)
    async with AsyncSession() as old, AsyncSession() as young:
        await old.get(Account, a, with_for_update=True)
        await young.get(Account, b, with_for_update=True)
        waiting = asyncio.create_task(old.execute(more))
        with pytest.raises(DeadlockDetected):
            await young.execute(more)
        await young.rollback()
        await waiting
        await old.commit()
        assert (await young.scalars(select(Account.balance))).all() == [101] * 3
    await bank.aclose()


@pytest.mark.parametrize("end", ["flush", "commit", "autoflush", "bulk"])
def test_what_is_flushed(bank: Cluster, servers: Servers, end: str) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()

    def write(session: Session, number: int) -> None:
        if end == "bulk":
            changed = [{"number": number, "balance": 7}]
            session.bulk_update_mappings(Account, changed)
            return
        session.get_one(Account, number).balance = 7
        if end == "autoflush":
            session.scalars(select(Account)).all()
        else:
            getattr(session, end)()

    with Session() as old, Session() as young:
        take(old, a)
        take(young, b)
        with at_once(lambda: write(old, b), lambda: write(young, a)) as (one, two):
            told(two)
            young.rollback()
            one.result(timeout=5)
        old.commit()
    held = servers.rows("s2", "SELECT balance FROM accounts")
    assert held == [(7,)]
    assert servers.rows("s1", "SELECT balance FROM accounts") == [(100,)]


def test_a_savepoint_outlives_a_deadlock(bank: Cluster) -> None:
    a, b, c = numbers(bank)
    Session = bank.sessionmaker()
    with Session() as old, Session() as young:
        take(old, a)
        take(young, c).balance = 7
        young.flush()

        def attempt() -> None:
            with young.begin_nested():
                take(young, b)
                take(young, a)

        waiting = threading.Event()

        def follow() -> None:
            waiting.wait()
            take(old, b)

        with at_once(attempt, follow) as (nested, kept):
            time.sleep(0.2)
            waiting.set()
            told(nested)
            # What was locked within the savepoint is free, what was before it stays.
            kept.result(timeout=5)
        old.rollback()
        assert take(young, a).balance == 100
        assert young.get_one(Account, c).balance == 7
        young.commit()


def test_sessions_that_have_every_connection(servers: Servers, bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    options = {"pool_size": 2, "max_overflow": 0, "max_connections": 4}
    with servers.local.cluster(pool_timeout=5, **options) as full:
        Session = full.sessionmaker()
        with Session() as old, Session() as young:
            take(old, a)
            take(young, b)
            began = time.monotonic()
            with at_once(lambda: take(old, b), lambda: take(young, a)) as (one, two):
                told(two)
                assert time.monotonic() - began < IN_TIME
                young.rollback()
                one.result(timeout=5)


def test_shards_given_as_engines(servers: Servers, bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    engines = {name: create_engine(url) for name, url in servers.local.urls.items()}
    with Cluster(engines) as given:
        Session = given.sessionmaker()
        with Session() as old, Session() as young:
            take(old, a)
            take(young, b)
            with at_once(lambda: take(old, b), lambda: take(young, a)) as (one, two):
                told(two)
                young.rollback()
                one.result(timeout=5)
    for engine in engines.values():
        engine.dispose()


async def test_shards_given_as_async_engines(servers: Servers, bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    engines = {
        name: create_async_engine(url.replace("+psycopg", "+psycopg_async"))
        for name, url in servers.local.urls.items()
    }
    async with Cluster(engines) as given:
        AsyncSession = given.async_sessionmaker()
        async with AsyncSession() as old, AsyncSession() as young:
            await old.get(Account, a, with_for_update=True)
            await young.get(Account, b, with_for_update=True)
            waiting = asyncio.create_task(old.get(Account, b, with_for_update=True))
            with pytest.raises(DeadlockDetected):
                await young.get(Account, a, with_for_update=True)
            await young.rollback()
            await waiting
    for engine in engines.values():
        await engine.dispose()


# Python 3.12 warns of what may go wrong for others that hold locks as it forks.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_has_forked_watches_for_itself(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    bank._shards.dispose()
    assert watching()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Session() as old, Session() as young:
                take(old, a)
                take(young, b)
                with at_once(lambda: take(old, b), lambda: take(young, a)) as (_, two):
                    told(two)
                    young.rollback()
            os.write(writing, b"told")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert said.read() == "told"
    os.waitpid(child, 0)


# -- what is no deadlock, and what is not watched -----------------------------------


def test_flushes_of_the_same_rows_in_opposite_order_wait_in_one(bank: Cluster) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    together = threading.Barrier(2)

    def change(first: int, second: int) -> None:
        for _ in range(25):
            with Session() as session:
                # Both are read before either is changed: a query would flush.
                for account in [session.get_one(Account, n) for n in (first, second)]:
                    account.balance += 1
                together.wait(20)
                session.commit()

    began = time.monotonic()
    with at_once(lambda: change(a, b), lambda: change(b, a)) as both:
        for one in both:
            one.result(timeout=30)
    assert counted(bank) == 0
    assert time.monotonic() - began < 10


def test_a_deadlock_within_one_shard_is_its_servers_own(bank: Cluster) -> None:
    a, *_ = numbers(bank)
    c = number_on(bank, "s1", a + 1)
    Session = bank.sessionmaker()
    with Session.begin() as session:
        session.add(Account(number=c, balance=1))
    with Session() as one, Session() as two:
        for session, number in ((one, a), (two, c)):
            session.connection(bind_arguments={"shard": "s2"})
            session.execute(text("SELECT 1"), bind_arguments={"shard": "s2"})
            take(session, number)

        def attempt(session: Session, number: int) -> None:
            try:
                take(session, number)
            finally:
                session.rollback()

        with at_once(lambda: attempt(one, c), lambda: attempt(two, a)) as both:
            errors = [future.exception(timeout=20) for future in both]
    (error,) = [e for e in errors if e is not None]
    assert not isinstance(error, DeadlockDetected)
    assert isinstance(error, exc.OperationalError)
    assert isinstance(error.orig, psycopg.errors.DeadlockDetected)
    assert counted(bank) == 0


def test_waits_and_long_statements_are_not_ended(
    bank: Cluster, servers: Servers
) -> None:
    a, b, _ = numbers(bank)
    Session = bank.sessionmaker()
    lock = "SELECT 1 FROM accounts WHERE number = %s FOR UPDATE"
    with (
        Session() as waiting,
        Session() as working,
        servers.connect("s2") as plain,
    ):
        take(waiting, a)
        plain.execute("BEGIN")
        plain.execute(lock, [b])
        sleep = text("SELECT pg_sleep(2.5)")
        with at_once(
            lambda: working.execute(sleep, bind_arguments={"shard": "s3"}),
            lambda: take(waiting, b),
        ) as (slow, row):
            time.sleep(2)
            # Both shards of the one that waits; nothing of the one that works.
            shards = servers.rows("s1", "SELECT shard FROM shardalchemy.waiting")
            assert sorted(shards) == [("s1",), ("s2",)]
            assert not row.done()
            plain.execute("COMMIT")
            row.result(timeout=5)
            slow.result(timeout=5)
    until_gone(servers)
    assert counted(bank) == 0


def test_no_session_of_many_on_few_rows_is_wronged(
    cluster: Cluster, servers: Servers
) -> None:
    with servers.local.cluster(pool_size=THREADS) as busy:
        busy.create_all(Base.metadata)
        outcomes = contend(busy, CONTENTION, opposed=False)
        assert outcomes.keys() == {"committed"}
        assert counted(busy) == 0


def test_sessions_that_deadlock_all_the_time_hear_of_nothing_else(
    cluster: Cluster, servers: Servers
) -> None:
    with servers.local.cluster(pool_size=THREADS) as busy:
        busy.create_all(Base.metadata)
        outcomes = contend(busy, 6, opposed=True)
        assert outcomes["deadlocks between shards"] > 0
        assert counted(busy) >= outcomes["deadlocks between shards"]


def watching() -> int:
    names = [thread.name for thread in threading.enumerate()]
    return names.count("shardalchemy-waits")


def test_a_cluster_is_watched_from_its_first_transaction_to_its_end(
    bank: Cluster, servers: Servers
) -> None:
    before = watching()
    with servers.local.cluster() as other:
        with other.sessionmaker()() as session:
            assert watching() == before
            session.scalars(select(Account)).all()
            assert watching() == before + 1
        with other.sessionmaker()() as session:
            session.scalars(select(Account)).all()
        assert watching() == before + 1
    assert watching() == before


def test_a_forgotten_cluster_is_not_kept_by_its_thread(
    bank: Cluster, servers: Servers
) -> None:
    before = watching()
    other = servers.local.cluster(recover_in_background=False)
    with other.sessionmaker()() as session:
        session.scalars(select(Account)).all()
    other._shards.dispose()
    del other, session
    gc.collect()
    end = time.monotonic() + 5
    while watching() > before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_shard_given_as_a_connection_is_not_watched(
    bank: Cluster, servers: Servers
) -> None:
    before = watching()
    engines = {name: create_engine(url) for name, url in servers.local.urls.items()}
    with engines["s2"].connect() as connection:
        given = Cluster({**engines, "s2": connection})
        with given.sessionmaker()() as session:
            session.scalars(select(Account)).all()
            assert watching() == before
        given.close()
    for engine in engines.values():
        engine.dispose()


def test_process_ids_of_a_pooler_lead_to_nothing(
    bank: Cluster, servers: Servers
) -> None:
    a, b, _ = numbers(bank)
    urls = dict(servers.local.urls)
    with PoolersProxy(servers.local.servers["s2"].port) as proxy:
        port = servers.local.servers["s2"].port
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        with Cluster(urls) as pooled:
            Session = pooled.sessionmaker()
            with Session() as old, Session() as young:
                take(old, a)
                take(young, b)
                for session in (old, young):
                    for shard in ("s1", "s2"):
                        where = {"shard": shard}
                        setting = text("SET LOCAL lock_timeout = '2500ms'")
                        session.execute(setting, bind_arguments=where)

                def attempt(session: Session, number: int) -> None:
                    try:
                        take(session, number)
                    finally:
                        session.rollback()

                with at_once(lambda: attempt(old, b), lambda: attempt(young, a)) as two:
                    errors = [future.exception(timeout=20) for future in two]
            assert not any(isinstance(error, DeadlockDetected) for error in errors)
            assert counted(pooled) == 0
    until_gone(servers)


class PoolersProxy(CuttingProxy):
    """Tells its clients other process ids than the server's, as a pooler does."""

    def answered(self, data: bytes) -> bytes:
        # BackendKeyData: a type, its length, the process id.
        found = re.search(rb"K\x00\x00\x00\x0c", data)
        if found is None:
            return data
        return data[: found.end()] + b"\x7f\xff\xff\xf0" + data[found.end() + 4 :]


def test_a_home_shard_that_is_away_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        LocalCluster(3, with_redis=False) as local,
        local.cluster(recover_in_background=False) as bank,
    ):
        bank.create_all(Base.metadata)
        _, b, c = numbers(bank)
        Session = bank.sessionmaker()
        with Session.begin() as session:
            session.add_all(Account(number=n, balance=100) for n in (b, c))
        home = local.servers["s1"]
        with Session() as one, Session() as two, caplog.at_level(logging.WARNING):
            take(one, b)
            take(two, c)
            home.pause()

            def attempt(session: Session, number: int, seconds: float) -> Account:
                options = {"timeout": seconds}
                return session.get_one(
                    Account, number, with_for_update=True, execution_options=options
                )

            with at_once(lambda: attempt(one, c, 20), lambda: attempt(two, b, 9)) as (
                kept,
                ended,
            ):
                # Nobody finds it. The timeout does what it does, and no more.
                assert isinstance(ended.exception(20), StatementTimeout)
                home.resume()
                two.rollback()
                kept.result(timeout=5)
        told = [r.getMessage() for r in caplog.records if "deadlocks" in r.getMessage()]
        assert len(told) == 1
        assert "since shard s1 cannot be asked" in told[0]
        # And it is found again, now that all are there.
        with Session() as old, Session() as young:
            take(old, b)
            take(young, c)
            with at_once(lambda: take(old, c), lambda: take(young, b)) as (kept, last):
                assert isinstance(last.exception(20), DeadlockDetected)
                young.rollback()
                kept.result(timeout=5)


# -- cancelling ---------------------------------------------------------------------


def test_a_connection_begins_nothing_while_it_is_held(servers: Servers) -> None:
    with servers.connect("s1") as connection, ThreadPoolExecutor(2) as threads:
        running = threads.submit(connection.execute, "SELECT pg_sleep(0.5)")
        time.sleep(0.2)
        with next_statement_held(connection):
            running.result(timeout=5)  # what has begun goes on to its end
            following = threads.submit(connection.execute, "SELECT 1")
            time.sleep(0.3)
            assert not following.done()
        following.result(timeout=5)
        assert connection.execute("SELECT 2").fetchone() == (2,)


async def test_an_async_connection_begins_nothing_while_it_is_held(
    servers: Servers,
) -> None:
    url = servers.local.urls["s1"].replace("+psycopg", "")
    async with await psycopg.AsyncConnection.connect(url) as connection:
        with next_statement_held(connection):
            given_up = asyncio.create_task(connection.execute("SELECT 1"))
            following = asyncio.create_task(connection.execute("SELECT 1"))
            await asyncio.sleep(0.2)
            assert not following.done()
            given_up.cancel()
            await asyncio.sleep(0)
        await following
        assert given_up.cancelled()
