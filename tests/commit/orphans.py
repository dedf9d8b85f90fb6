"""What a crashed process leaves behind, made by plain psycopg."""

from __future__ import annotations

from collections.abc import Iterable

from shardalchemy import Cluster
from shardalchemy.commit import Gid
from tests.commit.accounts import number_on
from tests.conftest import Servers


class Orphan:
    """A transaction that adds an account on each of its participants.

    It is undecided until `prepare`, on each participant or on some, has been called.
    """

    def __init__(
        self, cluster: Cluster, servers: Servers, shards: Iterable[str], start: int = 1
    ) -> None:
        topology = cluster.topology
        self.servers = servers
        self.numbers = {s: topology.addresses[s].number for s in shards}
        self.accounts = {s: number_on(cluster, s, start) for s in self.numbers}
        self.gid = Gid.new(topology.cluster, self.numbers.values())

    def prepare(self, *shards: str, balance: int = 1) -> Orphan:
        """Insert the account and the marker and prepare, on these shards."""
        for shard in shards or self.numbers:
            with self.servers.connect(shard) as connection:
                connection.execute("BEGIN")
                connection.execute(
                    "INSERT INTO accounts (number, balance) VALUES (%s, %s)",
                    [self.accounts[shard], balance],
                )
                self.mark(connection)
                connection.execute(f"PREPARE TRANSACTION '{self.branch(shard)}'")
        return self

    def mark(self, connection: object) -> None:
        connection.execute(
            "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'committed')",
            [str(self.gid)],
        )

    def commit(self, *shards: str) -> Orphan:
        """Commit what is prepared on these shards, as a coordinator would."""
        for shard in shards:
            with self.servers.connect(shard) as connection:
                connection.execute(f"COMMIT PREPARED '{self.branch(shard)}'")
        return self

    def branch(self, shard: str) -> str:
        return self.gid.on(self.numbers[shard])

    def is_on(self) -> set[str]:
        """Return the shards that hold its account."""
        return {
            shard
            for shard, number in self.accounts.items()
            if self.servers.rows(
                shard, "SELECT 1 FROM accounts WHERE number = %s", number
            )
        }
