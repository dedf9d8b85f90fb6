"""What a process does for the transactions of its cluster.

One object holds the parts that share connections and counters: it commits over several
shards, finishes what nobody waits for, recovers what others have left. Threads start
with the first that needs them, and end with `close`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardalchemy.commit.counters import Counters
from shardalchemy.commit.driver import Ack, Commit, CommitDriver
from shardalchemy.commit.finisher import Finisher
from shardalchemy.commit.housekeeping import Housekeeping
from shardalchemy.commit.indoubt import InDoubt
from shardalchemy.commit.patrol import Patrol
from shardalchemy.commit.recovery import Recovery, RecoveryReport
from shardalchemy.commit.snapshot import Snapshots
from shardalchemy.commit.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import psycopg
    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology
    from shardalchemy.commit.waits import WaitingSession

__all__ = ["Transactions"]


class Transactions:
    """The transactions of one cluster, as this process sees to them.

    ``connect`` opens a connection to a shard that no session is kept waiting for, and
    ``connect_beside`` one that comes from no pool; ``topology`` returns the current
    one, and ``sessions`` those that there are of the cluster.
    """

    def __init__(
        self,
        connect: Callable[[str], Connection],
        topology: Callable[[], Topology],
        connect_beside: Callable[[str], psycopg.Connection[Any]],
        sessions: Callable[[], Iterator[WaitingSession]],
    ) -> None:
        self.counters = Counters()
        self.finisher = Finisher(connect)
        self.recovery = Recovery(connect, topology, self.counters)
        self.housekeeping = Housekeeping(connect, topology)
        self.patrol = Patrol(self)
        in_doubt = InDoubt(self.recovery, lambda: topology().cluster, self.counters)
        self.waits = Waits(sessions, connect_beside, topology, in_doubt, self.counters)
        self.snapshots = Snapshots(self.counters, self.recovery)
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
        self.waits.close()
        self.patrol.close()
        self.finisher.close()
