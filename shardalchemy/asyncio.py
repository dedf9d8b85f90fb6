"""The drop-in session for ``asyncio``: a thin proxy over `ShardedSession`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import EMPTY_DICT, greenlet_spawn

from shardalchemy.readonly import SnapshotSession
from shardalchemy.session import ShardedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

    from shardalchemy.cluster import Cluster
    from shardalchemy.planner import Plan

__all__ = ["AsyncShardedSession", "AsyncSnapshotSession"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class AsyncShardedSession(AsyncSession):
    """An AsyncSession over a cluster; made by ``Cluster.async_sessionmaker()``."""

    sync_session_class = ShardedSession
    sync_session: ShardedSession

    def __init__(self, bind: None = None, *, cluster: Cluster, **options: Any) -> None:
        self._cluster = cluster
        super().__init__(bind, cluster=cluster, is_async=True, **options)

    @property
    def bind(self) -> AsyncEngine:
        """The home shard's engine, which is what an unannotated model is bound to."""
        return self._cluster._shards.asynchronous(self._cluster.topology.home)

    @bind.setter
    def bind(self, value: object) -> None:
        """Ignore what AsyncSession sets: the cluster decides."""

    @property
    def commit_token(self) -> str | None:
        """What another session takes as ``after=``; `ShardedSession.commit_token`."""
        return self.sync_session.commit_token

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


class AsyncSnapshotSession(AsyncShardedSession):
    """An AsyncShardedSession that reads one moment of all shards; `SnapshotSession`."""

    sync_session_class = SnapshotSession
    sync_session: SnapshotSession

    async def export(self) -> dict[str, str]:
        """Return by shard the id of this snapshot; `SnapshotSession.export`."""
        return await greenlet_spawn(self.sync_session.export)
