"""Connections that a server ends while a transaction is open on them.

Whoever uses the session afterwards is told so, and that nothing has been committed; no
shard holds any of it, and every connection in the pools works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import exc, select, text

from shardalchemy import Cluster, ShardedSession, TransactionAborted
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers

BALANCES = "SELECT number, balance FROM accounts ORDER BY number"
TERMINATE = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE state LIKE 'idle in transaction%'
"""
SHARDS = ("s1", "s2", "s3")


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


@pytest.fixture
def whole(bank: Cluster, servers: Servers) -> Iterator[None]:
    """Whatever is done, nothing of it is anywhere, and every connection works."""
    yield
    assert servers.where(BALANCES) == {}
    assert servers.prepared() == {}
    with bank.sessionmaker().begin() as session:
        session.add_all(accounts(bank, *servers))
    assert set(servers.where(BALANCES)) == set(servers)


def accounts(bank: Cluster, *shards: str) -> list[Account]:
    return [Account(number=number_on(bank, s), balance=1) for s in shards]


def end(servers: Servers, *shards: str) -> None:
    for shard in shards:
        servers.rows(shard, TERMINATE)


def ask(session: ShardedSession, shard: str) -> None:
    session.scalar(text("SELECT 1"), execution_options={"shard": shard})


@pytest.mark.parametrize("ended", [("s1",), ("s2",), ("s1", "s2"), ("s3",)])
@pytest.mark.usefixtures("whole")
def test_ended_before_the_commit(
    bank: Cluster, servers: Servers, ended: tuple[str, ...]
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        ask(session, "s3")  # only read
        end(servers, *ended)
        with pytest.raises(TransactionAborted, match=f"{ended[0]}.*administrator"):
            session.commit()
        assert session.scalars(select(Account)).all() == []


@pytest.mark.parametrize("ended", SHARDS[:2])
@pytest.mark.usefixtures("whole")
def test_ended_with_one_writer(bank: Cluster, servers: Servers, ended: str) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1"))
        session.flush()
        ask(session, "s2")
        end(servers, ended)
        with pytest.raises(TransactionAborted, match=ended):
            session.commit()


@pytest.mark.usefixtures("whole")
def test_ended_on_the_only_shard(bank: Cluster, servers: Servers) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s2"))
        session.flush()
        end(servers, "s2")
        with pytest.raises(TransactionAborted, match="s2"):
            session.commit()


@pytest.mark.usefixtures("whole")
def test_ended_between_the_statements_of_two_shards(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        end(servers, "s2")
        ask(session, "s1")  # it has not heard of it
        with pytest.raises(exc.DBAPIError, match="administrator") as caught:
            ask(session, "s2")
        assert caught.value.connection_invalidated
        for shard in ("s1", "s3"):
            with pytest.raises(TransactionAborted, match="shard s2"):
                ask(session, shard)
        with pytest.raises(TransactionAborted, match="shard s2"):
            session.execute(select(Account))
        with pytest.raises(TransactionAborted, match="shard s2"):
            session.commit()


@pytest.mark.usefixtures("whole")
def test_ended_in_a_statement_on_all_shards(bank: Cluster, servers: Servers) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, *SHARDS))
        session.flush()
        end(servers, "s2")
        with pytest.raises(exc.DBAPIError, match="shard s2"):
            session.scalars(select(Account)).all()
        with pytest.raises(TransactionAborted, match="shard s2"):
            session.commit()


@pytest.mark.usefixtures("whole")
def test_ended_before_another_shard_is_written(bank: Cluster, servers: Servers) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1"))
        session.flush()
        end(servers, "s1")
        session.add_all(accounts(bank, "s2"))
        session.flush()
        with pytest.raises(TransactionAborted, match="shard s1"):
            session.commit()


@pytest.mark.parametrize("end_session", [ShardedSession.rollback, ShardedSession.close])
@pytest.mark.usefixtures("whole")
def test_ended_before_a_rollback(
    bank: Cluster, servers: Servers, end_session: Callable[[ShardedSession], None]
) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        end(servers, "s1")
        end_session(session)  # it has been rolled back there already


@pytest.mark.parametrize(
    "setting", ["idle_in_transaction_session_timeout", "transaction_timeout"]
)
@pytest.mark.usefixtures("whole")
def test_ended_by_a_timeout_of_the_server(
    bank: Cluster, servers: Servers, setting: str
) -> None:
    if not servers.rows("s1", "SELECT 1 FROM pg_settings WHERE name = %s", setting):
        pytest.skip(f"this PostgreSQL has no {setting}")
    options = {"options": f"-c {setting}=200"}
    with (
        servers.local.cluster(connect_args=options) as cluster,
        cluster.sessionmaker()() as session,
    ):
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        time.sleep(0.5)
        with pytest.raises(TransactionAborted, match="timeout"):
            session.commit()
        session.add_all(accounts(bank, "s1", "s2"))
        session.flush()
        time.sleep(0.5)
        with pytest.raises(exc.DBAPIError, match="timeout"):
            ask(session, "s2")
        with pytest.raises(TransactionAborted, match="shard s2"):
            ask(session, "s1")
        session.rollback()
        ask(session, "s1")


async def test_ended_in_an_event_loop(bank: Cluster, servers: Servers) -> None:
    async with bank.async_sessionmaker()() as session:
        session.add_all(accounts(bank, "s1", "s2"))
        await session.flush()
        end(servers, "s2")
        with pytest.raises(TransactionAborted, match=r"s2.*administrator"):
            await session.commit()
        session.add_all(accounts(bank, "s1", "s2"))
        await session.flush()
        end(servers, "s1")
        on_s1 = {"execution_options": {"shard": "s1"}}
        with pytest.raises(exc.DBAPIError):
            await session.scalar(text("SELECT 1"), **on_s1)
        with pytest.raises(TransactionAborted, match="shard s1"):
            await session.scalars(select(Account))
        await session.rollback()
        assert (await session.scalars(select(Account))).all() == []
        end(servers, "s2")
        await session.rollback()
        session.add_all(accounts(bank, "s1", "s2"))
        await session.commit()
    await bank.aclose()
    assert set(servers.where(BALANCES)) == {"s1", "s2"}
    assert servers.prepared() == {}


def test_idle_connections_may_be_ended(
    bank: Cluster, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """What runs in the background opens others, as sessions do with pool_pre_ping."""
    options = {"options": "-c idle_session_timeout=150"}
    with servers.local.cluster(
        ack="prepared", connect_args=options, pool_pre_ping=True
    ) as cluster:
        start = 1
        for shard in SHARDS:
            number = number_on(bank, "s4", start)
            start = number + 1
            with cluster.sessionmaker().begin() as session:
                session.add_all(accounts(bank, shard))
                session.add(Account(number=number, balance=1))
            time.sleep(0.5)
    assert {s: len(rows) for s, rows in servers.where(BALANCES).items()} == {
        **dict.fromkeys(SHARDS, 1),
        "s4": 3,
    }
    assert servers.prepared() == {}
    ours = [r for r in caplog.records if r.name.startswith("shardalchemy")]
    assert [r.getMessage() for r in ours] == []
