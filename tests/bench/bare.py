"""The servers' own time: the same commands on bare psycopg.

No session, no pool, no object: each round is sent to all servers before any reply is
read. It is the least that a client can take on this machine.
"""

from __future__ import annotations

import select
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg import generators
from psycopg.adapt import Transformer
from psycopg.pq.abc import PGconn, PGresult

from tests.bench.peers import Peers

__all__ = ["Bare", "BareCommits", "BareReads"]


class Bare:
    """A connection to each shard, as in a loop written for nothing else."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.connections: Mapping[str, psycopg.Connection] = {
            shard: psycopg.connect(
                engine.url.set(drivername="postgresql").render_as_string(False),
                autocommit=True,
            )
            for shard, engine in peers.engines.items()
        }

    def _round(
        self, sends: Mapping[str, Callable[[PGconn], None]]
    ) -> dict[str, PGresult]:
        """Send to all, then wait for all; return each shard's last result."""
        poll = select.poll()
        waiting = {}
        for shard, send in sends.items():
            send(self.connections[shard].pgconn)
        for shard in sends:
            connection = self.connections[shard]
            running = generators.execute(connection.pgconn)
            next(running)
            waiting[connection.fileno()] = (shard, running)
            poll.register(connection.fileno(), select.POLLIN)
        results = {}
        while waiting:
            for descriptor, _ in poll.poll():
                shard, running = waiting[descriptor]
                try:
                    running.send(1)
                except StopIteration as stop:
                    poll.unregister(descriptor)
                    del waiting[descriptor]
                    results[shard] = stop.value[-1]
        return results

    def send(self, commands: Mapping[str, str]) -> None:
        """Send each of its shards a command, and wait for all."""
        self._round(
            {
                shard: lambda pgconn, command=command: pgconn.send_query(
                    command.encode()
                )
                for shard, command in commands.items()
            }
        )

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()


class BareCommits(Bare):
    """The commit protocol's commands."""

    def commit(self, shards: list[str], turn: int) -> float:
        """Return the seconds of committing one update on each of *shards*."""
        for shard in shards:
            connection = self.connections[shard]
            connection.execute("BEGIN")
            connection.execute(
                "UPDATE bench_items SET stock = stock + 1 WHERE id = %s",
                [self._peers.ids[shard][turn % 500]],
            )
        gid = f"bench-{uuid.uuid4()}"
        start = time.perf_counter()
        if len(shards) == 1:
            self.send({shards[0]: "COMMIT"})
        else:
            marker = f"INSERT INTO shardalchemy.txn VALUES ('{gid}', 'committed');"
            self.send({s: f"{marker} PREPARE TRANSACTION '{gid}/{s}'" for s in shards})
            self.send({s: f"COMMIT PREPARED '{gid}/{s}'" for s in shards})
        return time.perf_counter() - start


class BareReads(Bare):
    """One prepared statement on every server at once; nothing is merged."""

    def __init__(self, peers: Peers) -> None:
        super().__init__(peers)
        self._prepared: dict[str, bytes] = {}

    def read(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of all servers, one server's after another's."""
        name = self._prepared.get(sql) or self._prepare(sql)
        results = self._round(
            dict.fromkeys(
                self.connections, lambda pgconn: pgconn.send_query_prepared(name, None)
            )
        )
        rows: list[tuple[Any, ...]] = []
        for shard, result in results.items():
            reading = Transformer(self.connections[shard])
            reading.set_pgresult(result)
            rows += reading.load_rows(0, result.ntuples, tuple)
        return rows

    def _prepare(self, sql: str) -> bytes:
        name = self._prepared[sql] = f"bare_{len(self._prepared)}".encode()
        for connection in self.connections.values():
            connection.pgconn.prepare(name, sql.encode())
        return name
