"""Savepoints over shards, by what the servers hold after the commit."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import exc, insert, select, text, update
from sqlalchemy.orm import Mapped, mapped_column

from shardalchemy import Cluster, TransactionAborted, TransactionFailed, reference_table
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers

BALANCES = "SELECT number, balance FROM accounts ORDER BY number"


class Rate(Base):
    __tablename__ = "rates"
    __table_args__ = {"info": reference_table()}
    name: Mapped[str] = mapped_column(primary_key=True)
    percent: Mapped[int]


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


@pytest.fixture
def numbers(bank: Cluster) -> dict[str, int]:
    return {shard: number_on(bank, shard) for shard in ("s1", "s2", "s3", "s4")}


def account(numbers: dict[str, int], shard: str, balance: int = 1) -> Account:
    return Account(number=numbers[shard], balance=balance)


def held(servers: Servers) -> dict[str, int]:
    """Return the balance on each shard that has an account."""
    found = servers.where(BALANCES)
    assert servers.prepared() == {}
    return {shard: sum(b for _, b in rows) for shard, rows in found.items()}


def test_a_shard_met_after_the_savepoint_is_rolled_back_to_it(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker().begin() as session:
        session.add(account(numbers, "s1"))
        savepoint = session.begin_nested()
        session.add(account(numbers, "s2"))
        session.flush()
        savepoint.rollback()
        assert session.get(Account, numbers["s2"]) is None
        session.add(account(numbers, "s2", 7))
    assert held(servers) == {"s1": 1, "s2": 7}


def test_a_released_savepoint_commits_with_the_rest(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    for ack in ("committed", "prepared"):
        with bank.sessionmaker(ack=ack).begin() as session:
            with session.begin_nested():
                session.merge(account(numbers, "s1"))
                session.merge(account(numbers, "s2"))
            with session.begin_nested():
                session.merge(account(numbers, "s3"))
    bank.close()
    assert held(servers) == {"s1": 1, "s2": 1, "s3": 1}


def test_savepoints_within_savepoints(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker().begin() as session:
        session.add(account(numbers, "s1"))
        outer = session.begin_nested()
        session.add(account(numbers, "s2"))
        inner = session.begin_nested()
        session.add(account(numbers, "s3"))
        session.flush()
        session.execute(update(Account).values(balance=Account.balance + 10))
        inner.rollback()
        with session.begin_nested():
            session.add(account(numbers, "s4"))
        assert {a.balance for a in session.scalars(select(Account))} == {1}
        outer.commit()
    assert held(servers) == {"s1": 1, "s2": 1, "s4": 1}
    with bank.sessionmaker().begin() as session:
        outer = session.begin_nested()
        with session.begin_nested():
            session.execute(update(Account).values(balance=50))
        outer.rollback()
    assert held(servers) == {"s1": 1, "s2": 1, "s4": 1}


def test_a_statement_of_all_shards_is_rolled_back_on_all(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker().begin() as session:
        session.add_all(account(numbers, shard) for shard in servers)
        session.flush()
        savepoint = session.begin_nested()
        home = update(Account).where(Account.number == numbers["s1"])
        session.execute(home.values(balance=0))
        # It fails on s1, and is cancelled or done on the others.
        with pytest.raises(exc.IntegrityError):
            session.execute(update(Account).values(balance=Account.balance - 1))
        with pytest.raises(exc.InternalError):
            session.scalars(select(Account)).all()
        savepoint.rollback()
        session.execute(update(Account).values(balance=Account.balance + 1))
    assert held(servers) == dict.fromkeys(servers, 2)


def test_an_error_on_one_shard_undoes_the_savepoint_on_another(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker().begin() as session:
        session.add(account(numbers, "s1"))
        for _ in range(2):
            savepoint = session.begin_nested()
            session.execute(insert(Account).values(number=numbers["s2"], balance=1))
            wrong = insert(Account).values(number=numbers["s3"], balance=-1)
            with pytest.raises(exc.IntegrityError):
                session.execute(wrong)
            savepoint.rollback()
        session.add(account(numbers, "s3"))
    assert held(servers) == {"s1": 1, "s3": 1}


def test_an_error_before_the_savepoint_is_not_undone_by_it(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker()() as session:
        session.add(account(numbers, "s1"))
        session.flush()
        with pytest.raises(exc.DBAPIError):
            session.execute(text("SELECT 1/0"), execution_options={"shard": "s2"})
        savepoint = session.begin_nested()
        with pytest.raises(TransactionFailed, match="shard s2"):
            session.get(Account, numbers["s3"])
        savepoint.rollback()
        with pytest.raises(TransactionAborted, match="shard s2"):
            session.commit()
    assert held(servers) == {}


def test_a_failing_prepare_rolls_back_what_savepoints_released(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    servers.run(
        "ALTER TABLE accounts ADD CONSTRAINT odd EXCLUDE (balance WITH =)"
        " DEFERRABLE INITIALLY DEFERRED"
    )
    with bank.sessionmaker()() as session:
        with session.begin_nested():
            session.add_all([account(numbers, "s1"), account(numbers, "s2", 7)])
        session.begin_nested()  # and one that the commit releases
        again = number_on(bank, "s2", numbers["s2"] + 1)
        session.add(Account(number=again, balance=7))
        with pytest.raises(exc.IntegrityError):
            session.commit()
        assert not session.in_transaction()
        assert session.scalars(select(Account)).all() == []
        with session.begin_nested():
            session.add(account(numbers, "s2"))
        session.commit()
    assert held(servers) == {"s2": 1}


def test_copies_of_a_reference_table_are_rolled_back_everywhere(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker().begin() as session:
        session.add(Rate(name="kept", percent=1))
        savepoint = session.begin_nested()
        session.add(Rate(name="gone", percent=1))
        session.execute(update(Rate).values(percent=9))
        savepoint.rollback()
        with session.begin_nested():
            session.execute(update(Rate).values(percent=Rate.percent + 1))
    rates = servers.where("SELECT name, percent FROM rates")
    assert rates == {shard: [("kept", 2)] for shard in servers}


def test_an_object_that_moved_is_back_where_it_was(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker()() as session:
        one = account(numbers, "s1", 3)
        session.add(one)
        session.commit()
        savepoint = session.begin_nested()
        one.number = numbers["s2"]
        session.flush()
        savepoint.rollback()
        assert one.number == numbers["s1"]
        one.balance += 1
        session.commit()
    assert held(servers) == {"s1": 4}


def test_settings_of_a_savepoint_end_with_it_on_every_shard(
    bank: Cluster, servers: Servers
) -> None:
    def zones(session: Any) -> set[Any]:
        return {
            session.scalar(text("SHOW timezone"), execution_options={"shard": shard})
            for shard in servers
        }

    with bank.sessionmaker()() as session:
        (before,) = zones(session)
        session.rollback()
        session.execute(text("SET LOCAL timezone = 'Asia/Tokyo'"))
        savepoint = session.begin_nested()
        session.execute(text("SET LOCAL timezone = 'Asia/Seoul'"))
        assert zones(session) == {"Asia/Seoul"}
        savepoint.rollback()
        assert zones(session) == {"Asia/Tokyo"}
        session.rollback()
        assert zones(session) == {before}


def test_a_connection_lost_in_a_savepoint_ends_the_whole_transaction(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all([account(numbers, "s1"), account(numbers, "s2")])
        session.flush()
        savepoint = session.begin_nested()
        connection = session.connection(bind_arguments={"shard": "s2"})
        pid = connection.connection.driver_connection.info.backend_pid
        with servers.connect("s2") as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        with pytest.raises(exc.DBAPIError):
            session.get(Account, numbers["s2"], populate_existing=True)
        savepoint.rollback()
        session.add(account(numbers, "s3"))
        with pytest.raises(exc.SQLAlchemyError):
            session.commit()
        session.rollback()
        assert held(servers) == {}
        session.add(account(numbers, "s3"))
        session.commit()
    assert held(servers) == {"s3": 1}


async def test_the_same_in_an_event_loop(
    bank: Cluster, servers: Servers, numbers: dict[str, int]
) -> None:
    async with bank.async_sessionmaker().begin() as session:
        session.add(account(numbers, "s1"))
        savepoint = await session.begin_nested()
        session.add_all([account(numbers, "s2"), account(numbers, "s3")])
        await session.flush()
        await savepoint.rollback()
        savepoint = await session.begin_nested()
        session.add_all([account(numbers, "s2"), account(numbers, "s3", -1)])
        with pytest.raises(exc.IntegrityError):
            await session.flush()
        await savepoint.rollback()
        async with session.begin_nested():
            session.add(account(numbers, "s4"))
            async with session.begin_nested():
                await session.execute(update(Account).values(balance=5))
    await bank.aclose()
    assert held(servers) == {"s1": 5, "s4": 5}
