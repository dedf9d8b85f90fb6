"""Fixtures of the whole suite, over the servers of ``shardalchemy.local``."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import settings

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster

# How long an example takes says nothing on a machine that runs servers as well.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


class Servers:
    """Plain SQL on each server, past shardalchemy."""

    def __init__(self, local: LocalCluster) -> None:
        self.local = local

    def __iter__(self) -> Iterator[str]:
        return iter(self.local.urls)

    def connect(self, shard: str) -> psycopg.Connection:
        url = self.local.urls[shard].replace("+psycopg", "")
        return psycopg.connect(url, autocommit=True)

    def rows(self, shard: str, sql: str, *parameters: object) -> list[tuple]:
        with self.connect(shard) as connection:
            return connection.execute(sql, parameters or None).fetchall()

    def where(self, sql: str, *parameters: object) -> dict[str, list[tuple]]:
        """Return what *sql* gives on each server where it gives anything."""
        found = {shard: self.rows(shard, sql, *parameters) for shard in self}
        return {shard: rows for shard, rows in found.items() if rows}

    def run(self, sql: str) -> None:
        for shard in self:
            with self.connect(shard) as connection:
                connection.execute(sql)

    def prepared(self) -> dict[str, list[tuple]]:
        return self.where("SELECT gid FROM pg_prepared_xacts")


@pytest.fixture(scope="session")
def servers(shard_servers: LocalCluster) -> Servers:
    return Servers(shard_servers)


@pytest.fixture
def empty_servers(servers: Servers) -> Iterator[Servers]:
    """Every server without any table of ours, before and after."""
    wipe(servers)
    yield servers
    wipe(servers)


def roll_back_prepared(servers: Servers) -> None:
    for shard, rows in servers.prepared().items():
        with servers.connect(shard) as connection:
            for (gid,) in rows:
                connection.execute(f"ROLLBACK PREPARED '{gid}'")


def wipe(servers: Servers) -> None:
    roll_back_prepared(servers)
    servers.run(
        "DROP SCHEMA IF EXISTS shardalchemy CASCADE;"
        "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
    )


@pytest.fixture
def cluster(empty_servers: Servers) -> Iterator[Cluster]:
    with empty_servers.local.cluster() as made:
        yield made
