"""Pytest fixtures over real servers: ``shard_servers`` and ``shard_cluster``.

Every pytest run in an environment that has shardalchemy imports this module, so it
imports nothing else of the library until a test asks for a fixture.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardalchemy.cluster import Cluster
    from shardalchemy.local import LocalCluster

_OPTIONS = {
    "shard_count": "how many PostgreSQL servers shard_servers starts (default: 4)",
    "shard_postgres_bin": "bin folder of the PostgreSQL that shard_servers starts",
    "shard_redis_server": "program of the Valkey or Redis that shard_servers starts",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add each option to the command line and, under its own name, to the ini file."""
    group = parser.getgroup("shardalchemy")
    for name, explanation in _OPTIONS.items():
        group.addoption(f"--{name.replace('_', '-')}", dest=name, help=explanation)
        parser.addini(name, explanation)


@pytest.fixture(scope="session")
def shard_servers(pytestconfig: pytest.Config) -> Iterator[LocalCluster]:
    """Run PostgreSQL servers and a Valkey for the session; a LocalCluster.

    Each worker of pytest-xdist has its own. Where the programs are not installed the
    tests are skipped, but fail if the variable CI is set.
    """
    from shardalchemy.errors import LocalServerError
    from shardalchemy.local import LocalCluster
    from shardalchemy.local.binaries import find_postgres, find_redis

    postgres = _option(pytestconfig, "shard_postgres_bin")
    redis = _option(pytestconfig, "shard_redis_server")
    try:
        find_postgres(postgres)
        find_redis(redis)
    except LocalServerError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    count = int(_option(pytestconfig, "shard_count") or 4)
    with LocalCluster(count, postgres=postgres, redis=redis) as servers:
        yield servers


@pytest.fixture
def shard_cluster(shard_servers: LocalCluster) -> Iterator[Cluster]:
    """Open a Cluster over ``shard_servers`` for one test; its tables stay."""
    cluster = shard_servers.cluster()
    try:
        yield cluster
    finally:
        cluster.close()


def _option(config: pytest.Config, name: str) -> str | None:
    return config.getoption(name) or config.getini(name) or None
