"""Hot rows: the turn in Redis first, then the row ``FOR UPDATE``."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import exc as sa_exc
from sqlalchemy import inspect, text

from shardalchemy.errors import LockTimeout
from shardalchemy.locks.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardalchemy.locks.turns import Turn

__all__ = ["RowLocks"]

logger = logging.getLogger(__name__)

_SET_TIMEOUT = text(
    "SELECT current_setting('lock_timeout'), set_config('lock_timeout', :timeout, true)"
)
_RESTORE_TIMEOUT = text("SELECT set_config('lock_timeout', :timeout, true)")


class RowLocks:
    """Locks rows for the sessions of a cluster.

    *redis* is None where rows are locked by PostgreSQL alone; *cluster* returns the
    cluster's id, which keeps the keys of clusters that share a Redis apart.
    """

    def __init__(self, redis: str | None, cluster: Callable[[], str]) -> None:
        self._turns = None if redis is None else Turns(redis)
        self._cluster = cluster
        self._warned = False

    def lock(self, session: Any, entity: Any, ident: Any, timeout: float) -> Any:
        """Return the row, locked; see ``ShardedSession.lock_row``."""
        deadline = time.monotonic() + timeout
        mapper = inspect(entity)
        if isinstance(ident, dict):
            columns = mapper.primary_key
            ident = [ident[mapper.get_property_by_column(c).key] for c in columns]
        identity = tuple(ident) if isinstance(ident, tuple | list) else (ident,)
        name = f"{mapper.local_table.fullname}:{identity!r}"
        shard = session._shard_of_identity(mapper, ident)
        turn = self._turn(session, name, deadline)
        if turn is not None:
            session._turns.append(turn)
        return self._locked_row(session, entity, ident, name, shard, deadline)

    def _turn(self, session: Any, name: str, deadline: float) -> Turn | None:
        if self._turns is None:
            return None
        session._topology()
        key = f"shardalchemy:{self._cluster()}:row:{name}"
        if any(turn.key == key for turn in session._turns):
            return None  # this session has the turn already
        acquire = (
            self._turns.acquire_in_loop if session._is_async else self._turns.acquire
        )
        from redis import RedisError

        try:
            turn = acquire(key, deadline)
        except (RedisError, OSError) as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "Redis is away, hot rows are locked by PostgreSQL alone: %s", error
                )
            return None
        if turn is None:
            raise LockTimeout(f"the turn of {name} did not come within the timeout.")
        return turn

    def _locked_row(
        self,
        session: Any,
        entity: Any,
        ident: Any,
        name: str,
        shard: str,
        deadline: float,
    ) -> Any:
        options = {"shard": shard}
        left = max(1, int((deadline - time.monotonic()) * 1000))
        before = session.execute(
            _SET_TIMEOUT, {"timeout": f"{left}ms"}, execution_options=options
        ).one()[0]
        try:
            row = session.get(
                entity,
                ident,
                with_for_update=True,
                populate_existing=True,
                execution_options={"timeout": None},  # this wait has its own
            )
        except sa_exc.OperationalError as error:
            if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise LockTimeout(
                    f"{name} stayed locked by another transaction for the whole"
                    " timeout; roll back and try again."
                ) from error
            raise
        session.execute(
            _RESTORE_TIMEOUT, {"timeout": before}, execution_options=options
        )
        if row is None:
            raise sa_exc.NoResultFound(f"no row of {name}")
        return row

    def close(self) -> None:
        """End the renewals of turns and close the connections to Redis."""
        if self._turns is not None:
            self._turns.close()

    async def aclose(self) -> None:
        """Do what `close` does, for the running event loop as well."""
        if self._turns is not None:
            await self._turns.aclose()
