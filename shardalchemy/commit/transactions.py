"""What a process does for the transactions of its cluster.

One object holds the parts that share connections and counters: it commits over several
shards, finishes what nobody waits for, recovers what others have left. Threads start
with the first that needs them, and end with `close`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardalchemy.commit.counters import Counters
from shardalchemy.commit.driver import Ack, CommitDriver
from shardalchemy.commit.finisher import Finisher
from shardalchemy.commit.recovery import Recovery, RecoveryReport
from shardalchemy.commit.snapshot import Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = ["Transactions"]


class Transactions:
    """The cross-shard transactions of one cluster, as this process sees to them.

    ``connect`` opens a connection to a shard; ``topology`` returns the current one.
    """

    def __init__(
        self, connect: Callable[[str], Connection], topology: Callable[[], Topology]
    ) -> None:
        self.counters = Counters()
        self.finisher = Finisher(connect)
        self.recovery = Recovery(connect, topology)
        self.snapshots = Snapshots(self.counters)
        self._driver = CommitDriver(self.finisher, self.recovery)

    def commit(
        self, topology: Topology, connections: Mapping[str, Connection], ack: Ack
    ) -> Future[None] | None:
        """Commit the open transactions of *connections*, which all have written.

        Returns, with ``ack="prepared"``, what is done when every shard has committed.
        """
        numbers = {name: topology.addresses[name].number for name in connections}
        done = self._driver.commit(topology.cluster, numbers, connections, ack)
        self.counters.add(f"commits.{len(connections)}")
        return done

    def recover(self, grace: float) -> RecoveryReport:
        """Resolve every transaction that was prepared over *grace* seconds ago."""
        return self.recovery.recover(grace)

    def close(self) -> None:
        """Finish what is pending, and end the threads."""
        self.finisher.close()
