"""Finish or undo what crashes and lost replies have left prepared.

A recoverer looks at every participant of a transaction. One that is not prepared has
either committed, and then its marker says so, or can be kept from ever preparing: by a
tombstone under the marker's own unique key. The insert of a tombstone waits while the
participant is between its marker and its end, so a short ``lock_timeout`` and another
look decide. Any number of recoverers, and the session itself, may do this at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision, Seen, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = ["Recovery", "RecoveryReport"]

logger = logging.getLogger(__name__)

_PREPARED = text(
    "SELECT 1 FROM pg_prepared_xacts"
    " WHERE gid = :branch AND database = current_database()"
)
_ORPHANS = text(
    """
    SELECT gid FROM pg_prepared_xacts
    WHERE database = current_database() AND gid LIKE :ours
      AND prepared < clock_timestamp() - make_interval(secs => :grace)
    """
)
_TOMBSTONE = text(
    "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (:gid, 'aborted')"
    " ON CONFLICT (gid) DO NOTHING"
)
_OUTCOME = text("SELECT outcome FROM shardalchemy.txn WHERE gid = :gid")
_LOCK_TIMEOUT = text("SET lock_timeout = '200ms'")


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """The transactions that a recovery met, by their gids."""

    committed: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()


class Recovery:
    """Recovers transactions of one cluster.

    ``connect`` opens a connection to a shard; ``topology`` returns the current one.
    ``patience`` is how many seconds an unreachable participant is tried for.
    """

    def __init__(
        self,
        connect: Callable[[str], Connection],
        topology: Callable[[], Topology],
        patience: float = 5.0,
    ) -> None:
        self._connect = connect
        self._topology = topology
        self._patience = patience

    def recover(self, grace: float) -> RecoveryReport:
        """Resolve every transaction that was prepared over *grace* seconds ago."""
        topology = self._topology()
        ours = f"sa1:{topology.cluster[:8]}:%"
        found: dict[str, Gid] = {}
        for shard in topology.shards:
            try:
                with self._autocommit(shard) as connection:
                    parameters = {"ours": ours, "grace": grace}
                    for branch in connection.scalars(_ORPHANS, parameters):
                        gid = Gid.parse(branch)
                        if gid is not None:
                            found[str(gid)] = gid
            except sa_exc.OperationalError as error:
                logger.warning("recovery cannot look at shard %s: %s", shard, error)
        outcomes = {name: self.resolve(gid) for name, gid in found.items()}

        def having(outcome: Decision) -> tuple[str, ...]:
            return tuple(name for name, o in outcomes.items() if o is outcome)

        return RecoveryReport(
            having(Decision.COMMIT), having(Decision.ABORT), having(Decision.RECOVER)
        )

    def resolve(self, gid: Gid) -> Decision:
        """Commit or roll back *gid* on every participant; RECOVER means in doubt."""
        topology = self._topology()
        names = {a.number: name for name, a in topology.addresses.items()}
        branches = {names[n]: gid.on(n) for n in gid.numbers if n in names}
        if len(branches) < len(gid.numbers):
            return Decision.RECOVER
        deadline = time.monotonic() + self._patience
        seen = {
            s: self._look(s, gid, branch, deadline) for s, branch in branches.items()
        }
        decision = verdict(seen.values())
        if decision is not Decision.RECOVER:
            prepared = {s: branches[s] for s, w in seen.items() if w is Seen.PREPARED}
            if not self._settle(decision, prepared, deadline):
                logger.warning("%s: a shard was lost while it was recovered", gid)
        return decision

    def _autocommit(self, shard: str) -> Connection:
        connection = self._connect(shard)
        return connection.execution_options(isolation_level="AUTOCOMMIT")

    def _look(self, shard: str, gid: Gid, branch: str, deadline: float) -> Seen:
        """Return what *shard* holds of *gid*; leave a tombstone if nothing."""
        while True:
            try:
                with self._autocommit(shard) as connection:
                    # Not to go back to the pool: sessions would inherit the timeout.
                    connection.detach()
                    connection.execute(_LOCK_TIMEOUT)
                    while True:
                        if connection.scalar(_PREPARED, {"branch": branch}):
                            return Seen.PREPARED
                        try:
                            connection.execute(_TOMBSTONE, {"gid": str(gid)})
                        except sa_exc.OperationalError as error:
                            if not isinstance(
                                error.orig, psycopg.errors.LockNotAvailable
                            ):
                                raise
                            # Its marker is there and undecided: look again.
                            if time.monotonic() > deadline:
                                return Seen.UNREACHABLE
                            continue
                        outcome = connection.scalar(_OUTCOME, {"gid": str(gid)})
                        return (
                            Seen.COMMITTED if outcome == "committed" else Seen.ABORTED
                        )
            except (sa_exc.OperationalError, sa_exc.InterfaceError) as error:
                if time.monotonic() > deadline:
                    logger.warning("shard %s is not to be reached: %s", shard, error)
                    return Seen.UNREACHABLE
                time.sleep(0.1)

    def _settle(
        self, decision: Decision, prepared: Mapping[str, str], deadline: float
    ) -> bool:
        """Tell the decision to the shards that are prepared; return if all heard."""
        command = "COMMIT" if decision is Decision.COMMIT else "ROLLBACK"
        done = True
        for shard, branch in prepared.items():
            while True:
                try:
                    with self._autocommit(shard) as connection:
                        connection.exec_driver_sql(f"{command} PREPARED '{branch}'")
                    break
                except sa_exc.DBAPIError as error:
                    if isinstance(error.orig, psycopg.errors.UndefinedObject):
                        break  # another has done it
                    if time.monotonic() > deadline:
                        done = False
                        break
                    time.sleep(0.1)
        return done
