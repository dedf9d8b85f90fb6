"""What ``cluster.snapshot()`` returns: a snapshot to be opened by ``with``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.util import greenlet_spawn

from shardalchemy.errors import ConfigurationError
from shardalchemy.readonly import SnapshotSession

if TYPE_CHECKING:
    from shardalchemy.asyncio import AsyncSnapshotSession
    from shardalchemy.cluster import Cluster

__all__ = ["Snapshot"]


class Snapshot:
    """One moment of all shards, for ``with`` and for ``async with``; once."""

    def __init__(
        self, cluster: Cluster, *, timeout: float, strict: bool, options: dict[str, Any]
    ) -> None:
        self._cluster = cluster
        self._timeout = timeout
        self._strict = strict
        self._options = options
        self._session: Any = None

    def __enter__(self) -> SnapshotSession:
        made = SnapshotSession(cluster=self._cluster, **self._options)
        session: SnapshotSession = self._once(made)
        session._open(timeout=self._timeout, strict=self._strict)
        return session

    def __exit__(self, *_: object) -> None:
        self._session.close()

    async def __aenter__(self) -> AsyncSnapshotSession:
        from shardalchemy.asyncio import AsyncSnapshotSession

        made = AsyncSnapshotSession(cluster=self._cluster, **self._options)
        session: AsyncSnapshotSession = self._once(made)
        await greenlet_spawn(
            session.sync_session._open, timeout=self._timeout, strict=self._strict
        )
        return session

    async def __aexit__(self, *error: Any) -> None:
        await self._session.__aexit__(*error)

    def _once(self, session: Any) -> Any:
        if self._session is not None:
            raise ConfigurationError(
                "a snapshot is opened once; call cluster.snapshot() for another."
            )
        self._session = session
        return session
