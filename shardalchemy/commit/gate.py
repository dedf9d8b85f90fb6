"""The gate: by holding it shut, no commit completes on any shard.

A commit takes the gate shared, in the transaction that it commits, on each shard that
it has written on. So it is held until the commit is visible there: with a transaction
that is prepared, until that is committed or rolled back. Who has the gate exclusively
on all shards knows that meanwhile nothing commits on any of them.

It is never waited for longer than `PATIENCE` at a stretch, since what comes behind an
exclusive request waits with it; and two transactions that commit on two shards may each
have been let in on one of them before the gate was asked for, and not on the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import exc as sa_exc

from shardalchemy.engine import ask_all, broadcast
from shardalchemy.errors import SnapshotUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

__all__ = ["PATIENCE", "SHARED", "Gate"]

# Two keys of PostgreSQL's advisory locks, in the space of two integers.
SHARED = "pg_advisory_xact_lock_shared(1936220524, 1)"
"""What a transaction calls before it commits, on each shard that it has written on."""

_EXCLUSIVE = "pg_advisory_xact_lock(1936220524, 1)"
_TURN = "pg_advisory_xact_lock(1936220524, 2)"

PATIENCE = 0.1
"""Seconds for which commits may have to wait behind one attempt to shut the gate."""

_BEGIN = f"BEGIN; SET LOCAL lock_timeout = {PATIENCE * 1000:.0f}; "

_IN_DOUBT = """
    SELECT gid FROM pg_prepared_xact()
    WHERE gid LIKE '{ours}%' AND prepared < clock_timestamp() - interval '1 second'
    ORDER BY prepared
"""


class Gate:
    """The gate of all shards, on a connection to each; *until* bounds every answer.

    The connections are to be in no transaction, and first the one on which those who
    shut it take turns. It opens when a connection is closed or lost.
    """

    def __init__(self, connections: Mapping[str, Connection], until: float) -> None:
        self._connections = connections
        self._first = next(iter(connections))
        self._until = until

    def shut(self) -> list[str]:
        """Shut it on all shards, or on none; return the shards that would not."""
        # Two who ask for all shards at once would each be first on some of them.
        waiting = self._ask({self._first: f"{_BEGIN}SELECT {_TURN}"})
        if not waiting:
            commands = dict.fromkeys(self._connections, f"{_BEGIN}SELECT {_EXCLUSIVE}")
            commands[self._first] = f"SELECT {_EXCLUSIVE}"
            # On all at once: a commit that this comes between on two shards cannot end,
            # and the longer the requests are apart the more of these there are.
            waiting = self._ask(commands)
        if waiting:
            self.open()
        return waiting

    def open(self) -> None:
        """Open it; harmless if it is not shut."""
        broadcast(
            self._connections,
            dict.fromkeys(self._connections, "ROLLBACK"),
            until=self._until,
        )

    def in_doubt(self, shards: list[str], ours: str) -> dict[str, list[str]]:
        """Return what has been prepared for over a second on *shards*, oldest first.

        *ours* is how the names of this cluster's transactions begin.
        """
        command = _IN_DOUBT.format(ours=ours)
        answers = ask_all(
            self._connections, dict.fromkeys(shards, command), until=self._until
        )
        return {
            shard: [str(gid) for (gid,) in answer]
            for shard, answer in answers.items()
            if not isinstance(answer, Exception) and answer
        }

    def _ask(self, commands: Mapping[str, str]) -> list[str]:
        outcomes = broadcast(self._connections, commands, until=self._until)
        waiting = []
        for shard, outcome in outcomes.items():
            if not isinstance(outcome, Exception):
                continue
            if isinstance(outcome, sa_exc.DBAPIError) and isinstance(
                outcome.orig, psycopg.errors.LockNotAvailable
            ):
                waiting.append(shard)
            else:
                raise SnapshotUnavailable(
                    f"the gate of shard {shard} cannot be shut: {outcome}"
                ) from outcome
        return waiting
