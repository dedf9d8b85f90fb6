"""The gate: by shutting it, no commit begins on any shard.

A commit takes the gate shared, in the transaction that it commits, on each shard that
it has written on. Who shuts it asks for it exclusively: from then on, commits that come
wait behind this request. It need not be granted. Commits that are in go on and end, for
``COMMIT PREPARED`` takes no gate; but one that was let in on one of its shards and not
on another would keep the request waiting for as long as that keeps it.

Let snapshots be opened while all gates are shut, and T be a transaction that they show.
It was let in before the last gate was shut on its shard, and so before any of them was
opened. Whatever had returned from its commit before that of T began is then committed,
and shown as well; or, acknowledged when it was prepared, it is prepared everywhere.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from shardalchemy.engine import ask_all, broadcast
from shardalchemy.engine.wire import driver_of, in_transaction, send

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from shardalchemy.engine.broadcast import Rows

__all__ = ["PATIENCE", "SHARED", "Gate"]

# A key of PostgreSQL's advisory locks, in the space of two integers.
SHARED = "pg_advisory_xact_lock_shared(1936220524, 1)"
"""What a transaction calls before it commits, on each shard that it has written on."""

PATIENCE = 0.1
"""Seconds for which a gate is asked for, and for which it stays shut, at most."""

# The server opens the gate by itself, whatever becomes of who has shut it. A lock of a
# random number says whose request it is: what the driver takes for the number of its
# server process is a pooler's where there is one in between.
_SHUT = (
    f"BEGIN; SET LOCAL lock_timeout = {PATIENCE * 1000:.0f};"
    " SELECT pg_advisory_xact_lock(1936220525, {mine});"
    " SELECT pg_advisory_xact_lock(1936220524, 1);"
    f" SELECT pg_sleep({PATIENCE}); COMMIT"
)
_STATE = """
    SELECT gate.granted, gate.pid
    FROM pg_locks AS gate JOIN pg_locks AS mine USING (pid)
    WHERE gate.locktype = 'advisory' AND mine.locktype = 'advisory'
      AND gate.classid = 1936220524 AND gate.objid = 1
      AND mine.classid = 1936220525 AND mine.objid = {mine}
"""
_CANCEL = "SELECT pg_cancel_backend({pid})"
_ANSWER = 1.0  # seconds for what is cancelled to end


class Gate:
    """The gates of all shards, shut by *holders*, which others look after.

    *holders* and *watchers* are connections to the same shards, the former in no
    transaction. *until* is a moment of ``time.monotonic()`` that bounds every answer.
    """

    def __init__(
        self,
        holders: Mapping[str, Connection],
        watchers: Mapping[str, Connection],
        until: float,
    ) -> None:
        self._holders = holders
        self._watchers = watchers
        self._until = until
        self._asked: set[str] = set()
        self._mine = secrets.randbits(31)

    def shut(self) -> None:
        """Ask for all gates; they are shut in a moment, and for `PATIENCE` at most."""
        for shard, holder in self._holders.items():
            send(holder, _SHUT.format(mine=self._mine))
            self._asked.add(shard)

    def is_shut(self) -> bool:
        """Return whether all are shut; once they are, none has been open in between."""
        return self._states().keys() == self._holders.keys()

    def open(self) -> None:
        """Open all gates."""
        if not self._asked:
            return
        asked = {s: c for s, c in self._holders.items() if s in self._asked}
        pids = {shard: pid for shard, (_, pid) in self._states().items()}
        self._ask({s: _CANCEL.format(pid=pid) for s, pid in pids.items()})
        # Where the watcher could not cancel it, the request ends by its own timeout.
        until = time.monotonic() + _ANSWER
        broadcast(asked, dict.fromkeys(asked), until=until)
        # A cancellation that came too late for the request may hit the first of these.
        for _ in range(2):
            asked = {s: c for s, c in asked.items() if in_transaction(driver_of(c))}
            broadcast(asked, dict.fromkeys(asked, "ROLLBACK"), until=until)
        self._asked.clear()

    def _states(self) -> dict[str, tuple[bool, str | None]]:
        """Return by shard, where there is a request, if it is granted, and whose."""
        state = _STATE.format(mine=self._mine)
        commands = dict.fromkeys(self._holders, state)
        return {
            shard: (rows[0][0] == "t", rows[0][1])
            for shard, rows in self._ask(commands).items()
            if rows
        }

    def _ask(self, commands: Mapping[str, str]) -> dict[str, Rows]:
        """Return what the watchers say, where they do."""
        answers = ask_all(self._watchers, commands, until=self._until)
        return {s: a for s, a in answers.items() if not isinstance(a, Exception)}
