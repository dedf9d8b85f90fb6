"""The shop on the test servers; only its reference tables outlast a test."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from shop_stage import TRUNCATE, Stage, plain
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from shardalchemy import AsyncShardedSession, Cluster, ShardedSession
from shardalchemy.local import LocalCluster
from shop import data, invariants
from shop.api import create_app
from shop.models import Base


@pytest.fixture(scope="session")
def urls(shard_servers: LocalCluster) -> Mapping[str, str]:
    """A database of its own: other tests have tables of the same names."""
    for url in shard_servers.urls.values():
        with plain(url) as connection:
            connection.execute("CREATE DATABASE shop")
    return {
        name: make_url(url).set(database="shop").render_as_string(hide_password=False)
        for name, url in shard_servers.urls.items()
    }


@pytest.fixture(scope="session")
def cluster(shard_servers: LocalCluster, urls: Mapping[str, str]) -> Iterator[Cluster]:
    cluster = Cluster(dict(urls), redis=shard_servers.redis_url)
    cluster.create_all(Base.metadata)
    data.load_reference(cluster.sessionmaker())
    yield cluster
    cluster.close()


@pytest.fixture
def empty_shop(cluster: Cluster, urls: Mapping[str, str]) -> Cluster:
    for url in urls.values():
        with plain(url) as connection:
            connection.execute(TRUNCATE)
    return cluster


@pytest.fixture
def Session(empty_shop: Cluster) -> sessionmaker[ShardedSession]:
    return empty_shop.sessionmaker()


@pytest.fixture
async def AsyncSession(
    shard_servers: LocalCluster, urls: Mapping[str, str], empty_shop: Cluster
) -> AsyncIterator[async_sessionmaker[AsyncShardedSession]]:
    """Sessions of a cluster that ends with the test, as the test's event loop does."""
    async with Cluster(dict(urls), redis=shard_servers.redis_url) as cluster:
        yield cluster.async_sessionmaker()


@pytest.fixture
def stage(Session: sessionmaker[ShardedSession]) -> Stage:
    return Stage(Session)


@pytest.fixture
async def client(
    AsyncSession: async_sessionmaker[AsyncShardedSession],
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(AsyncSession))
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client


@pytest.fixture
def assert_sound(urls: Mapping[str, str]) -> Callable[[], None]:
    """Assert that every invariant of the shop holds on the servers."""

    def assert_sound() -> None:
        assert [check for check in invariants.check(urls) if not check.ok] == []

    return assert_sound
