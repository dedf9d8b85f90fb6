"""Isolation levels over shards, by what each server says and by what it prevents."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import create_engine, exc, func, select, text

from shardalchemy import (
    Cluster,
    ConfigurationError,
    ShardedSession,
    UnsupportedQueryError,
)
from tests.commit.accounts import Account, Base, Note, number_on
from tests.conftest import Servers

BALANCES = "SELECT number, balance FROM accounts"
TAKES_OPTIONS = sqlalchemy.__version__ >= "2.1"


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


def level_on(session: ShardedSession, shard: str) -> Any:
    shown = text("SHOW transaction_isolation")
    return session.scalar(shown, execution_options={"shard": shard})


def levels(session: ShardedSession, servers: Servers) -> set[Any]:
    return {level_on(session, shard) for shard in servers}


def test_a_sessions_level_holds_on_every_shard_and_no_longer(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker(isolation_level="serializable")() as session:
        assert levels(session, servers) == {"serializable"}
        session.commit()
        assert levels(session, servers) == {"serializable"}
    with bank.sessionmaker()() as session:
        assert levels(session, servers) == {"read committed"}
    with ShardedSession(cluster=bank, isolation_level="REPEATABLE_READ") as session:
        session.scalars(select(Account)).all()  # on all at once
        assert levels(session, servers) == {"repeatable read"}


def test_it_costs_no_round_trip(bank: Cluster, tmp_path: Path) -> None:
    def sent(**options: Any) -> list[str]:
        """Return the messages to s2 in one transaction, as libpq has traced them."""
        with bank.sessionmaker(**options)() as session:
            connection = session.connection(bind_arguments={"shard": "s2"})
            driver = connection.connection.driver_connection
            with (tmp_path / "trace").open("w+") as trace:
                driver.pgconn.trace(trace.fileno())
                session.get(Account, number_on(bank, "s2"))
                session.commit()
                driver.pgconn.untrace()
                trace.seek(0)
                lines = trace.read().splitlines()
        return [line for line in lines if "\tF\t" in line]

    plain, serializable = sent(), sent(isolation_level="SERIALIZABLE")
    assert len(serializable) == len(plain)
    assert any("BEGIN ISOLATION LEVEL SERIALIZABLE" in line for line in serializable)


def test_the_first_connections_options_hold_for_the_transaction(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        session.connection(
            execution_options={
                "isolation_level": "REPEATABLE READ",
                "postgresql_readonly": True,
            }
        )
        assert level_on(session, "s2") == "repeatable read"
        with session.begin_nested():
            assert level_on(session, "s3") == "repeatable read"
        session.scalars(select(Account)).all()
        assert levels(session, servers) == {"repeatable read"}
        session.add(Account(number=number_on(bank, "s4"), balance=1))
        with pytest.raises(exc.InternalError, match="read-only"):
            session.flush()
        session.rollback()
        assert levels(session, servers) == {"read committed"}


def test_a_level_for_one_transaction_is_over_that_of_the_session(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker(isolation_level="SERIALIZABLE")() as session:
        session.connection(
            bind_arguments={"shard": "s3"},
            execution_options={"isolation_level": "READ COMMITTED"},
        )
        assert levels(session, servers) == {"read committed"}


def test_a_level_that_comes_too_late_is_warned_of(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        assert level_on(session, "s2") == "read committed"
        with pytest.warns(exc.SAWarning, match="isolation_level ignored"):
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert levels(session, servers) == {"read committed"}


def test_set_transaction_holds_on_shards_met_later(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        assert levels(session, servers) == {"serializable"}


@pytest.mark.skipif(not TAKES_OPTIONS, reason="Session(execution_options=…) is of 2.1")
def test_a_sessions_execution_options_hold_on_every_shard(
    bank: Cluster, servers: Servers
) -> None:
    options = {"isolation_level": "REPEATABLE READ"}
    with bank.sessionmaker(execution_options=options)() as session:
        session.scalars(select(Account).order_by(Account.balance).limit(3)).all()
        session.scalars(select(func.count()).select_from(Account)).all()
        assert levels(session, servers) == {"repeatable read"}
        session.add_all(Account(number=number_on(bank, s), balance=1) for s in servers)
        session.commit()
    assert set(servers.where(BALANCES)) == set(servers)
    options = {"isolation_level": "AUTOCOMMIT"}
    with (
        bank.sessionmaker(execution_options=options)() as session,
        pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"),
    ):
        session.scalars(select(Account)).all()


@pytest.mark.parametrize("level", ["CURSOR STABILITY", 7])
def test_a_level_that_there_is_not_is_refused(bank: Cluster, level: Any) -> None:
    with pytest.raises(ConfigurationError, match="REPEATABLE READ, SERIALIZABLE"):
        bank.sessionmaker(isolation_level=level)
    with pytest.raises(ConfigurationError, match="REPEATABLE READ, SERIALIZABLE"):
        bank.async_sessionmaker(isolation_level=level)
    with pytest.raises(ConfigurationError, match="REPEATABLE READ, SERIALIZABLE"):
        bank.sessionmaker()(isolation_level=level)


def test_autocommit_is_for_one_shard(bank: Cluster, servers: Servers) -> None:
    b = number_on(bank, "s2")
    with bank.sessionmaker(isolation_level="AUTOCOMMIT")() as session:
        session.add(Account(number=b, balance=1))
        session.flush()
        session.rollback()
        assert session.get_one(Account, b).balance == 1
        session.rollback()
        session.execute(text("VACUUM accounts"), execution_options={"shard": "s2"})
        session.add(Note(text="elsewhere"))
        with pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"):
            session.flush()
        session.rollback()
        with pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"):
            session.query(Account).update({"balance": 9})
    with bank.sessionmaker()() as session:
        session.connection(execution_options={"isolation_level": "autocommit"})
        with pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"):
            session.get(Account, b)
    held = servers.where(BALANCES)
    assert held["s2"][0] == (b, 1)
    assert all(balance != 9 for rows in held.values() for _, balance in rows)


def test_a_cluster_of_several_shards_cannot_be_in_autocommit(servers: Servers) -> None:
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        servers.local.cluster(isolation_level="AUTOCOMMIT")
    urls = servers.local.urls
    engine = create_engine(urls["s2"], isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="shard s2"):
        Cluster({**urls, "s2": engine})
    engine = create_engine(urls["s3"]).execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="shard s3"):
        Cluster({**urls, "s3": engine})


class OnCall:
    """Two who take turns: one of them must always be there. Their pay is elsewhere."""

    def __init__(self, cluster: Cluster, paid: int) -> None:
        self.cluster = cluster
        a = number_on(cluster, "s1")
        self.pair = (a, number_on(cluster, "s1", a + 1))
        self.pay: list[int] = []
        for _ in range(paid):
            start = self.pay[-1] + 1 if self.pay else 1
            self.pay.append(number_on(cluster, "s2", start))
        with cluster.sessionmaker().begin() as session:
            session.add_all(Account(number=n, balance=1) for n in self.pair)
            session.add_all(Account(number=n, balance=1000) for n in self.pay)

    def change(self, session: ShardedSession, which: int, pay: int) -> None:
        """Go if the other stays, or come back."""
        pair = [session.get_one(Account, n) for n in self.pair]
        person = pair[which]
        if person.balance == 0:
            change = 1
        elif sum(p.balance for p in pair) == 2:
            change = -1
        else:
            return
        person.balance += change
        session.get_one(Account, self.pay[pay]).balance -= change
        session.flush()

    def total(self, servers: Servers) -> int:
        held = servers.where(BALANCES)
        present = sum(balance for _, balance in held["s1"])
        assert present >= 1, "nobody is there"
        return present + sum(balance for _, balance in held["s2"])


def test_a_serialization_failure_on_one_shard_rolls_back_all(
    bank: Cluster, servers: Servers
) -> None:
    both = OnCall(bank, paid=2)
    before = both.total(servers)
    Session = bank.sessionmaker(isolation_level="SERIALIZABLE")
    with Session() as one, Session() as other:
        both.change(one, 0, 0)
        both.change(other, 1, 1)
        one.commit()
        # The other has nothing more to do: it is told when it prepares.
        with pytest.raises(exc.OperationalError) as caught:
            other.commit()
        assert isinstance(caught.value.orig, psycopg.errors.SerializationFailure)
        assert servers.prepared() == {}
        both.change(other, 1, 1)  # the session goes on, and sees the first one's leave
        other.commit()
    assert both.total(servers) == before
    assert dict(servers.where(BALANCES)["s2"])[both.pay[1]] == 1000


def test_without_it_there_is_write_skew(bank: Cluster, servers: Servers) -> None:
    both = OnCall(bank, paid=2)
    with bank.sessionmaker()() as one, bank.sessionmaker()() as other:
        both.change(one, 0, 0)
        both.change(other, 1, 1)
        one.commit()
        other.commit()
    assert sum(balance for _, balance in servers.where(BALANCES)["s1"]) == 0


def test_serializable_transactions_keep_invariants_under_load(
    bank: Cluster, servers: Servers
) -> None:
    threads = 8
    both = OnCall(bank, paid=threads)
    before = both.total(servers)
    Session = bank.sessionmaker(isolation_level="SERIALIZABLE")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        choose = random.Random(number)
        try:
            for _ in range(12):
                which = choose.randrange(2)
                bank.run(
                    lambda session, which=which: both.change(session, which, number),
                    sessionmaker=Session,
                    attempts=50,
                )
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert both.total(servers) == before
    assert servers.prepared() == {}


async def test_the_same_in_an_event_loop(bank: Cluster, servers: Servers) -> None:
    async with bank.async_sessionmaker(isolation_level="SERIALIZABLE")() as session:
        assert await session.run_sync(levels, servers) == {"serializable"}
    async with bank.async_sessionmaker()() as session:
        await session.connection(
            execution_options={"isolation_level": "REPEATABLE READ"}
        )
        assert await session.run_sync(levels, servers) == {"repeatable read"}
        await session.rollback()
        assert await session.run_sync(levels, servers) == {"read committed"}
    async with bank.async_sessionmaker(isolation_level="AUTOCOMMIT")() as session:
        with pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"):
            await session.scalars(select(Account))
    await bank.aclose()
