"""The ways to install the blog, and what they have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import blog_listeners
import psycopg
from blog_models import Base
from sqlalchemy import Engine, MetaData, make_url
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster

# DELETE is faster than TRUNCATE on tables of a few rows: no file is made anew.
EMPTY = "".join(
    [
        "UPDATE comment SET parent_id = NULL;",
        *(f"DELETE FROM {t.name};" for t in reversed(Base.metadata.sorted_tables)),
        "SELECT setval(c.oid::regclass, s.seqstart, false)"
        " FROM pg_class AS c JOIN pg_sequence AS s ON s.seqrelid = c.oid",
    ]
)


def run(url: str, statement: str) -> None:
    """Send one statement outside of any transaction."""
    address = make_url(url).set(drivername="postgresql")
    with psycopg.connect(
        address.render_as_string(hide_password=False), autocommit=True
    ) as connection:
        connection.execute(statement)


@dataclass
class Installation:
    """One way to run the blog; ``base`` is what a session class derives from."""

    name: str
    urls: dict[str, str]
    home_url: str
    engine: Engine
    base: type[Session]
    make: Callable[..., Any]
    join: Callable[..., Any]
    create: Callable[[MetaData], None]

    def factory(self, *, listeners: bool = True, **options: Any) -> sessionmaker[Any]:
        """Return a sessionmaker, with the blog's listeners on it."""
        made = self.make(**options)
        if listeners:
            blog_listeners.listen(made)
        return made

    def empty(self) -> None:
        """Empty all tables, and let all ids count from the start again."""
        run(self.home_url, EMPTY)


def databases(servers: LocalCluster, name: str) -> dict[str, str]:
    """Create a database on every server; return their URLs."""
    urls = {}
    for shard, url in servers.urls.items():
        run(url, f"CREATE DATABASE {name}")
        run(url, f"ALTER DATABASE {name} SET synchronous_commit = off")
        urls[shard] = (
            make_url(url).set(database=name).render_as_string(hide_password=False)
        )
    return urls


AsyncMaker = Callable[..., async_sessionmaker[Any]]


@asynccontextmanager
async def async_sessions(installation: Installation) -> AsyncIterator[AsyncMaker]:
    """Make async sessionmakers whose engines end with the block."""
    if installation.name == "sharded":
        async with Cluster(dict(installation.urls)) as cluster:
            yield cluster.async_sessionmaker
        return
    engine = create_async_engine(installation.home_url)
    if installation.name == "engine":
        async with Cluster({"one": engine}) as cluster:
            yield cluster.async_sessionmaker
    else:
        yield lambda **options: async_sessionmaker(engine, **options)
    await engine.dispose()
