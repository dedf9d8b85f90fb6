"""What a process does for the transactions of its cluster.

One object holds the parts that share connections and counters: it commits over several
shards, finishes what nobody waits for, recovers what others have left. Threads start
with the first that needs them, and end with `close`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardalchemy.commit.counters import Counters
from shardalchemy.commit.driver import Ack, Commit, CommitDriver
from shardalchemy.commit.finisher import Finisher
from shardalchemy.commit.housekeeping import Housekeeping
from shardalchemy.commit.patrol import Patrol
from shardalchemy.commit.recovery import Recovery, RecoveryReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = ["Transactions"]


class Transactions:
    """The transactions of one cluster, as this process sees to them.

    ``connect`` opens a connection to a shard; ``topology`` returns the current one.
    """

    def __init__(
        self, connect: Callable[[str], Connection], topology: Callable[[], Topology]
    ) -> None:
        self.counters = Counters()
        self.finisher = Finisher(connect)
        self.recovery = Recovery(connect, topology, self.counters)
        self.housekeeping = Housekeeping(connect, topology)
        self.patrol = Patrol(self)
        self._driver = CommitDriver(self.finisher, self.recovery, self.counters)

    def commit(
        self, topology: Topology, connections: Mapping[str, Connection], ack: Ack
    ) -> Commit:
        """Commit the open transactions of *connections*, which all have written."""
        numbers = {name: topology.addresses[name].number for name in connections}
        return self._driver.commit(topology.cluster, numbers, connections, ack)

    def commit_alone(
        self, topology: Topology, shard: str, connection: Connection
    ) -> None:
        """Commit the open transaction of one connection, which has written."""
        number = topology.addresses[shard].number
        self._driver.commit_alone(topology.cluster, number, shard, connection)

    def recover(self, grace: float) -> RecoveryReport:
        """Resolve every transaction that was prepared over *grace* seconds ago."""
        return self.recovery.recover(grace)

    def close(self) -> None:
        """Finish what is pending, and end the threads."""
        self.patrol.close()
        self.finisher.close()
