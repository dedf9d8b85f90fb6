"""Rows that a prepared transaction has locked, met by sessions that want them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from shardalchemy import Cluster, StatementTimeout
from shardalchemy.commit import Gid
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers

IN_TIME = 6.0
"""Seconds. It is met within one and resolved when it is two old."""


@pytest.fixture
def bank(cluster: Cluster, servers: Servers) -> Iterator[Cluster]:
    """An account of 100 on s1 and one on s2; nothing recovers by itself."""
    cluster.create_all(Base.metadata)
    with servers.local.cluster(recover_in_background=False) as made:
        with made.sessionmaker().begin() as session:
            for shard in ("s1", "s2"):
                session.add(Account(number=number_on(made, shard), balance=100))
        yield made


def leave_prepared(
    bank: Cluster,
    servers: Servers,
    *shards: str,
    of: tuple[int, ...] = (0, 1),
    work: str = "UPDATE accounts SET balance = 7",
) -> Gid:
    """Leave a transaction prepared on *shards*, by a process that is no more.

    *of* are the numbers of all its participants.
    """
    gid = Gid.new(bank.topology.cluster, of)
    for shard in shards:
        branch = gid.on(bank.topology.addresses[shard].number)
        with servers.connect(shard) as connection:
            connection.execute(
                f"BEGIN; {work};"
                f" INSERT INTO shardalchemy.txn VALUES ('{gid}', 'committed');"
                f" PREPARE TRANSACTION '{branch}'"
            )
    return gid


def read(session: Session, number: int) -> int:
    account = session.get_one(
        Account, number, with_for_update=True, populate_existing=True
    )
    return account.balance


def until_nothing_is_prepared(servers: Servers) -> None:
    """Wait for the other participants: a row is free once its own shard is told."""
    end = time.monotonic() + 5
    while servers.prepared():
        assert time.monotonic() < end, servers.prepared()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("shards", "balance"), [(("s1", "s2"), 7), (("s2",), 100)], ids=str
)
def test_it_is_resolved_at_once(
    bank: Cluster,
    servers: Servers,
    caplog: pytest.LogCaptureFixture,
    shards: tuple[str, ...],
    balance: int,
) -> None:
    gid = leave_prepared(bank, servers, *shards)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), bank.sessionmaker()() as session:
        assert read(session, number_on(bank, "s2")) == balance
    assert time.monotonic() - began < IN_TIME
    until_nothing_is_prepared(servers)
    told = [r.getMessage() for r in caplog.records if str(gid) in r.getMessage()]
    assert len(told) == 1
    assert "shard s2: process" in told[0]
    assert "waits for ShareLock on transaction" in told[0]
    assert bank._transactions.counters.read()["in_doubt.waits"] == 1


async def test_it_is_resolved_for_a_task(bank: Cluster, servers: Servers) -> None:
    leave_prepared(bank, servers, "s1", "s2")
    async with bank.async_sessionmaker()() as session:
        number = number_on(bank, "s2")
        account = await session.get(Account, number, with_for_update=True)
        assert account is not None
        assert account.balance == 7
    await bank.aclose()


def test_it_is_resolved_for_one_that_queues_behind_another(
    bank: Cluster, servers: Servers
) -> None:
    leave_prepared(bank, servers, "s1", "s2")
    number = number_on(bank, "s2")
    with servers.connect("s2") as plain, ThreadPoolExecutor(1) as threads:
        # Nobody watches for this one, which is the first in the row's queue.
        first = threads.submit(plain.execute, "UPDATE accounts SET balance = 8")
        time.sleep(0.3)
        with bank.sessionmaker()() as session:
            assert read(session, number) == 8
        first.result(timeout=5)


def test_a_table_that_it_has_locked(bank: Cluster, servers: Servers) -> None:
    leave_prepared(bank, servers, "s1", "s2", work="LOCK TABLE accounts")
    with bank.sessionmaker()() as session:
        assert read(session, number_on(bank, "s2")) == 100
    until_nothing_is_prepared(servers)


def test_sessions_that_have_every_connection(bank: Cluster, servers: Servers) -> None:
    leave_prepared(bank, servers, "s1", "s2")
    with servers.local.cluster(
        recover_in_background=False, max_connections=2, pool_timeout=5
    ) as full:
        numbers = [number_on(bank, shard) for shard in ("s1", "s2")]
        with (
            ThreadPoolExecutor(2) as threads,
            full.sessionmaker()() as one,
            full.sessionmaker()() as two,
        ):
            assert list(threads.map(read, (one, two), numbers)) == [7, 7]


def test_one_whose_participant_is_away_stays_and_is_named(
    bank: Cluster, servers: Servers
) -> None:
    gid = leave_prepared(bank, servers, "s2", of=(1, 60))
    with bank.sessionmaker()() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(StatementTimeout) as caught:
            session.execute(
                text("UPDATE accounts SET balance = 9"),
                bind_arguments={"shard": "s2"},
                execution_options={"timeout": 4.0},
            )
    assert (
        f"it waited for a row locked by the in-doubt transaction {gid.on(1)} on shard"
        " s2, prepared"
    ) in str(caught.value)
    assert servers.prepared() == {"s2": [(gid.on(1),)]}


def test_one_of_another_program_is_reported_and_left_alone(
    bank: Cluster, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    other = Gid.new("ffffffff-0000-4000-8000-000000000000", (1,)).on(1)
    with servers.connect("s1") as connection:
        connection.execute("BEGIN; UPDATE accounts SET balance = 7")
        connection.execute("PREPARE TRANSACTION 'theirs'")
    with servers.connect("s2") as connection:
        connection.execute("BEGIN; UPDATE accounts SET balance = 7")
        connection.execute(f"PREPARE TRANSACTION '{other}'")
    with caplog.at_level(logging.WARNING), bank.sessionmaker()() as session:
        for shard, name in (("s1", "theirs"), ("s2", other)):
            with pytest.raises(StatementTimeout, match=name):
                session.get(
                    Account,
                    number_on(bank, shard),
                    with_for_update=True,
                    execution_options={"timeout": 3.5},
                )
            session.rollback()
            told = [r.getMessage() for r in caplog.records if name in r.getMessage()]
            assert len(told) == 1
            assert "left alone" in told[0]
    assert servers.prepared() == {"s1": [("theirs",)], "s2": [(other,)]}


def test_a_timeout_of_another_wait_does_not_name_it(
    bank: Cluster, servers: Servers
) -> None:
    with servers.connect("s2") as plain, bank.sessionmaker()() as session:
        plain.execute("BEGIN; UPDATE accounts SET balance = 7")
        with pytest.raises(StatementTimeout) as caught:
            session.get(
                Account,
                number_on(bank, "s2"),
                with_for_update=True,
                execution_options={"timeout": 1.5},
            )
    assert "in-doubt" not in str(caught.value)
