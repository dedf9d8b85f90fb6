"""The commit protocol's own commands on bare psycopg: what the servers cost.

No session, no pool, no object: each round is sent to all servers before any reply is
read. It is the least that a client can take on this machine.
"""

from __future__ import annotations

import select
import time
import uuid
from collections.abc import Mapping

import psycopg
from psycopg import generators

from tests.bench.peers import Peers

__all__ = ["BareCommits"]


class BareCommits:
    """A connection to each shard, as in a loop written for nothing else."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._connections: Mapping[str, psycopg.Connection] = {
            shard: psycopg.connect(
                engine.url.set(drivername="postgresql").render_as_string(False),
                autocommit=True,
            )
            for shard, engine in peers.engines.items()
        }

    def commit(self, shards: list[str], turn: int) -> float:
        """Return the seconds of committing one update on each of *shards*."""
        for shard in shards:
            connection = self._connections[shard]
            connection.execute("BEGIN")
            connection.execute(
                "UPDATE bench_items SET stock = stock + 1 WHERE id = %s",
                [self._peers.ids[shard][turn % 500]],
            )
        gid = f"bench-{uuid.uuid4()}"
        start = time.perf_counter()
        if len(shards) == 1:
            self._round({shards[0]: "COMMIT"})
        else:
            marker = f"INSERT INTO shardalchemy.txn VALUES ('{gid}', 'committed');"
            self._round(
                {s: f"{marker} PREPARE TRANSACTION '{gid}/{s}'" for s in shards}
            )
            self._round({s: f"COMMIT PREPARED '{gid}/{s}'" for s in shards})
        return time.perf_counter() - start

    def _round(self, commands: Mapping[str, str]) -> None:
        poll = select.poll()
        waiting = {}
        for shard, command in commands.items():
            self._connections[shard].pgconn.send_query(command.encode())
        for shard in commands:
            connection = self._connections[shard]
            running = generators.execute(connection.pgconn)
            next(running)
            waiting[connection.fileno()] = running
            poll.register(connection.fileno(), select.POLLIN)
        while waiting:
            for descriptor, _ in poll.poll():
                try:
                    waiting[descriptor].send(1)
                except StopIteration:
                    poll.unregister(descriptor)
                    del waiting[descriptor]

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
