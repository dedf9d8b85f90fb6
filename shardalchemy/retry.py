"""Run a function in a transaction, again where that cannot do anything twice.

What may be run again is decided by what is known to have become of the transaction,
not by how the error looks: either the servers have said that nothing of it was kept, or
no shard had been asked to commit yet. A reply that was lost after that is never taken
for a failure, so it is never run again.

The waiting is stamina's, with its hooks and its switches (``stamina.set_active``,
``stamina.set_testing``); how long is ours: full jitter, a random time up to a bound
that doubles. Transactions that have failed by each other do not meet again so soon.
(Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)
"""

from __future__ import annotations

import functools
import inspect
import random
import time
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from sqlalchemy import exc as sa_exc

from shardalchemy.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    PreparedSlotsExhausted,
    ShardAlchemyError,
    StatementTimeout,
    TopologyChanged,
    TransactionAborted,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shardalchemy.asyncio import AsyncShardedSession
    from shardalchemy.cluster import Cluster
    from shardalchemy.session import ShardedSession

__all__ = ["ATTEMPTS", "TIMEOUT", "may_run_again", "run", "run_async"]

T = TypeVar("T")
S = TypeVar("S", bound="ShardedSession")
A = TypeVar("A", bound="AsyncShardedSession")

ATTEMPTS = 10
TIMEOUT = 45.0
"""Seconds."""

_FIRST_BOUND, _LAST_BOUND = 0.05, 2.0  # seconds

_SERIALIZATION_FAILURE, _DEADLOCK = "40001", "40P01"
_OUT_OF_MEMORY = "53200"  # what PREPARE TRANSACTION says when all slots are taken
_SERVER_ENDS = ("57P01", "57P02", "57P03")  # shutdown, crash, not up yet


def may_run_again(error: BaseException, *, commit_began: bool) -> bool:
    """Return whether a transaction that ended with *error* may be run again.

    It may where no shard can have kept anything of it, and where another time may go
    better. *commit_began* is whether any shard may have been asked to commit.
    """
    if isinstance(error, TransactionAborted | TopologyChanged):
        return True
    if isinstance(error, CommitOutcomeUnknown | StatementTimeout):
        return False
    if not isinstance(error, sa_exc.DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state in (_SERIALIZATION_FAILURE, _DEADLOCK):
        return True
    if isinstance(error, PreparedSlotsExhausted):
        # Refused by PREPARE; with max_prepared_transactions = 0 it always will be.
        return bool(state == _OUT_OF_MEMORY)
    if commit_began or isinstance(error, ShardAlchemyError):
        return False
    # A connection that was lost, or that could not be made.
    return (
        error.connection_invalidated
        or state in _SERVER_ENDS
        or (state is None and isinstance(error.orig, psycopg.OperationalError))
    )


def run(
    cluster: Cluster,
    fn: Callable[[S], T],
    sessionmaker: Callable[[], S],
    *,
    attempts: int | None,
    timeout: float | None,
) -> T:
    """Return ``fn(session)`` after its transaction has committed; `Cluster.run`."""
    if inspect.iscoroutinefunction(fn):
        raise ConfigurationError(
            f"{_name(fn)} is a coroutine function; give it to"
            " cluster.run_async(…) and await that."
        )
    tries = _Tries(cluster, attempts, timeout)

    @_named_after(fn)
    def attempt() -> T:
        with tries.begin(sessionmaker()) as session, session.begin():
            result = fn(session)
            tries.fn_has_returned = True
            return result

    try:
        done: T = tries.retrying(attempt)()
    except Exception as error:
        tries.note(error)
        raise
    return done


async def run_async(
    cluster: Cluster,
    fn: Callable[[A], Awaitable[T]],
    sessionmaker: Callable[[], A],
    *,
    attempts: int | None,
    timeout: float | None,  # noqa: ASYNC109
) -> T:
    """Return ``await fn(session)`` after its commit; `Cluster.run_async`."""
    tries = _Tries(cluster, attempts, timeout)

    @_named_after(fn)
    async def attempt() -> T:
        async with tries.begin(sessionmaker()) as session, session.begin():
            result = await fn(session)
            tries.fn_has_returned = True
            return result

    try:
        done: T = await tries.retrying(attempt)()
    except Exception as error:
        tries.note(error)
        raise
    return done


class _Tries:
    """The attempts at one transaction."""

    def __init__(
        self, cluster: Cluster, attempts: int | None, timeout: float | None
    ) -> None:
        if attempts is not None and attempts < 1:
            raise ConfigurationError(
                f"attempts is {attempts!r}; it is how often the transaction may be"
                " tried, 1 or more, or None for no bound."
            )
        self._cluster = cluster
        self._attempts = attempts
        self._timeout = timeout
        self._began = time.monotonic()
        self._failed = 0
        self._session: Any = None
        self.fn_has_returned = False

    def begin(self, session: Any) -> Any:
        """Take the session of the next attempt."""
        sync: Any = getattr(session, "sync_session", session)
        if getattr(sync, "_cluster", None) is not self._cluster:
            session_type = type(session).__name__
            raise ConfigurationError(
                f"sessionmaker makes a {session_type} that is not of this cluster; give"
                " one that cluster.sessionmaker() or cluster.async_sessionmaker() made."
            )
        if self._session is not None:
            self._cluster._transactions.counters.add("run.retries")
        self._session = sync
        self.fn_has_returned = False
        return session

    def retrying(self, attempt: Callable[[], Any]) -> Callable[[], Any]:
        """Return *attempt* as one that is repeated where that is safe."""
        import stamina  # only here: most programs import shardalchemy without it

        return stamina.retry(
            on=self._backoff, attempts=self._attempts, timeout=self._timeout
        )(attempt)

    def note(self, error: Exception) -> None:
        """Say in *error* how often the transaction was tried, if more than once."""
        if self._failed > 1:
            seconds = time.monotonic() - self._began
            error.add_note(f"after {self._failed} attempts in {seconds:.1f} s")

    def _may_run_again(self, error: BaseException) -> bool:
        began = self._session is not None and self._session._commit_began
        if began and not self.fn_has_returned:
            return False  # it has committed by itself, and gone on
        return may_run_again(error, commit_began=began)

    def _backoff(self, error: BaseException) -> bool | float:
        """Return for how many seconds to wait before the next attempt, or False."""
        self._failed += 1
        if not self._may_run_again(error):
            return False
        bound = min(_LAST_BOUND, _FIRST_BOUND * 2 ** min(self._failed - 1, 10))
        wait = random.uniform(0, bound)
        if self._timeout is None:
            return wait
        left = self._timeout - (time.monotonic() - self._began)
        return max(0.0, min(wait, left))


def _name(fn: Callable[..., object]) -> str:
    return getattr(_inner(fn), "__qualname__", type(fn).__qualname__)


def _inner(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _named_after(fn: Callable[..., object]) -> Callable[[Any], Any]:
    """Give the application's function's name, which stamina's hooks report."""

    def name(attempt: Any) -> Any:
        attempt.__qualname__ = _name(fn)
        attempt.__module__ = getattr(_inner(fn), "__module__", __name__)
        return attempt

    return name
