"""Remove the markers and tombstones that nobody needs, and whose makers are gone.

A marker of a transaction that has committed everywhere is needed by snapshots for a
while, and by the session that has not heard of its commit; one of a transaction that is
prepared anywhere is the proof that it has committed. A tombstone is needed for as long
as its participant may still try to prepare, which is while a local transaction is open
that is older than the tombstone.

Processes delete their own markers (`finisher`). These are of those that could not.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import exc as sa_exc

from shardalchemy.commit.gid import Gid
from shardalchemy.engine.wire import driver_of, is_lost, simple_query, simple_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection

    from shardalchemy.catalog import Topology

__all__ = ["LEFT_FOR", "Housekeeping"]

LEFT_FOR = 60.0
"""Seconds for which another's marker or tombstone is left alone."""

T = TypeVar("T")

logger = logging.getLogger(__name__)

_BATCH = 1000
_MARKERS = f"""
    SELECT gid FROM shardalchemy.txn
    WHERE outcome = 'committed'
      AND at < clock_timestamp() - make_interval(secs => {{age}})
    ORDER BY xid LIMIT {_BATCH}
"""
_PREPARED = """
    SELECT gid FROM pg_prepared_xacts
    WHERE database = current_database() AND gid LIKE '{ours}'
"""
_FORGET = "DELETE FROM shardalchemy.txn WHERE gid = ANY ('{{{gids}}}')"
_TOMBSTONES = f"""
    DELETE FROM shardalchemy.txn WHERE gid IN (
        SELECT gid FROM shardalchemy.txn
        WHERE outcome = 'aborted'
          AND at < clock_timestamp() - make_interval(secs => {{age}})
          AND xid < pg_snapshot_xmin(pg_current_snapshot())
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
        self._complete: dict[tuple[str, Gid], float] = {}

    def clean(self, age: float = LEFT_FOR) -> int:
        """Delete what is older than *age* seconds and needed no more; return how many.

        A marker goes only at a call that is *age* seconds after the one which found its
        transaction committed everywhere.
        """
        topology = self._topology()
        found: dict[str, list[Gid]] = {}
        deleted = 0
        for shard in topology.shards:
            sql = _MARKERS.format(age=age)
            found[shard] = Gid.parse_all(self._ask(shard, sql) or ())
            deleted += self._run(shard, _TOMBSTONES.format(age=age))
        # Looked at after the markers: what has a marker was prepared everywhere, so
        # what is no longer prepared has committed.
        numbers = {a.number: name for name, a in topology.addresses.items()}
        wanted = {n for gids in found.values() for gid in gids for n in gid.numbers}
        prepared = self._prepared({numbers[n] for n in wanted if n in numbers})
        now = time.monotonic()
        complete: dict[tuple[str, Gid], float] = {}
        for shard, gids in found.items():
            old = []
            for gid in gids:
                names = [numbers.get(n) for n in gid.numbers]
                if all(
                    name in prepared and gid not in prepared[name] for name in names
                ):
                    since = self._complete.get((shard, gid), now)
                    if now - since >= age:
                        old.append(str(gid))
                    else:
                        complete[shard, gid] = since
            if old:
                deleted += self._run(shard, _FORGET.format(gids=",".join(old)))
        self._complete = complete
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
        tags = self._on(shard, lambda connection: simple_query(connection, sql))
        return 0 if tags is None else int(tags[-1].removeprefix("DELETE "))

    def _on(self, shard: str, do: Callable[[Connection], list[T]]) -> list[T] | None:
        try:
            with self._connect(shard) as connection:
                try:
                    return do(connection)
                finally:
                    if is_lost(driver_of(connection)):
                        connection.invalidate()
        except sa_exc.SQLAlchemyError as error:
            logger.info("shard %s is left as it is: %s", shard, error)
            return None
