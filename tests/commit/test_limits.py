"""What PostgreSQL cannot prepare, or not now, and what an application is told then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    exc,
    func,
    select,
    text,
)
from sqlalchemy.schema import CreateTable

from shardalchemy import (
    Cluster,
    PreparedSlotsExhausted,
    UnsupportedQueryError,
)
from shardalchemy.local import LocalCluster
from shardalchemy.obstacles import Obstacle, obstacle_in_sql
from tests.commit.accounts import Account, Base, Note, number_on
from tests.conftest import Servers

BALANCES = "SELECT number, balance FROM accounts ORDER BY number"


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


def on(shard: str) -> dict[str, dict[str, str]]:
    return {"execution_options": {"shard": shard}}


TEMPORARY = CreateTable(
    Table("staged", MetaData(), Column("x", Integer), prefixes=["TEMPORARY"])
)
OBSTACLES = {
    "NOTIFY": text("NOTIFY orders, 'paid'"),
    "LISTEN": text("/* a */ listen orders"),
    "pg_notify in SQL": text("SELECT pg_notify('orders', :what)").bindparams(what="x"),
    "pg_notify": select(func.pg_notify("orders", "paid")),
    "temporary table in SQL": text("CREATE TEMP TABLE staged (x int) ON COMMIT DROP"),
    "temporary table": TEMPORARY,
    "temporary view": text("CREATE OR REPLACE TEMPORARY VIEW staged AS SELECT 1"),
    "temporary sequence": text("CREATE TEMP SEQUENCE staged"),
    "temporary function": text(
        "CREATE FUNCTION pg_temp.one() RETURNS int LANGUAGE sql AS 'SELECT 1'"
    ),
    "temporary copy": text("SELECT 1 AS x INTO TEMP staged"),
    "snapshot": text("SELECT pg_export_snapshot()"),
}


# -- what cannot be prepared ---------------------------------------------------------


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_prepared_works_on_one_shard(
    bank: Cluster, servers: Servers, what: str
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker().begin() as session:
        session.get(Account, b)  # another shard that is only read
        session.add(Account(number=a, balance=1))
        session.flush()
        session.execute(OBSTACLES[what], **on("s1"))
    assert servers.where(BALANCES) == {"s1": [(a, 1)]}
    servers_are_clean(bank, servers)


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_prepared_is_refused_at_the_second_write(
    bank: Cluster, servers: Servers, what: str
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.add(Account(number=a, balance=1))
        session.flush()
        session.execute(OBSTACLES[what], **on("s1"))
        session.add(Account(number=b, balance=1))
        with pytest.raises(UnsupportedQueryError, match="on shard s1") as caught:
            session.flush()
        assert "on s1, s2" in str(caught.value)
        session.rollback()
    assert servers.where(BALANCES) == {}
    servers_are_clean(bank, servers)


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_prepared_is_refused_after_two_writes(
    bank: Cluster, servers: Servers, what: str
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
        session.flush()
        with pytest.raises(UnsupportedQueryError, match="on shard s1"):
            session.execute(OBSTACLES[what])  # at home, which is s1
        # Nothing was sent, so the transaction is as it was.
        session.commit()
    assert set(servers.where(BALANCES)) == {"s1", "s2"}


@pytest.mark.parametrize("what", OBSTACLES)
def test_postgresql_refuses_to_prepare_each_of_them(
    bank: Cluster, servers: Servers, what: str
) -> None:
    """So that what is refused early is nothing that would have worked."""
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
        session.flush()
        connection = session.connection(bind_arguments={"shard": "s2"})
        connection.execute(OBSTACLES[what])  # past the session
        with pytest.raises(UnsupportedQueryError, match="on shard s2") as caught:
            session.commit()
        assert isinstance(caught.value.__cause__, exc.DBAPIError)
        assert "cannot PREPARE" in str(caught.value)
        assert session.scalars(select(Account)).all() == []
    assert servers.where(BALANCES) == {}
    servers_are_clean(bank, servers)


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE it"),
        (
            "SELECT pg_advisory_lock(1), pg_advisory_xact_lock(1)",
            "pg_advisory_xact_lock",
        ),
        ("DO $$ BEGIN PERFORM pg_notify('orders', 'paid'); END $$", "outbox"),
    ],
)
def test_what_only_postgresql_knows_is_explained_at_the_commit(
    bank: Cluster, servers: Servers, sql: str, word: str
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
        session.execute(text(sql), **on("s2"))
        with pytest.raises(UnsupportedQueryError, match="on shard s2") as caught:
            session.commit()
        assert word in str(caught.value)
    assert servers.where(BALANCES) == {}
    servers_are_clean(bank, servers)


async def test_what_cannot_be_prepared_in_an_event_loop(
    bank: Cluster, servers: Servers
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    async with bank.async_sessionmaker()() as session:
        session.add(Account(number=a, balance=1))
        await session.flush()
        await session.execute(text("NOTIFY orders"))
        session.add(Account(number=b, balance=1))
        with pytest.raises(UnsupportedQueryError, match="AUTOCOMMIT"):
            await session.commit()
        await session.rollback()
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
        await session.flush()
        connection = await session.connection(bind_arguments={"shard": "s2"})
        await connection.exec_driver_sql("NOTIFY orders")
        with pytest.raises(UnsupportedQueryError, match="on shard s2"):
            await session.commit()
    await bank.aclose()
    assert servers.where(BALANCES) == {}


def test_a_notification_rolled_back_with_a_savepoint_is_none(
    bank: Cluster, servers: Servers
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker().begin() as session:
        session.add(Account(number=a, balance=1))
        with session.begin_nested() as savepoint:
            session.execute(text("NOTIFY orders"))
            savepoint.rollback()
        session.add(Account(number=b, balance=1))
    assert set(servers.where(BALANCES)) == {"s1", "s2"}


def test_a_notification_beside_two_writers_is_sent(
    bank: Cluster, servers: Servers
) -> None:
    """The shard that only notifies is not prepared."""
    b, c = number_on(bank, "s2"), number_on(bank, "s3")
    with servers.connect("s1") as listener:
        listener.execute("LISTEN orders")
        with bank.sessionmaker().begin() as session:
            session.execute(text("NOTIFY orders, 'both'"))
            session.add_all(
                [Account(number=b, balance=1), Account(number=c, balance=1)]
            )
        (heard,) = listener.notifies(timeout=5, stop_after=1)
    assert heard.payload == "both"
    assert set(servers.where(BALANCES)) == {"s2", "s3"}


def test_no_notification_goes_out_for_a_write_elsewhere_that_fails(
    bank: Cluster, servers: Servers
) -> None:
    servers.run(
        "ALTER TABLE accounts ADD CONSTRAINT odd EXCLUDE (balance WITH =)"
        " DEFERRABLE INITIALLY DEFERRED"
    )
    b = number_on(bank, "s2")
    c = number_on(bank, "s2", b + 1)
    with servers.connect("s1") as listener:
        listener.execute("LISTEN orders")
        with bank.sessionmaker()() as session:
            session.execute(text("NOTIFY orders, 'none'"))
            session.add_all(
                [Account(number=b, balance=7), Account(number=c, balance=7)]
            )
            with pytest.raises(exc.IntegrityError):
                session.commit()
        assert list(listener.notifies(timeout=0.5)) == []


def test_a_home_row_and_a_notification_and_a_row_elsewhere(
    bank: Cluster, servers: Servers
) -> None:
    b = number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.execute(text("NOTIFY orders"))
        session.add_all([Note(text="moved"), Account(number=b, balance=5)])
        with pytest.raises(UnsupportedQueryError, match="on shard s1"):
            session.commit()
        session.rollback()
        # The next transaction knows nothing of it.
        session.add_all([Note(text="moved"), Account(number=b, balance=5)])
        session.commit()
    assert servers.where(BALANCES) == {"s2": [(b, 5)]}


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT 'NOTIFY x'", None),
        ("SELECT 1 -- ; NOTIFY x", None),
        ("SELECT $a$ ; NOTIFY x $a$", None),
        ("SELECT notify FROM notify", None),
        ("SELECT pg_notify(name, '') FROM items", None),
        ("SELECT pg_notify('a', '') WHERE :late", None),
        ("UNLISTEN *", None),
        ("CREATE TABLE temp (x int)", None),
        ("DROP TABLE IF EXISTS pg_temp.staged", None),
        ("SELECT 1; NOTIFY x", Obstacle.NOTIFICATION),
        ('NOTIFY "Mixed Case"', Obstacle.NOTIFICATION),
        ("SELECT pg_catalog.pg_notify('a', 'b')", Obstacle.NOTIFICATION),
        ("CREATE LOCAL TEMPORARY TABLE t AS SELECT 1", Obstacle.TEMPORARY),
        ("INSERT INTO pg_temp.staged VALUES (1)", Obstacle.TEMPORARY),
        ("SELECT * FROM pg_temp.staged", Obstacle.TEMPORARY),
    ],
)
def test_what_plain_sql_is_certain_to_do(sql: str, expected: object) -> None:
    assert obstacle_in_sql(sql) is expected


def servers_are_clean(bank: Cluster, servers: Servers) -> None:
    """Nothing is left prepared or in a transaction; pooled connections work."""
    assert servers.prepared() == {}
    busy = servers.where(
        "SELECT state, query FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%%'"
    )
    assert busy == {}
    with bank.sessionmaker()() as session:
        for shard in servers:
            assert session.scalar(text("SELECT 1"), **on(shard)) == 1


# -- no place for another prepared transaction ---------------------------------------


@pytest.fixture
def narrow() -> Iterator[LocalCluster]:
    settings = {"max_prepared_transactions": "1"}
    with LocalCluster(2, with_redis=False, settings=settings) as local:
        yield local


def test_prepared_slots_that_run_out_are_counted(narrow: LocalCluster) -> None:
    with narrow.cluster() as cluster:
        cluster.create_all(Base.metadata)
        servers = Servers(narrow)
        numbers = [number_on(cluster, shard) for shard in ("s1", "s2")]

        def commit() -> PreparedSlotsExhausted:
            with cluster.sessionmaker()() as session:
                session.add_all(Account(number=n, balance=1) for n in numbers)
                with pytest.raises(PreparedSlotsExhausted) as caught:
                    session.commit()
                assert isinstance(caught.value, exc.OperationalError)
                assert session.scalars(select(Account)).all() == []
            assert servers.where(BALANCES) == {}
            return caught.value

        with servers.connect("s2") as other:
            other.execute("BEGIN; CREATE TABLE taken (x int)")
            other.execute("PREPARE TRANSACTION 'someone''s'")
            told = str(commit())
            assert "shard s2" in told
            assert "max_prepared_transactions = 1" in told
            assert "1 foreign" in told
            assert "someone" in told
            other.execute("ROLLBACK PREPARED 'someone''s'")
            ours = f"sa1:{cluster.topology.cluster[:8]}:{'0' * 32}:3/1"
            other.execute("BEGIN; CREATE TABLE taken (x int)")
            other.execute(f"PREPARE TRANSACTION '{ours}'")
            assert "1 of this cluster" in str(commit())
            other.execute(f"ROLLBACK PREPARED '{ours}'")
        # With a place free it commits.
        with cluster.sessionmaker().begin() as session:
            session.add_all(Account(number=n, balance=1) for n in numbers)
        assert set(servers.where(BALANCES)) == {"s1", "s2"}
