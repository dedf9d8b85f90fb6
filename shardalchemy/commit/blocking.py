"""What servers say of waits, and what processes say of their sessions."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardalchemy.commit.waitgraph import Backend, Owner, Wait

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from shardalchemy.engine.beside import Beside

__all__ = [
    "PreparedHolder",
    "cancel",
    "has_prepared",
    "publish",
    "published",
    "transactions_of",
    "waits_on",
]

_MOST_SQL = 200  # characters

_TRANSACTIONS = """
SELECT pid, xact_start, wait_event_type IS NOT DISTINCT FROM 'Lock'
FROM pg_stat_activity
WHERE pid = ANY(%(pids)s) AND datname = current_database() AND xact_start IS NOT NULL
"""

# One that waits for a transaction because it wants its row has locked the row's tuple,
# so that is said as well. A prepared transaction has no process: it is the blocker 0,
# and is found by the lock that it has on its own id.
_WAITS = """
WITH locks AS MATERIALIZED (SELECT * FROM pg_locks)
SELECT l.pid, w.xact_start, l.waitstart,
       l.locktype, l.mode, l.relation::regclass::text, l.page, l.tuple,
       l.transactionid::text, r.relation::regclass::text, r.page, r.tuple,
       left(w.query, 1000), b.pid, holder.xact_start, p.gid,
       extract(epoch FROM clock_timestamp() - p.prepared)::float8
FROM locks AS l
JOIN pg_stat_activity AS w ON w.pid = l.pid AND w.datname = current_database()
CROSS JOIN LATERAL (SELECT DISTINCT unnest(pg_blocking_pids(l.pid))) AS b (pid)
LEFT JOIN pg_stat_activity AS holder ON holder.pid = b.pid
LEFT JOIN LATERAL (
    SELECT t.relation, t.page, t.tuple FROM locks AS t
    WHERE t.pid = l.pid AND t.granted AND t.locktype = 'tuple'
      AND l.locktype = 'transactionid'
    LIMIT 1
) AS r ON true
LEFT JOIN LATERAL (
    SELECT x.gid, x.prepared FROM locks AS h
    JOIN locks AS own ON own.virtualtransaction = h.virtualtransaction
        AND own.pid IS NULL AND own.locktype = 'transactionid'
    JOIN pg_prepared_xacts AS x ON x.transaction = own.transactionid
    WHERE b.pid = 0 AND h.pid IS NULL AND h.granted AND h.locktype = l.locktype
      AND (h.database, h.relation, h.page, h.tuple, h.transactionid, h.classid, h.objid,
           h.objsubid)
          IS NOT DISTINCT FROM
          (l.database, l.relation, l.page, l.tuple, l.transactionid, l.classid, l.objid,
           l.objsubid)
) AS p ON true
WHERE NOT l.granted
"""

_HAS_PREPARED = """
SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE database = current_database())
"""

# Looked at and cancelled in one statement: it still waits as it did in the deadlock.
_CANCEL = """
SELECT pg_cancel_backend(a.pid)
FROM pg_stat_activity AS a
JOIN pg_locks AS l ON l.pid = a.pid AND NOT l.granted
WHERE a.pid = %(pid)s AND a.xact_start = %(since)s AND l.waitstart = %(waiting)s
"""

_PUBLISH = """
WITH mine AS (
    SELECT * FROM unnest(
        %(sessions)s::bigint[], %(shards)s::text[], %(pids)s::integer[],
        %(starts)s::timestamptz[]
    ) AS m (session, shard, pid, xact_start)
), ended AS (
    DELETE FROM shardalchemy.waiting AS w
    WHERE w.process = %(process)s AND NOT EXISTS (
        SELECT FROM mine AS m WHERE m.session = w.session AND m.shard = w.shard
    )
), lost AS (
    DELETE FROM shardalchemy.waiting AS w
    USING (
        SELECT process, session, shard FROM shardalchemy.waiting
        WHERE process <> %(process)s AND at < clock_timestamp() - interval '30 s'
        FOR UPDATE SKIP LOCKED
    ) AS l
    WHERE (w.process, w.session, w.shard) = (l.process, l.session, l.shard)
)
INSERT INTO shardalchemy.waiting AS w (process, session, shard, pid, xact_start)
SELECT %(process)s, session, shard, pid, xact_start FROM mine
ON CONFLICT (process, session, shard) DO UPDATE
SET pid = excluded.pid, xact_start = excluded.xact_start, at = clock_timestamp()
"""
_PUBLISHED = """
SELECT process, session, shard, pid, xact_start FROM shardalchemy.waiting
WHERE at > clock_timestamp() - interval '3 s'
"""


@dataclass(frozen=True, slots=True)
class PreparedHolder:
    """A prepared transaction that has what a backend waits for; *age* in seconds."""

    shard: str
    gid: str
    age: float
    waiter: int
    lock: str


def transactions_of(
    beside: Beside, shard: str, pids: Iterable[int]
) -> dict[Backend, bool]:
    """Return which of these processes are in a transaction, and whether they wait.

    A pooler's process ids are not the server's, and are not found.
    """
    rows = beside.ask(shard, _TRANSACTIONS, {"pids": list(pids)})
    return {Backend(shard, pid, since): waits for pid, since, waits in rows}


def has_prepared(beside: Beside, shard: str) -> bool:
    """Return whether a transaction is prepared there, and has what others want."""
    return bool(beside.ask(shard, _HAS_PREPARED, {})[0][0])


def waits_on(beside: Beside, shard: str) -> tuple[list[Wait], list[PreparedHolder]]:
    """Return all waits for locks on one shard, and those for prepared transactions."""
    waits: list[Wait] = []
    prepared: list[PreparedHolder] = []
    for row in map(_Row._make, beside.ask(shard, _WAITS, {})):
        if row.gid is not None:
            age = row.age or 0.0
            prepared.append(PreparedHolder(shard, row.gid, age, row.pid, row.lock))
        elif row.blocker and row.waiting is not None:
            waits.append(
                Wait(
                    Backend(shard, row.pid, row.since),
                    Backend(shard, row.blocker, row.blocker_since),
                    row.waiting,
                    row.lock,
                    textwrap.shorten(row.query or "", _MOST_SQL, placeholder=" …"),
                )
            )
    return waits, prepared


class _Row(NamedTuple):
    """One wait, as `_WAITS` selects it."""

    pid: int
    since: datetime | None
    waiting: datetime | None
    kind: str
    mode: str
    relation: str | None
    page: int | None
    tuple_: int | None
    xid: str | None
    wanted_relation: str | None
    wanted_page: int | None
    wanted_tuple: int | None
    query: str | None
    blocker: int
    blocker_since: datetime | None
    gid: str | None
    age: float | None

    @property
    def lock(self) -> str:
        """What is waited for, much as PostgreSQL's own message has it."""
        if self.kind == "transactionid":
            lock = f"{self.mode} on transaction {self.xid}"
            if self.wanted_relation is not None:
                lock += (
                    f" for tuple ({self.wanted_page},{self.wanted_tuple}) of relation"
                    f" {self.wanted_relation}"
                )
            return lock
        if self.kind == "tuple":
            kind = f"tuple ({self.page},{self.tuple_}) of relation"
        else:
            kind = self.kind
        return " ".join(filter(None, (self.mode, "on", kind, self.relation)))


def cancel(beside: Beside, wait: Wait) -> bool:
    """Cancel the waiter's statement if it is in this wait; return whether it was."""
    return bool(
        beside.ask(
            wait.waiter.shard,
            _CANCEL,
            {
                "pid": wait.waiter.pid,
                "since": wait.waiter.since,
                "waiting": wait.since,
            },
        )
    )


def publish(
    beside: Beside, home: str, process: str, sessions: Mapping[int, Iterable[Backend]]
) -> None:
    """Have the home shard say which backends are whose, for one process's sessions."""
    rows = [
        (key, backend) for key, backends in sessions.items() for backend in backends
    ]
    beside.ask(
        home,
        _PUBLISH,
        {
            "process": process,
            "sessions": [key for key, _ in rows],
            "shards": [backend.shard for _, backend in rows],
            "pids": [backend.pid for _, backend in rows],
            "starts": [backend.since for _, backend in rows],
        },
    )


def published(beside: Beside, home: str) -> dict[Backend, Owner]:
    """Return the session of each backend that any process has published."""
    backends: dict[tuple[str, int], list[Backend]] = {}
    for process, session, shard, pid, since in beside.ask(home, _PUBLISHED, {}):
        backends.setdefault((process, session), []).append(Backend(shard, pid, since))
    owners: dict[Backend, Owner] = {}
    for (process, session), branches in backends.items():
        began = min(b.since for b in branches if b.since is not None)
        owners.update(dict.fromkeys(branches, Owner(began, process, session)))
    return owners
