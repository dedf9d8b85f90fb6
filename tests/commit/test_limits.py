"""What PostgreSQL cannot prepare, or not now, and what an application is told then."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    exc,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.schema import CreateTable

from shardalchemy import (
    Cluster,
    PreparedSlotsExhausted,
    UnsupportedQueryError,
)
from shardalchemy.commit import Gid
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


# -- names, databases and roles ------------------------------------------------------


def test_a_name_has_room_for_many_participants() -> None:
    """PostgreSQL takes 200 bytes, of which the last is not to be used."""
    for count in (2, 64, 500):
        gid = Gid.new("0eda8357-0000-0000-0000-000000000000", range(count))
        name = gid.on(count - 1)
        assert len(name) < 200
        assert Gid.parse(name) == gid


def test_two_databases_of_one_server_are_two_shards(
    empty_servers: Servers,
) -> None:
    """Each has its own part, under a name of its own in the server's one list."""
    url = empty_servers.local.urls["s1"]
    other = url.removesuffix("/postgres") + "/second"
    with empty_servers.connect("s1") as connection:
        connection.execute("CREATE DATABASE second")
    try:
        with Cluster({"a": url, "b": other}, recover_in_background=False) as cluster:
            cluster.create_all(Base.metadata)
            numbers = [number_on(cluster, shard) for shard in ("a", "b")]
            with cluster.sessionmaker()() as session:
                session.add_all(Account(number=n, balance=1) for n in numbers)
                session.commit()
                assert len(session.scalars(select(Account)).all()) == 2
            # What another database has prepared is neither touched nor in the way.
            gid = Gid.new(cluster.topology.cluster, (0, 1))
            with psycopg.connect(other.replace("+psycopg", "")) as connection:
                connection.autocommit = True
                connection.execute("BEGIN; CREATE TABLE taken (x int)")
                connection.execute(f"PREPARE TRANSACTION '{gid.on(0)}'")
                report = cluster.recover(grace=0)
                assert report.committed == ()
                rows = connection.execute("SELECT gid FROM pg_prepared_xacts")
                assert rows.fetchall() == [(gid.on(0),)]
                connection.execute(f"ROLLBACK PREPARED '{gid.on(0)}'")
    finally:
        with empty_servers.connect("s1") as connection:
            connection.execute("DROP DATABASE second WITH (FORCE)")


def test_another_roles_transaction_stays_in_doubt_and_says_why(
    bank: Cluster, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    gid = Gid.new(bank.topology.cluster, (0, 1))
    for number, shard in enumerate(("s1", "s2")):
        with servers.connect(shard) as connection:
            connection.execute("BEGIN")
            connection.execute(
                "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'committed')",
                [str(gid)],
            )
            connection.execute(f"PREPARE TRANSACTION '{gid.on(number)}'")
    servers.run(
        "CREATE ROLE teller LOGIN PASSWORD 'teller';"
        "GRANT USAGE ON SCHEMA shardalchemy TO teller;"
        "GRANT ALL ON ALL TABLES IN SCHEMA shardalchemy TO teller"
    )
    urls = {
        shard: make_url(url).set(username="teller", password="teller")
        for shard, url in servers.local.urls.items()
    }
    try:
        with Cluster(urls, recover_in_background=False) as other:
            start = time.monotonic()
            assert other.recover(grace=0).in_doubt == (str(gid),)
            assert time.monotonic() - start < 5
            refused = [r for r in caplog.records if "permission denied" in r.message]
            assert len(refused) == 2
        assert set(servers.prepared()) == {"s1", "s2"}
        assert bank.recover(grace=0).committed == (str(gid),)
    finally:
        servers.run("DROP OWNED BY teller; DROP ROLE teller")


def test_a_role_with_the_privileges_of_the_documentation_can_do_all(
    bank: Cluster, servers: Servers
) -> None:
    text_ = Path("docs/operating.md").read_text()
    ((block,),) = [re.findall(r"```sql\n(.*?)```", text_, re.DOTALL)]
    servers.run(
        "CREATE ROLE app LOGIN PASSWORD 'app';"
        "GRANT USAGE ON SCHEMA public TO app;"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON accounts TO app; {block}"
    )
    urls = {
        shard: make_url(url).set(username="app", password="app")
        for shard, url in servers.local.urls.items()
    }
    numbers = [number_on(bank, shard) for shard in servers]
    try:
        with Cluster(urls, recover_in_background=False) as cluster:
            for ack in ("committed", "prepared"):
                with cluster.sessionmaker(ack=ack)() as session:
                    for number in numbers:
                        session.merge(Account(number=number, balance=1))
                    session.commit()
                    session.get_one(Account, numbers[0]).balance += 1
                    session.commit()
            for strict in (False, True):
                with cluster.snapshot(strict=strict) as snapshot:
                    assert snapshot.scalar(select(func.sum(Account.balance))) == 5
            topology = cluster.topology
            gid = Gid.new(topology.cluster, [0, 1])
            for number, shard in enumerate(("s1", "s2")):
                url = urls[shard].set(drivername="postgresql")
                with psycopg.connect(
                    url.render_as_string(hide_password=False), autocommit=True
                ) as connection:
                    connection.execute(
                        "BEGIN; INSERT INTO shardalchemy.txn (gid, outcome)"
                        f" VALUES ('{gid}', 'committed');"
                        f" PREPARE TRANSACTION '{gid.on(number)}'"
                    )
            assert cluster.recover(grace=0).committed == (str(gid),)
            housekeeping = cluster._transactions.housekeeping
            housekeeping.clean(age=0)
            assert housekeeping.clean(age=0) > 0
    finally:
        bank.close()
        servers.run("DROP OWNED BY app; DROP ROLE app")


# -- settings of the application, and what it does in a transaction --------------------


def test_a_prepare_that_is_cancelled_is_definite(
    bank: Cluster, servers: Servers
) -> None:
    """In its deferred triggers, which statement_timeout does not bound."""
    servers.run(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(5); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON accounts"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    options = {"options": "-c lock_timeout=100 -c statement_timeout=300"}
    with (
        servers.local.cluster(connect_args=options) as cluster,
        cluster.sessionmaker()() as session,
    ):
        session.add_all(
            Account(number=number_on(bank, s), balance=1) for s in ("s1", "s2")
        )
        session.flush()
        client = threading.Timer(0.5, cancel_all, [servers])
        client.start()
        with pytest.raises(exc.OperationalError, match="canceling statement"):
            session.commit()
        client.join()
        assert session.scalars(select(Account)).all() == []
    assert servers.where(BALANCES) == {}
    assert servers.prepared() == {}


def cancel_all(servers: Servers) -> None:
    """Cancel what runs, as an administrator may: PREPARE has no statement_timeout."""
    servers.run(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
        " WHERE state = 'active' AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )


def test_timeouts_of_the_application_do_not_keep_recovery_from_its_work(
    bank: Cluster, servers: Servers
) -> None:
    options = {
        "options": "-c lock_timeout=50 -c statement_timeout=500"
        " -c idle_in_transaction_session_timeout=100"
    }
    gid = Gid.new(bank.topology.cluster, (0, 1))
    with servers.connect("s1") as connection:
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'committed')",
            [str(gid)],
        )
        connection.execute(f"PREPARE TRANSACTION '{gid.on(0)}'")
    with servers.connect("s2") as slow:
        # This participant is between its marker and PREPARE for a while.
        slow.execute("BEGIN")
        slow.execute(
            "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'committed')",
            [str(gid)],
        )
        ending = threading.Timer(1.0, slow.execute, ["ROLLBACK"])
        ending.start()
        with servers.local.cluster(
            connect_args=options, recover_in_background=False
        ) as cluster:
            assert cluster.recover(grace=0).rolled_back == (str(gid),)
        ending.join()
    assert servers.prepared() == {}


def test_tables_are_made_and_filled_on_all_shards_in_one_transaction(
    bank: Cluster, servers: Servers
) -> None:
    with bank.sessionmaker()() as session:
        for shard in servers:
            session.execute(text("CREATE TABLE made (x int)"), **on(shard))
            session.execute(
                text("INSERT INTO made SELECT generate_series(1, 20000)"), **on(shard)
            )
        session.commit()
    assert servers.where("SELECT count(*) FROM made") == {
        shard: [(20000,)] for shard in servers
    }
    servers.run("DROP TABLE made")


def test_a_transaction_without_a_write_prepares_nothing(
    bank: Cluster, servers: Servers
) -> None:
    servers.run("DELETE FROM shardalchemy.txn")
    with bank.sessionmaker()() as session:
        session.execute(select(Account))
        # An UPDATE that finds no row assigns no transaction id.
        session.execute(text("UPDATE notes SET text = ''"))
        session.commit()
    assert servers.where("SELECT gid FROM shardalchemy.txn") == {}
