"""Carry out the protocol on a session's own connections."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

import psycopg
from sqlalchemy import exc as sa_exc
from sqlalchemy.util import await_only

from shardalchemy.commit.gate import SHARED
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision, Reply, decide
from shardalchemy.engine import broadcast
from shardalchemy.engine.wire import driver_of, is_lost
from shardalchemy.errors import CommitOutcomeUnknown, TransactionAborted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from sqlalchemy import Connection

    from shardalchemy.commit.finisher import Finisher
    from shardalchemy.commit.recovery import Recovery

__all__ = ["Ack", "CommitDriver"]

Ack = Literal["committed", "prepared"]
"""When a commit returns: after COMMIT PREPARED everywhere, or once it is decided."""

logger = logging.getLogger(__name__)

# A gid holds only [0-9a-f:/], so it stands in these literals as it is. The gate is held
# with the prepared transaction, until it is committed or rolled back.
_PREPARE = (
    "INSERT INTO shardalchemy.txn (gid, outcome)"
    f" SELECT '{{gid}}', 'committed' FROM {SHARED};"
    " PREPARE TRANSACTION '{branch}'"
)
_COMMIT = "COMMIT PREPARED '{branch}'"
_ROLLBACK = "ROLLBACK PREPARED '{branch}'"


class CommitDriver:
    """Commits transactions of one cluster whose writes are on several shards."""

    def __init__(self, finisher: Finisher, recovery: Recovery) -> None:
        self._finisher = finisher
        self._recovery = recovery

    def commit(
        self,
        cluster: str,
        numbers: Mapping[str, int],
        connections: Mapping[str, Connection],
        ack: Ack,
    ) -> Future[None] | None:
        """Commit the open transactions of *connections*, which all have written.

        *cluster* is the cluster's id and *numbers* the shards' permanent numbers.
        Returns, with ``ack="prepared"``, what is done when every shard has committed.
        Raises the first refusal's error, with nothing left on any shard; or
        CommitOutcomeUnknown where a reply was lost and a participant stays away.
        """
        gid = Gid.new(cluster, (numbers[shard] for shard in connections))
        branches = {shard: gid.on(numbers[shard]) for shard in connections}
        replies, errors = _prepare(gid, branches, connections)
        decision = decide(replies.values())
        if decision is Decision.COMMIT:
            if ack == "prepared":
                return self._finisher.commit(gid, branches, marked=branches)
            failed = _settle(_COMMIT, branches, connections)
            if failed:
                # It is committed all the same: every participant has promised. Until
                # the last has kept it, the markers of the others are its only proof.
                logger.warning("%s: COMMIT PREPARED is repeated on %s", gid, failed)
                left = {s: branches[s] for s in failed}
                self._finisher.commit(gid, left, marked=branches)
            else:
                self._finisher.forget(gid, branches)
            return None
        if decision is Decision.ABORT:
            prepared = {s for s, r in replies.items() if r is Reply.PREPARED}
            failed = _settle(
                _ROLLBACK,
                branches,
                {s: c for s, c in connections.items() if s in prepared},
            )
            if failed:
                self._finisher.roll_back(gid, {s: branches[s] for s in failed})
            raise next(errors[s] for s, r in replies.items() if r is Reply.REFUSED)
        first = next(iter(connections.values()))
        self._recover(gid, replies, errors, is_async=first.dialect.is_async)
        return None

    def _recover(
        self,
        gid: Gid,
        replies: Mapping[str, Reply],
        errors: Mapping[str, Exception],
        *,
        is_async: bool,
    ) -> None:
        lost = [s for s, r in replies.items() if r is Reply.LOST]
        cause = errors[lost[0]]
        # It waits in ordinary ways, so an event loop has to be let go meanwhile.
        outcome = (
            await_only(asyncio.to_thread(self._recovery.resolve, gid))
            if is_async
            else self._recovery.resolve(gid)
        )
        if outcome is Decision.COMMIT:
            return
        if outcome is Decision.ABORT:
            raise TransactionAborted(
                f"the connection to shard {lost[0]} was lost while it prepared; the"
                " transaction was rolled back on every shard. Run it again."
            ) from cause
        raise CommitOutcomeUnknown(
            f"the connection to shard {', '.join(lost)} was lost while it prepared, and"
            f" it cannot be reached. Transaction {gid} will be committed everywhere or"
            " rolled back everywhere when it is back. Do not repeat it before looking.",
            str(gid),
        ) from cause


def _prepare(
    gid: Gid, branches: Mapping[str, str], connections: Mapping[str, Connection]
) -> tuple[dict[str, Reply], dict[str, Exception]]:
    """Ask every participant to prepare; return the replies, and errors of the rest."""
    replies: dict[str, Reply] = {}
    errors: dict[str, Exception] = {}
    # A connection known to be gone was not asked, so that participant never prepares.
    for shard, connection in connections.items():
        if is_lost(driver_of(connection)):
            replies[shard] = Reply.REFUSED
            errors[shard] = TransactionAborted(
                f"the connection to shard {shard} was lost before the commit; the"
                " transaction was rolled back on every shard. Run it again."
            )
    if replies:
        others = {s: Reply.REFUSED for s in connections if s not in replies}
        errors.update(dict.fromkeys(others, next(iter(errors.values()))))
        return {**replies, **others}, errors

    commands = {
        shard: _PREPARE.format(gid=gid, branch=branch)
        for shard, branch in branches.items()
    }
    for shard, outcome in broadcast(connections, commands).items():
        if isinstance(outcome, Exception):
            gone = is_lost(driver_of(connections[shard]))
            certain = isinstance(outcome, sa_exc.DBAPIError) and not gone
            replies[shard] = Reply.REFUSED if certain else Reply.LOST
            errors[shard] = outcome
        elif outcome[-1] != "PREPARE TRANSACTION":
            # A transaction that has failed answers ROLLBACK, without an error.
            replies[shard] = Reply.REFUSED
            errors[shard] = TransactionAborted(
                f"the transaction on shard {shard} had failed before the commit; it was"
                " rolled back on every shard."
            )
        else:
            replies[shard] = Reply.PREPARED
    return replies, errors


def _settle(
    command: str, branches: Mapping[str, str], connections: Mapping[str, Connection]
) -> list[str]:
    """Send the second step to all at once; return the shards where it failed.

    Where another was faster, a snapshot or a recoverer, there is nothing left to do.
    """
    commands = {s: command.format(branch=branches[s]) for s in connections}
    outcomes = broadcast(connections, commands)
    return [
        shard
        for shard, outcome in outcomes.items()
        if isinstance(outcome, Exception)
        and not isinstance(
            getattr(outcome, "orig", None), psycopg.errors.UndefinedObject
        )
    ]
