"""The back office on four shards, empty for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from sessions_models import Base
from sessions_servers import Servers
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import async_sessionmaker
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
