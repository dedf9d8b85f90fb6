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
"""Seconds after which a gate opens by itself, for those who wait behind it."""

_SHUT = (
    f"BEGIN; SET LOCAL lock_timeout = {PATIENCE * 1000:.0f};"
    " SELECT pg_advisory_xact_lock(1936220524, 1)"
)
_STATE = (
    "SELECT granted FROM pg_locks WHERE locktype = 'advisory'"
    " AND classid = 1936220524 AND objid = 1 AND pid = {pid}"
)
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
        self._pids = {s: driver_of(c).info.backend_pid for s, c in holders.items()}

    def shut(self) -> None:
        """Ask for all gates; they are shut in a moment, and for `PATIENCE` at most."""
        for shard, holder in self._holders.items():
            send(holder, _SHUT)
            self._asked.add(shard)

    def is_shut(self) -> bool:
        """Return whether all are shut; once they are, none has been open in between."""
        return self._states().keys() == self._holders.keys()

    def open(self) -> None:
        """Open all gates."""
        if not self._asked:
            return
        asked = {s: c for s, c in self._holders.items() if s in self._asked}
        waiting = {s for s, granted in self._states().items() if not granted}
        self._ask({s: _CANCEL.format(pid=self._pids[s]) for s in waiting})
        # Where the watcher could not cancel it, the request ends by its own timeout.
        until = time.monotonic() + _ANSWER
        broadcast(asked, dict.fromkeys(asked), until=until)
        # A cancellation that came too late for the request may hit the first of these.
        for _ in range(2):
            asked = {s: c for s, c in asked.items() if in_transaction(driver_of(c))}
            broadcast(asked, dict.fromkeys(asked, "ROLLBACK"), until=until)
        self._asked.clear()

    def _states(self) -> dict[str, bool]:
        """Return by shard whether the request is granted, where there is one."""
        commands = {s: _STATE.format(pid=pid) for s, pid in self._pids.items()}
        return {
            shard: rows[0][0] == "t"
            for shard, rows in self._ask(commands).items()
            if rows
        }

    def _ask(self, commands: Mapping[str, str]) -> dict[str, Rows]:
        """Return what the watchers say, where they do."""
        answers = ask_all(self._watchers, commands, until=self._until)
        return {s: a for s, a in answers.items() if not isinstance(a, Exception)}
