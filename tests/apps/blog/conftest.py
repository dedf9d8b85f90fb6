"""The blog installed three ways: plain, on four shards, on one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from blog_models import Base
from blog_stage import AsyncMaker, Installation, async_sessions, databases
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.orm import Session, dependency, mapper, sessionmaker, unitofwork
from sqlalchemy.orm import session as orm_session
from sqlalchemy.util import OrderedSet, topological

from shardalchemy import Cluster, ShardedSession
from shardalchemy.local import LocalCluster


@pytest.fixture(scope="session")
def plain_blog(shard_servers: LocalCluster) -> Iterator[Installation]:
    urls = databases(shard_servers, "blog_plain")
    home = next(iter(urls.values()))
    engine = create_engine(home)
    Base.metadata.create_all(engine)
    yield Installation(
        "plain",
        urls,
        home,
        engine,
        Session,
        lambda **options: sessionmaker(engine, **options),
        lambda connection, **options: nullcontext(sessionmaker(connection, **options)),
        lambda metadata: metadata.create_all(engine),
    )
    engine.dispose()


@pytest.fixture(scope="session")
def sharded_blog(shard_servers: LocalCluster) -> Iterator[Installation]:
    urls = databases(shard_servers, "blog_sharded")
    with Cluster(dict(urls)) as deployed:
        deployed.create_all(Base.metadata)
    # What the servers are asked is compared: they are to be asked by sessions alone.
    cluster = Cluster(
        dict(urls), redis=shard_servers.redis_url, recover_in_background=False
    )
    with cluster.sessionmaker()() as session:
        engine = session.get_bind()

    @contextmanager
    def join(connection: Connection, **options: Any) -> Iterator[Any]:
        name, *others = urls
        shards: dict[str, Any] = {name: connection, **{o: urls[o] for o in others}}
        with Cluster(shards) as joined:
            yield joined.sessionmaker(**options)

    yield Installation(
        "sharded",
        urls,
        next(iter(urls.values())),
        engine,
        ShardedSession,
        cluster.sessionmaker,
        join,
        cluster.create_all,
    )
    cluster.close()


@pytest.fixture(scope="session")
def engine_blog(shard_servers: LocalCluster) -> Iterator[Installation]:
    urls = databases(shard_servers, "blog_engine")
    home = next(iter(urls.values()))
    engine = create_engine(home)
    cluster = Cluster({"one": engine})
    cluster.create_all(Base.metadata)

    @contextmanager
    def join(connection: Connection, **options: Any) -> Iterator[Any]:
        with Cluster({"one": connection}) as joined:
            yield joined.sessionmaker(**options)

    yield Installation(
        "engine",
        urls,
        home,
        engine,
        ShardedSession,
        cluster.sessionmaker,
        join,
        cluster.create_all,
    )
    cluster.close()
    engine.dispose()


@pytest.fixture(params=["plain", "sharded", "engine"])
def blog(request: pytest.FixtureRequest) -> Installation:
    installation: Installation = request.getfixturevalue(f"{request.param}_blog")
    installation.empty()
    return installation


@pytest.fixture
def make_session(blog: Installation) -> Callable[..., sessionmaker[Any]]:
    """Make a sessionmaker of the installation; takes what ``sessionmaker`` takes."""
    return blog.factory


@pytest.fixture(name="Session")
def session_factory(blog: Installation) -> sessionmaker[Any]:
    return blog.factory()


@pytest.fixture
def session(Session: sessionmaker[Any]) -> Iterator[Any]:
    with Session() as session:
        yield session


@pytest.fixture
def engine(blog: Installation) -> Engine:
    """The engine of the one database that the blog's tables are in."""
    return blog.engine


@pytest.fixture
async def make_async_session(blog: Installation) -> AsyncIterator[AsyncMaker]:
    """Make an async_sessionmaker; its engines end with the test's event loop."""
    async with async_sessions(blog) as make:
        yield make


@pytest.fixture
def settled_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the unit of work use ordered sets: its order then depends on no address."""
    for module in (dependency, mapper, orm_session, topological, unitofwork):
        monkeypatch.setattr(module, "set", OrderedSet, raising=False)
