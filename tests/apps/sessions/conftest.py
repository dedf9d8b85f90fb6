"""The back office on four shards, empty for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import psycopg
import pytest
from sessions_models import Base
from sessions_servers import Servers
from sqlalchemy import create_engine, insert, make_url, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import sessionmaker

from shardalchemy import AsyncShardedSession, Cluster, ShardedSession
from shardalchemy.local import LocalCluster


@pytest.fixture(scope="session")
def office(shard_servers: LocalCluster) -> Iterator[Servers]:
    urls = {}
    for name, url in shard_servers.urls.items():
        address = make_url(url).set(database="office")
        urls[name] = address.render_as_string(hide_password=False)
    with Servers(shard_servers.urls) as servers:
        servers.run("CREATE DATABASE office")
        servers.run("ALTER DATABASE office SET synchronous_commit = off")
    with Servers(urls) as servers:
        yield servers


@pytest.fixture(scope="session")
def office_cluster(shard_servers: LocalCluster, office: Servers) -> Iterator[Cluster]:
    cluster = Cluster(dict(office.urls), redis=shard_servers.redis_url)
    cluster.create_all(Base.metadata)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(office_cluster: Cluster, office: Servers) -> Cluster:
    office.empty(Base.metadata)
    return office_cluster


@pytest.fixture
def servers(cluster: Cluster, office: Servers) -> Servers:
    return office


@pytest.fixture(name="Session")
def session_factory(cluster: Cluster) -> sessionmaker[ShardedSession]:
    return cluster.sessionmaker()


@pytest.fixture
def session(Session: sessionmaker[ShardedSession]) -> Iterator[ShardedSession]:
    with Session() as session:
        yield session


@pytest.fixture(name="AsyncSession")
async def async_session_factory(
    cluster: Cluster, office: Servers
) -> AsyncIterator[async_sessionmaker[AsyncShardedSession]]:
    """Sessions of a cluster that ends with the test's event loop."""
    async with Cluster(dict(office.urls)) as made:
        yield made.async_sessionmaker()


@pytest.fixture(scope="session")
def one_server(shard_servers: LocalCluster) -> Iterator[sessionmaker[PlainSession]]:
    """Plain sessions on one database of one server, for the same tables."""
    url = make_url(next(iter(shard_servers.urls.values())))
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute("CREATE DATABASE office_on_one")
    engine = create_engine(url.set(database="office_on_one"))
    Base.metadata.create_all(engine)
    yield sessionmaker(engine)
    engine.dispose()


@pytest.fixture
def on_one_server(
    Session: sessionmaker[ShardedSession], one_server: sessionmaker[PlainSession]
) -> Callable[[], sessionmaker[PlainSession]]:
    """Copies the rows of all shards to one server; returns sessions there."""

    def copied() -> sessionmaker[PlainSession]:
        with Session() as reading, one_server.begin() as writing:
            for table in reversed(Base.metadata.sorted_tables):
                writing.execute(table.delete())
            for table in Base.metadata.sorted_tables:
                given = [c for c in table.c if c.computed is None]
                rows = reading.execute(select(*given)).mappings().all()
                if rows:
                    writing.execute(insert(table), [dict(row) for row in rows])
        return one_server

    return copied
