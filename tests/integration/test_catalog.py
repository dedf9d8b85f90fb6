"""The catalog on real servers: setting up, ownership, and what is refused."""

from __future__ import annotations

import datetime
import random
import uuid
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    exc,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql import dialect

from shardalchemy import (
    CatalogVersionError,
    Cluster,
    ConfigurationError,
    DeclarationError,
    UnknownShardError,
    UnsupportedQueryError,
    reference_table,
    sharded_by,
)
from shardalchemy.catalog import CATALOG_VERSION
from shardalchemy.ids import LOCATOR_SLOT_SQL, locator_slot, new_locator
from shardalchemy.schema import placement_of
from tests.conftest import Servers


def model() -> tuple[MetaData, Table, Table, Table]:
    metadata = MetaData()
    items = Table(
        "items",
        metadata,
        Column("id", BigInteger, primary_key=True, autoincrement=False),
        Column("name", Text),
        info=sharded_by("id"),
    )
    colours = Table(
        "colours",
        metadata,
        Column("code", Text, primary_key=True),
        info=reference_table(),
    )
    notes = Table("notes", metadata, Column("id", Integer, primary_key=True))
    return metadata, items, colours, notes


def tables_on(servers: Servers, shard: str) -> set[str]:
    rows = servers.rows(
        shard, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    )
    return {name for (name,) in rows}


def test_create_all_makes_each_table_where_it_belongs(
    cluster: Cluster, servers: Servers
) -> None:
    metadata, *_ = model()
    cluster.create_all(metadata)
    cluster.create_all(metadata)  # again, to no effect
    assert tables_on(servers, "s1") == {"items", "colours", "notes"}
    for shard in ("s2", "s3", "s4"):
        assert tables_on(servers, shard) == {"items", "colours"}
    epochs = servers.where("SELECT epoch FROM shardalchemy.topology")
    assert epochs == {shard: [(1,)] for shard in servers}
    documents = servers.where("SELECT document::text FROM shardalchemy.topology")
    assert len({rows[0] for rows in documents.values()}) == 1


async def test_create_all_in_an_event_loop(cluster: Cluster, servers: Servers) -> None:
    metadata, *_ = model()
    await cluster.create_all_async(metadata)
    await cluster.aclose()
    assert tables_on(servers, "s4") == {"items", "colours"}


def test_two_processes_may_set_up_at_once(empty_servers: Servers) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def set_up(_: int) -> str:
        with empty_servers.local.cluster() as cluster:
            cluster.create_all(model()[0])
            return cluster.topology.cluster

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(set_up, range(4)))) == 1


def test_a_row_sent_to_the_wrong_shard_by_plain_sql_is_refused(
    cluster: Cluster, servers: Servers
) -> None:
    metadata, items, *_ = model()
    cluster.create_all(metadata)
    for number in range(-20, 20):
        for shard in servers:
            with servers.connect(shard) as connection:
                statement = "INSERT INTO items VALUES (%s, 'by hand')"
                if shard == cluster.shard_for(items, number):
                    connection.execute(statement, [number])
                else:
                    with pytest.raises(
                        psycopg.errors.CheckViolation, match="shardalchemy_owner"
                    ):
                        connection.execute(statement, [number])
    held = servers.where("SELECT count(*) FROM items")
    assert sum(rows[0][0] for rows in held.values()) == 40


def test_an_update_that_would_move_a_row_is_refused(
    cluster: Cluster, servers: Servers
) -> None:
    metadata, items, *_ = model()
    cluster.create_all(metadata)
    here = cluster.shard_for(items, 1)
    elsewhere = next(n for n in range(2, 99) if cluster.shard_for(items, n) != here)
    with servers.connect(here) as connection:
        connection.execute("INSERT INTO items VALUES (1)")
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("UPDATE items SET id = %s", [elsewhere])


KEYS: dict[str, tuple[Any, Any]] = {
    "smallint": (SmallInteger(), lambda r: r.randint(-(2**15), 2**15 - 1)),
    "integer": (Integer(), lambda r: r.randint(-(2**31), 2**31 - 1)),
    "bigint": (BigInteger(), lambda r: r.randint(-(2**63), 2**63 - 1)),
    "text": (
        Text(),
        lambda r: "".join(r.choices("aé漢😀 Z'%\\", k=r.randint(0, 40))),
    ),
    "varchar": (String(60), lambda r: str(r.random())),
    "uuid": (Uuid(), lambda r: uuid.UUID(int=r.getrandbits(128))),
    "bytea": (LargeBinary(), lambda r: r.randbytes(r.randint(0, 40))),
    "date": (
        Date(),
        lambda r: datetime.date.fromordinal(
            r.randint(1, datetime.date.max.toordinal())
        ),
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_python_and_postgresql_agree_on_every_key(name: str, servers: Servers) -> None:
    type_, make = KEYS[name]
    table = Table(
        "t", MetaData(), Column("k", type_, primary_key=True), info=sharded_by("k")
    )
    pin = placement_of(table).pin
    assert pin is not None
    rng = random.Random(name)
    values = [make(rng) for _ in range(400)]
    if name in ("smallint", "integer", "bigint"):
        values += [0, -1, 1]
    cast = f"%s::{type_.compile(dialect())}"
    with servers.connect("s1") as connection:
        for value in values:
            sql = f"SELECT {pin.slot_sql.format('v.v')} FROM (SELECT {cast}) AS v(v)"
            (slot,) = connection.execute(sql, [value]).fetchone() or (None,)
            assert slot == pin.slot(value), value


def test_python_and_postgresql_agree_on_locators(servers: Servers) -> None:
    with servers.connect("s1") as connection:
        for slot in (0, 1, 2047, 4095):
            sql = f"SELECT {LOCATOR_SLOT_SQL.format('v.v')} FROM (SELECT %s) AS v(v)"
            value = new_locator(slot)
            assert value.version == 7
            assert locator_slot(value) == slot
            assert connection.execute(sql, [value]).fetchone() == (slot,)


def test_a_newer_catalog_is_refused(cluster: Cluster, servers: Servers) -> None:
    cluster.create_all(model()[0])
    servers.run("UPDATE shardalchemy.catalog SET version = 99")
    with (
        servers.local.cluster() as other,
        pytest.raises(CatalogVersionError, match=r"version 99.*Upgrade"),
    ):
        other.topology  # noqa: B018


def test_an_older_catalog_is_brought_up_to_date_by_create_all(
    cluster: Cluster, servers: Servers
) -> None:
    metadata = model()[0]
    cluster.create_all(metadata)
    servers.run(
        "ALTER TABLE shardalchemy.txn DROP COLUMN xid;"
        "INSERT INTO shardalchemy.txn VALUES ('kept', 'committed');"
        "UPDATE shardalchemy.catalog SET version = 1"
    )
    with servers.local.cluster() as other:
        with pytest.raises(CatalogVersionError, match=r"older version.*create_all"):
            other.topology  # noqa: B018
        other.create_all(metadata)
        assert other.topology == cluster.topology
    held = servers.where(
        "SELECT gid, xid IS NULL, version FROM shardalchemy.txn, shardalchemy.catalog"
        " WHERE gid = 'kept'"
    )
    assert held == {s: [("kept", False, CATALOG_VERSION)] for s in servers}


def test_two_names_for_one_database_are_refused(empty_servers: Servers) -> None:
    url = empty_servers.local.urls["s1"]
    with (
        Cluster({"a": url, "b": url}) as cluster,
        pytest.raises(ConfigurationError, match="b is the same database as one of a"),
    ):
        cluster.create_all(model()[0])


def test_exchanged_urls_are_refused(cluster: Cluster, servers: Servers) -> None:
    cluster.create_all(model()[0])
    urls = dict(servers.local.urls)
    urls["s1"], urls["s2"] = urls["s2"], urls["s1"]
    with (
        Cluster(urls) as other,
        pytest.raises(ConfigurationError, match=r"given as shard s1 says .* shard s2"),
    ):
        other.topology  # noqa: B018


def test_a_missing_shard_is_named(cluster: Cluster, servers: Servers) -> None:
    cluster.create_all(model()[0])
    urls = {s: u for s, u in servers.local.urls.items() if s != "s3"}
    with (
        Cluster(urls) as other,
        pytest.raises(ConfigurationError, match="also has shard s3"),
    ):
        other.topology  # noqa: B018


def test_a_cluster_that_was_never_created_says_so(cluster: Cluster) -> None:
    with (
        cluster.sessionmaker()() as session,
        pytest.raises(ConfigurationError, match="create_all"),
    ):
        session.scalar(select(1))


def test_the_order_of_urls_does_not_matter(cluster: Cluster, servers: Servers) -> None:
    cluster.create_all(model()[0])
    urls = dict(reversed(servers.local.urls.items()))
    with Cluster(urls) as other:
        assert other.topology == cluster.topology
        assert other.topology.home == "s1"
        assert other.topology.shards == ("s1", "s2", "s3", "s4")


def test_rows_that_belong_elsewhere_keep_a_table_from_being_taken_over(
    cluster: Cluster, servers: Servers
) -> None:
    metadata, *_ = model()
    servers.run("CREATE TABLE items (id bigint PRIMARY KEY, name text)")
    with servers.connect("s2") as connection:
        connection.execute("INSERT INTO items SELECT generate_series(1, 50)")
    with pytest.raises(exc.IntegrityError, match="shardalchemy_owner"):
        cluster.create_all(metadata)
    # Nothing was changed anywhere.
    assert (
        servers.where("SELECT 1 FROM pg_namespace WHERE nspname = 'shardalchemy'") == {}
    )


def test_a_nondeterministic_collation_is_refused(
    cluster: Cluster, servers: Servers
) -> None:
    for shard in servers:
        with servers.connect(shard) as connection:
            try:
                connection.execute(
                    "CREATE COLLATION fold (provider = icu, deterministic = false,"
                    " locale = 'und-u-ks-level2')"
                )
            except psycopg.errors.FeatureNotSupported:
                pytest.skip("this PostgreSQL is built without ICU")
    metadata = MetaData()
    Table(
        "t",
        metadata,
        Column("k", Text(collation="fold"), primary_key=True),
        info=sharded_by("k"),
    )
    with pytest.raises(DeclarationError, match="nondeterministic collation"):
        cluster.create_all(metadata)


def test_quoted_names_and_schemas(cluster: Cluster, servers: Servers) -> None:
    servers.run('CREATE SCHEMA "My Schema"')
    metadata = MetaData(schema="My Schema")
    parent = Table(
        "Sel%ect",
        metadata,
        Column("Key Of", BigInteger, primary_key=True, key="key", autoincrement=False),
        info=sharded_by("key"),
    )
    Table(
        "child",
        metadata,
        Column("k", ForeignKey(parent.c.key), primary_key=True),
        Column("n", Integer, primary_key=True),
        info=sharded_by("k"),
    )
    cluster.create_all(metadata)
    cluster.create_all(metadata)
    with cluster.sessionmaker().begin() as session:
        session.execute(insert(parent).values(key=5))
        assert session.scalars(select(parent.c.key)).all() == [5]
    held = servers.where('SELECT "Key Of" FROM "My Schema"."Sel%ect"')
    assert held == {cluster.shard_for(parent, 5): [(5,)]}
    servers.run('DROP SCHEMA "My Schema" CASCADE')


def test_plain_sql_over_sharded_tables_is_refused_unless_routed(
    cluster: Cluster, servers: Servers
) -> None:
    from sqlalchemy import text

    metadata, items, *_ = model()
    cluster.create_all(metadata)
    with cluster.sessionmaker().begin() as session:
        session.execute(insert(items).values(id=5, name="five"))
    # Another process, which has not seen the models.
    with servers.local.cluster() as other, other.sessionmaker()() as session:
        assert session.scalar(text("SELECT 1")) == 1
        statement = text("SELECT name FROM Items WHERE id = 5")
        with pytest.raises(UnsupportedQueryError, match="textual SQL names items"):
            session.scalar(statement)
        routed = {"execution_options": {"shard_key": 5}}
        assert session.scalar(statement, **routed) == "five"
        shard = cluster.shard_for(items, 5)
        assert session.scalar(statement.execution_options(shard=shard)) == "five"
        with pytest.raises(UnknownShardError, match="no shard 's9'"):
            session.scalar(statement.execution_options(shard="s9"))


def test_a_reflected_table_does_not_pass_for_a_home_table(
    cluster: Cluster, servers: Servers
) -> None:
    cluster.create_all(model()[0])
    reflected = Table(
        "items", MetaData(), autoload_with=cluster._shards.sync("s1").engine
    )
    with cluster.sessionmaker()() as session:
        with pytest.raises(UnsupportedQueryError, match="has no info=sharded_by"):
            session.execute(select(reflected))
        session.execute(select(reflected), execution_options={"shard": "s1"})
