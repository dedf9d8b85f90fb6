"""The drop-in session for ``asyncio``: a thin proxy over `ShardedSession`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import EMPTY_DICT, greenlet_spawn

from shardalchemy.session import ShardedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardalchemy.planner import Plan

__all__ = ["AsyncShardedSession"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _SyncShardedSession(ShardedSession):
    """The session within an `AsyncShardedSession`; it runs under a greenlet."""

    _is_async = True


class AsyncShardedSession(AsyncSession):
    """An AsyncSession over a cluster; made by ``Cluster.async_sessionmaker()``."""

    sync_session_class = _SyncShardedSession
    sync_session: _SyncShardedSession

    async def run_sync(
        self,
        fn: Callable[Concatenate[ShardedSession, P], R],
        *arg: P.args,
        **kw: P.kwargs,
    ) -> R:
        """Call ``fn(sync_session, …)`` under a greenlet; ``AsyncSession.run_sync``."""
        return await super().run_sync(fn, *arg, **kw)  # type: ignore[arg-type]

    async def lock_row(
        self,
        entity: type[T],
        ident: Any,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109
    ) -> T:
        """Wait for the row's turn, then return it locked; `ShardedSession.lock_row`."""
        return await greenlet_spawn(
            self.sync_session.lock_row, entity, ident, timeout=timeout
        )

    async def explain(
        self,
        statement: Any,
        params: Mapping[str, Any] | None = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY_DICT,
    ) -> Plan:
        """Return on which shards *statement* would run; `ShardedSession.explain`."""
        return await greenlet_spawn(
            self.sync_session.explain,
            statement,
            params,
            execution_options=execution_options,
        )
