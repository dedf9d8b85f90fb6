"""The same application under each peer: sessions over the same servers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from sqlalchemy import BigInteger, create_engine, text
from sqlalchemy.ext.horizontal_shard import ShardedSession as HorizontalSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from shardalchemy import Cluster, sharded_by


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "bench_items"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    email: Mapped[str]
    stock: Mapped[int] = mapped_column(default=0)


class Peers:
    """The cluster, and peers that use its servers and its rows."""

    def __init__(self, cluster: Cluster, urls: Mapping[str, str]) -> None:
        self._connect(cluster, urls)
        cluster.create_all(Base.metadata)
        self.ids: dict[str, list[int]] = {name: [] for name in urls}
        self.free: dict[str, list[int]] = {name: [] for name in urls}
        for number in range(1, 40_000):
            shard = cluster.shard_for(Item, number)
            stored = len(self.ids[shard]) < 500
            (self.ids if stored else self.free)[shard].append(number)
        with cluster.sessionmaker().begin() as session:
            session.add_all(
                Item(id=n, name=f"item {n}", email=f"{n}@example.com")
                for mine in self.ids.values()
                for n in mine
            )

    def _connect(
        self, cluster: Cluster, urls: Mapping[str, str], **options: Any
    ) -> None:
        self.cluster = cluster
        self.engines = {name: create_engine(u, **options) for name, u in urls.items()}
        self.shards = list(urls)

    @classmethod
    def existing(
        cls,
        cluster: Cluster,
        urls: Mapping[str, str],
        ids: dict[str, list[int]],
        **options: Any,
    ) -> Self:
        """Return the peers of another process, which has made the rows."""
        peers = cls.__new__(cls)
        peers._connect(cluster, urls, **options)
        peers.ids = ids
        return peers

    def plain(self, shard: str, **options: Any) -> sessionmaker[Any]:
        return sessionmaker(self.engines[shard], **options)

    def sharded(self, **options: Any) -> sessionmaker[Any]:
        return self.cluster.sessionmaker(**options)

    def horizontal(self, **options: Any) -> sessionmaker[Any]:
        """SQLAlchemy's own, told to choose as this library does."""
        place = self.cluster.shard_for

        def shard_chooser(mapper: Any, instance: Any, clause: Any = None) -> str:
            return place(Item, instance.id)

        def identity_chooser(mapper: Any, primary_key: Any, **_: Any) -> list[str]:
            return [place(Item, primary_key[0])]

        def execute_chooser(context: Any) -> list[str]:
            for criterion in getattr(context.statement, "_where_criteria", ()):
                value = getattr(getattr(criterion, "right", None), "value", None)
                if isinstance(value, int):
                    return [place(Item, value)]
            return self.shards

        return sessionmaker(
            class_=HorizontalSession,
            shards=self.engines,
            shard_chooser=shard_chooser,
            identity_chooser=identity_chooser,
            execute_chooser=execute_chooser,
            **options,
        )

    def close(self) -> None:
        for engine in self.engines.values():
            with engine.begin() as connection:
                connection.execute(text("DROP TABLE IF EXISTS bench_items"))
            engine.dispose()


def timed_commit(session: Any) -> float:
    """Return the seconds that the session's commit alone takes."""
    start = time.perf_counter()
    session.commit()
    return time.perf_counter() - start
