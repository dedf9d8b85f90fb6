"""Carry out the protocol on a session's own connections."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqlalchemy import exc as sa_exc
from sqlalchemy.util import await_only

from shardalchemy.commit.gate import SHARED
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Coordinator, Decision, Reply, Request
from shardalchemy.commit.refusals import explained
from shardalchemy.commit.settling import settled
from shardalchemy.engine import broadcast
from shardalchemy.engine.wire import driver_of, is_lost, simple_query
from shardalchemy.errors import CommitOutcomeUnknown, TransactionAborted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection

    from shardalchemy.commit.counters import Counters
    from shardalchemy.commit.finisher import Finisher
    from shardalchemy.commit.recovery import Recovery

__all__ = ["Ack", "Commit", "CommitDriver"]

Ack = Literal["committed", "prepared"]
"""When a commit returns: after COMMIT PREPARED everywhere, or once it is decided."""

logger = logging.getLogger(__name__)

# A gid holds only [0-9a-f:/], so it stands in these literals as it is. The gate is held
# with the prepared transaction, until it is committed or rolled back.
_MARKER = (
    "INSERT INTO shardalchemy.txn (gid, outcome)"
    f" SELECT '{{gid}}', 'committed' FROM {SHARED}"
)
_COMMANDS = {
    Request.PREPARE: _MARKER + "; PREPARE TRANSACTION '{branch}'",
    Request.COMMIT: "COMMIT PREPARED '{branch}'",
    Request.ROLLBACK: "ROLLBACK PREPARED '{branch}'",
}
_COMMIT_ALONE = _MARKER + "; COMMIT"

_REPEATED_FOR = 5.0  # seconds
_FORGOTTEN_AFTER = 30.0
"""Seconds after which finding no marker is no proof that a commit did not happen.

Half of what `housekeeping` leaves others' markers for.
"""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit over several shards that is decided.

    ``done`` has a result once every shard has carried it out; None if all have.
    """

    gid: Gid
    done: Future[None] | None


class CommitDriver:
    """Commits transactions of one cluster on connections of the sessions that ran them.

    Every shard that is given has been written on. After either method the transactions
    are over, unless it has raised something else than this library's or the server's
    errors. A lost reply becomes one of three things: nothing, for the transaction has
    committed; TransactionAborted, for no shard holds any of it; CommitOutcomeUnknown.
    """

    def __init__(
        self, finisher: Finisher, recovery: Recovery, counters: Counters
    ) -> None:
        self._finisher = finisher
        self._recovery = recovery
        self._counters = counters

    def commit(
        self,
        cluster: str,
        numbers: Mapping[str, int],
        connections: Mapping[str, Connection],
        ack: Ack,
    ) -> Commit:
        """Commit the open transactions of several *connections* together.

        *cluster* is the cluster's id and *numbers* the shards' permanent numbers.
        Raises the first refusal's error, with nothing left on any shard; or
        CommitOutcomeUnknown where a reply was lost and a participant stays away.
        """
        began = time.monotonic()
        gid = Gid.new(cluster, (numbers[shard] for shard in connections))
        branches = {shard: gid.on(numbers[shard]) for shard in connections}
        is_async = next(iter(connections.values())).dialect.is_async
        machine = Coordinator.of(connections)
        try:
            replies, errors = _prepare(gid, branches, connections)
        except BaseException:
            # A Ctrl-C, or a cancelled task: nobody is left here to decide.
            self._resolve_beside(gid)
            raise
        machine = machine.after(replies)
        decision = machine.decision
        if decision is Decision.RECOVER:
            lost = [s for s, reply in replies.items() if reply is Reply.LOST]
            cause = errors[lost[0]]
            told = self._recover(gid, lost, cause, began, is_async=is_async)
            left = {} if told else branches
        elif decision is Decision.COMMIT and ack == "prepared":
            left = branches
        else:
            machine = machine.after(_settle(machine.requests, branches, connections))
            left = {shard: branches[shard] for shard in machine.requests}
            if decision is Decision.ABORT:
                self._counters.add("aborts")
                # One whose reply was lost may have prepared, and never can commit.
                left |= {s: branches[s] for s, r in replies.items() if r is Reply.LOST}
                if left:
                    self._finisher.roll_back(gid, left)
                raise next(errors[s] for s, r in replies.items() if r is Reply.REFUSED)
        self._counters.add(f"commits.{len(connections)}")
        if not left:
            self._finisher.forget(gid, branches)
            return Commit(gid, None)
        # It is committed: every participant has promised. Until the last has kept it,
        # the markers of the others are its only proof.
        done = self._finisher.commit(gid, left, marked=branches)
        if ack == "committed":
            logger.warning("%s: COMMIT PREPARED is repeated on %s", gid, [*left])
            _wait_for(done, is_async=is_async)
        return Commit(gid, done)

    def commit_alone(
        self, cluster: str, number: int, shard: str, connection: Connection
    ) -> None:
        """Commit the open transaction of one *connection*, leaving a marker as well.

        It costs no round trip, and a reply that is lost can be resolved: not by the
        transaction's id, which after a crash may be another's.
        Raises what COMMIT raised, or as `commit` does.
        """
        began = time.monotonic()
        gid = Gid.new(cluster, (number,))
        try:
            command = _COMMIT_ALONE.format(gid=gid)
            *_, tag = simple_query(connection, command)
        except sa_exc.DBAPIError as error:
            if not is_lost(driver_of(connection)):
                self._counters.add("aborts")
                raise explained(shard, connection, gid, error) from error
            is_async = connection.dialect.is_async
            self._recover(gid, [shard], error, began, is_async=is_async)
        else:
            if tag != "COMMIT":
                self._counters.add("aborts")
                raise TransactionAborted(
                    f"the transaction on shard {shard} had failed before the commit; it"
                    " was rolled back."
                )
        self._finisher.forget_alone(gid, shard)
        self._counters.add("commits.1")

    def _resolve_beside(self, gid: Gid) -> None:
        threading.Thread(
            target=self._recovery.resolve,
            args=(gid,),
            name="shardalchemy-resolve",
            daemon=True,
        ).start()

    def _recover(
        self,
        gid: Gid,
        lost: Sequence[str],
        cause: Exception,
        began: float,
        *,
        is_async: bool,
    ) -> bool:
        """Return if *gid* has committed; raise what the caller is to hear otherwise.

        What is returned is whether every shard has carried it out.
        """
        # It waits in ordinary ways, so an event loop has to be let go meanwhile.
        found = (
            await_only(asyncio.to_thread(self._recovery.conclude, gid))
            if is_async
            else self._recovery.conclude(gid)
        )
        outcome = found.decision
        self._counters.add("lost_replies")
        where = f"the connection to shard {', '.join(lost)} was lost while it committed"
        if outcome is Decision.COMMIT:
            return found.is_finished
        late = time.monotonic() - began > _FORGOTTEN_AFTER
        if outcome is Decision.ABORT and not late:
            self._counters.add("aborts")
            raise TransactionAborted(
                f"{where}; the transaction was rolled back on every shard. Run it"
                " again."
            ) from cause
        self._counters.add("unknown")
        reason = (
            "that was too long ago to tell what has become of it"
            if late
            else "it cannot be reached"
        )
        raise CommitOutcomeUnknown(
            f"{where}, and {reason}. Transaction {gid} will be, or has been, committed"
            " everywhere or rolled back everywhere. Do not repeat it before looking.",
            str(gid),
        ) from cause


def _wait_for(done: Future[None], *, is_async: bool) -> None:
    """Wait for a second step that has failed once, but not for a shard that is away."""
    if is_async:
        await_only(asyncio.to_thread(wait, [done], _REPEATED_FOR))
    else:
        wait([done], _REPEATED_FOR)


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

    command = _COMMANDS[Request.PREPARE]
    commands = {s: command.format(gid=gid, branch=b) for s, b in branches.items()}
    for shard, outcome in broadcast(connections, commands).items():
        if isinstance(outcome, Exception):
            gone = is_lost(driver_of(connections[shard]))
            certain = isinstance(outcome, sa_exc.DBAPIError) and not gone
            replies[shard] = Reply.REFUSED if certain else Reply.LOST
            errors[shard] = explained(shard, connections[shard], gid, outcome)
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
    requests: Mapping[str, Request],
    branches: Mapping[str, str],
    connections: Mapping[str, Connection],
) -> dict[str, Reply]:
    """Tell participants the decision, all at once; return what was heard.

    Where another was faster, a snapshot or a recoverer, there is nothing left to do.
    """
    commands = {
        shard: _COMMANDS[request].format(branch=branches[shard])
        for shard, request in requests.items()
    }
    outcomes = broadcast({s: connections[s] for s in commands}, commands)
    heard = {
        shard: settled(outcome) if isinstance(outcome, Exception) else Reply.DONE
        for shard, outcome in outcomes.items()
    }
    return {s: Reply.LOST if r is Reply.REFUSED else r for s, r in heard.items()}
