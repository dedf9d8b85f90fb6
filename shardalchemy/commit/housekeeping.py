"""Remove the markers and tombstones that nobody needs, and whose makers are gone.

A marker of a transaction that has committed everywhere is needed by snapshots for a
while, and by the session that has not heard of its commit; one of a transaction that is
prepared anywhere is the proof that it has committed. A tombstone is needed for as long
as its participant may still try to prepare, which is while a local transaction is open
that was open when the tombstone came.

So each goes in two steps, by any two processes: its row says since when it is known to
be of no use but to those who have not noticed yet. No process has to live for long.

Processes delete their own markers (`finisher`). These are of those that could not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import exc as sa_exc

from shardalchemy.commit.gid import Gid
from shardalchemy.engine import kept_if_sound
from shardalchemy.engine.wire import simple_query, simple_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = ["LEFT_FOR", "Housekeeping"]

T = TypeVar("T")

LEFT_FOR = 60.0
"""Seconds for which another's marker or tombstone is left alone, at each step."""

logger = logging.getLogger(__name__)

_BATCH = 1000
_OLD = "clock_timestamp() - make_interval(secs => {age})"
_MARKERS = f"""
    SELECT gid FROM shardalchemy.txn
    WHERE outcome = 'committed' AND noted IS NULL AND at < {_OLD}
    ORDER BY xid LIMIT {_BATCH}
"""
_PREPARED = """
    SELECT gid FROM pg_prepared_xacts
    WHERE database = current_database() AND gid LIKE '{ours}'
"""
_NOTE_MARKERS = """
    UPDATE shardalchemy.txn SET noted = clock_timestamp()
    WHERE gid = ANY ('{{{gids}}}') AND noted IS NULL
"""
# Every open transaction has a virtual id, whether it has written or not, and shows it
# to every role; one that has prepared or ended has none.
_NOTE_TOMBSTONES = f"""
    UPDATE shardalchemy.txn
    SET noted = clock_timestamp(),
        open_then = ARRAY(
            SELECT virtualxid FROM pg_locks
            WHERE locktype = 'virtualxid' AND pid <> pg_backend_pid()
        )
    WHERE outcome = 'aborted' AND noted IS NULL AND at < {_OLD}
"""
_REMOVE = f"""
    DELETE FROM shardalchemy.txn WHERE gid IN (
        SELECT gid FROM shardalchemy.txn
        WHERE noted < {_OLD}
          AND NOT EXISTS (
            SELECT FROM pg_locks
            WHERE locktype = 'virtualxid' AND virtualxid = ANY (open_then)
          )
        ORDER BY xid LIMIT {_BATCH}
    )
"""


class Housekeeping:
    """Keeps the table of markers small on every shard of a cluster.

    ``connect`` opens a connection to a shard; ``topology`` returns the current one.
    """

    def __init__(
        self, connect: Callable[[str], Connection], topology: Callable[[], Topology]
    ) -> None:
        self._connect = connect
        self._topology = topology

    def clean(self, age: float = LEFT_FOR) -> int:
        """Delete what was noted over *age* seconds ago, then note what is done with.

        Of what is younger than *age* itself nothing is noted. Returns how many rows
        were deleted.
        """
        topology = self._topology()
        found: dict[str, list[Gid]] = {}
        deleted = 0
        for shard in topology.shards:
            deleted += self._run(shard, _REMOVE.format(age=age))
            self._run(shard, _NOTE_TOMBSTONES.format(age=age))
            rows = self._ask(shard, _MARKERS.format(age=age))
            found[shard] = Gid.parse_all(rows or ())
        # Looked at after the markers: what has a marker was prepared everywhere, so
        # what is no longer prepared has committed.
        numbers = {a.number: name for name, a in topology.addresses.items()}
        wanted = {n for gids in found.values() for gid in gids for n in gid.numbers}
        prepared = self._prepared({numbers[n] for n in wanted if n in numbers})

        def is_complete(gid: Gid) -> bool:
            return all(
                n in numbers and gid not in prepared.get(numbers[n], {gid})
                for n in gid.numbers
            )

        for shard, gids in found.items():
            complete = ",".join(str(gid) for gid in gids if is_complete(gid))
            if complete:
                self._run(shard, _NOTE_MARKERS.format(gids=complete))
        return deleted

    def _prepared(self, shards: Iterable[str]) -> dict[str, set[Gid]]:
        """Return what is prepared on each shard; one out of reach is left out."""
        sql = _PREPARED.format(ours=f"sa1:{self._topology().cluster[:8]}:%")
        prepared: dict[str, set[Gid]] = {}
        for shard in shards:
            rows = self._ask(shard, sql)
            if rows is not None:
                prepared[shard] = set(Gid.parse_all(rows))
        return prepared

    def _ask(self, shard: str, sql: str) -> list[tuple[str | None, ...]] | None:
        return self._on(shard, lambda connection: simple_rows(connection, sql))

    def _run(self, shard: str, sql: str) -> int:
        """Run an UPDATE or DELETE; return how many rows it had."""
        tags = self._on(shard, lambda connection: simple_query(connection, sql))
        return 0 if tags is None else int(tags[-1].rpartition(" ")[2])

    def _on(self, shard: str, do: Callable[[Connection], list[T]]) -> list[T] | None:
        try:
            with kept_if_sound(self._connect(shard)) as connection:
                return do(connection)
        except sa_exc.SQLAlchemyError as error:
            logger.info("shard %s is left as it is: %s", shard, error)
            return None
