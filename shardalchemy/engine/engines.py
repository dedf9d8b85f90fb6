"""An engine per shard, made when first used, with one bound over all of them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.util import await_only

from shardalchemy.errors import ConfigurationError, UnknownShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Bindings", "ShardEngines"]


class ShardEngines:
    """The engines of a cluster's shards, sync and async.

    A shard is given as a URL, as an ``Engine`` or ``AsyncEngine`` (its pool and
    settings stay the caller's) or as a ``Connection`` (a test's outer transaction).
    ``max_connections`` bounds the connections open to all shards together, idle ones
    included, of the engines made here; an idle one of another shard makes room.
    """

    def __init__(
        self,
        shards: Mapping[str, str | URL | Engine | AsyncEngine | Connection],
        *,
        max_connections: int | None = None,
        pool_timeout: float = 30.0,
        **engine_options: Any,
    ) -> None:
        self._urls: dict[str, URL] = {}
        self._sync: dict[str, Engine | Connection] = {}
        self._async: dict[str, AsyncEngine] = {}
        self._owned: list[Engine | AsyncEngine] = []
        self._beside: dict[str, Engine] = {}
        self._connects: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._options = {"pool_timeout": pool_timeout, **engine_options}
        self._budget = (
            _ConnectionBudget(max_connections, pool_timeout)
            if max_connections is not None
            else None
        )
        self._lock = threading.Lock()
        for name, shard in shards.items():
            self._add(name, shard)
        if len(self._urls) > 1:
            self._refuse_autocommit(engine_options)

    def _add(self, name: str, shard: Any) -> None:
        if isinstance(shard, Engine | Connection):
            _require_psycopg(name, shard.engine.url)
            self._sync[name] = shard
            self._urls[name] = shard.engine.url
        elif hasattr(shard, "sync_engine"):
            _require_psycopg(name, shard.url)
            self._async[name] = shard
            self._urls[name] = shard.url.set(drivername="postgresql+psycopg")
            event.listen(shard.sync_engine, "do_connect", partial(self._note, name))
        else:
            url = make_url(shard)
            if url.drivername == "postgresql":
                url = url.set(drivername="postgresql+psycopg")
            _require_psycopg(name, url)
            self._urls[name] = url

    def _refuse_autocommit(self, engine_options: Mapping[str, Any]) -> None:
        given: dict[str, Any] = {s: e.sync_engine for s, e in self._async.items()}
        given.update(self._sync)
        for name in self._urls:
            bind = given.get(name)
            if bind is None:
                levels = [
                    engine_options.get("isolation_level"),
                    engine_options.get("execution_options", {}).get("isolation_level"),
                ]
            else:
                levels = [
                    bind.dialect._on_connect_isolation_level,
                    bind.get_execution_options().get("isolation_level"),
                ]
            if "AUTOCOMMIT" in levels:
                raise ConfigurationError(
                    f"shard {name} has isolation_level AUTOCOMMIT, in which nothing can"
                    " be committed on several shards together. Leave it out."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all shards, in the order given."""
        return tuple(self._urls)

    def url(self, shard: str) -> URL:
        """Return the URL of *shard*, with its password."""
        try:
            return self._urls[shard]
        except KeyError:
            raise UnknownShardError(
                f"there is no shard {shard!r}; the cluster was given"
                f" {', '.join(self._urls)}."
            ) from None

    def sync(self, shard: str) -> Engine | Connection:
        """Return *shard*'s engine, or the connection it was given as."""
        found = self._sync.get(shard)
        if found is None:
            url = self.url(shard)
            with self._lock:
                found = self._sync.get(shard)
                if found is None:
                    options = self._named(shard)
                    if shard in self._async:
                        options["creator"] = partial(self._connect_alike, shard)
                    found = create_engine(url, **options)
                    self._keep(found, found)
                    self._sync[shard] = found
        return found

    def _note(self, shard: str, _: Any, __: Any, args: Any, options: Any) -> None:
        """Note how a given AsyncEngine connects, for the sync one beside it."""
        self._connects[shard] = (tuple(args), dict(options))

    def _connect_alike(self, shard: str) -> psycopg.Connection[Any]:
        """Open a sync connection as the AsyncEngine that *shard* was given as does."""
        url = self.url(shard)
        args, options = self._connects.get(
            shard
        ) or url.get_dialect()().create_connect_args(url)
        for name in ("async_creator_fn", "async_fallback"):
            options.pop(name, None)
        return psycopg.connect(*args, **options)

    def asynchronous(self, shard: str) -> AsyncEngine:
        """Return *shard*'s async engine."""
        found = self._async.get(shard)
        if found is None:
            if isinstance(self._sync.get(shard), Connection):
                raise ConfigurationError(
                    f"shard {shard} was given as a Connection, which an async session"
                    " cannot use; give an AsyncEngine or a URL."
                )
            from sqlalchemy.ext.asyncio import create_async_engine

            url = self.url(shard)
            with self._lock:
                found = self._async.get(shard)
                if found is None:
                    found = create_async_engine(url, **self._named(shard))
                    self._keep(found, found.sync_engine)
                    self._async[shard] = found
        return found

    @property
    def has_connections(self) -> bool:
        """Whether a shard was given as a connection, which is all there is to it."""
        return any(isinstance(given, Connection) for given in self._sync.values())

    def connect_beside(self, shard: str) -> psycopg.Connection[Any]:
        """Open a connection to *shard* as its pool would, but not out of the pool.

        Nor is it bounded by ``max_connections``: it is for what must get through when
        sessions hold all connections that there may be.
        """
        pool = self.sync(shard).engine.pool
        with nullcontext() if self._budget is None else self._budget.lifted():
            return cast(
                "psycopg.Connection[Any]", pool._invoke_creator(cast("Any", None))
            )

    def connect_in_background(self, shard: str) -> Connection:
        """Open a connection to *shard* for what no session does, and none must hold up.

        It is the pool's where the pool has one to spare, and no pool's otherwise.
        """
        engine = self.sync(shard).engine
        pool = engine.pool
        if isinstance(pool, QueuePool) and (
            pool.checkedin() > 0
            or (self._budget is None and pool.checkedout() < pool.size())
        ):
            return engine.connect()
        beside = self._beside.get(shard)
        if beside is None:
            beside = create_engine(
                "postgresql+psycopg://",
                creator=lambda: self.connect_beside(shard),
                poolclass=NullPool,
            )
            self._beside[shard] = beside
        return beside.connect()

    def _named(self, shard: str) -> dict[str, Any]:
        return {"logging_name": shard, "pool_logging_name": shard, **self._options}

    def _keep(self, engine: Engine | AsyncEngine, sync_engine: Engine) -> None:
        self._owned.append(engine)
        if self._budget is not None:
            self._budget.cover(sync_engine)

    def forked(self) -> None:
        """Leave the connections to the parent, in a process that was just forked."""
        self._lock = threading.Lock()
        for engine in self._owned:
            sync_engine = engine if isinstance(engine, Engine) else engine.sync_engine
            sync_engine.dispose(close=False)

    def dispose(self) -> None:
        """Close the idle connections of the sync engines that were made here."""
        for engine in self._owned:
            if isinstance(engine, Engine):
                engine.dispose()

    async def dispose_async(self) -> None:
        """Close the idle connections of all engines that were made here."""
        self.dispose()
        for engine in self._owned:
            if not isinstance(engine, Engine):
                await engine.dispose()


class Bindings:
    """The engines as sessions use them: all sync, or all async under a greenlet."""

    def __init__(self, engines: ShardEngines, *, is_async: bool) -> None:
        self._engines = engines
        self._bound: dict[str, Engine | Connection] = {}
        self.is_async = is_async
        self.names: dict[Engine, str] = {}
        """The shard of each engine that has been used."""

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of all shards, in the order given."""
        return self._engines.names

    def of(self, shard: str) -> Engine | Connection:
        """Return *shard*'s engine; raise UnknownShardError if there is none."""
        try:
            return self._bound[shard]
        except KeyError:
            bound = (
                self._engines.asynchronous(shard).sync_engine
                if self.is_async
                else self._engines.sync(shard)
            )
            self.names[bound.engine] = shard
            self._bound[shard] = bound
            return bound

    def connect(self, shard: str) -> Connection:
        """Open a connection to *shard* outside of any session."""
        return self.of(shard).engine.connect()


def _require_psycopg(name: str, url: URL) -> None:
    if url.drivername not in ("postgresql+psycopg", "postgresql+psycopg_async"):
        raise ConfigurationError(
            f"shard {name} uses {url.drivername!r}; shardalchemy drives PostgreSQL"
            " through psycopg 3. Write postgresql+psycopg://…"
        )


class _ConnectionBudget:
    """How many connections may be open to all shards of a process together."""

    def __init__(self, limit: int, timeout: float) -> None:
        if limit < 1:
            raise ConfigurationError("max_connections must be at least 1")
        self._limit = limit
        self._timeout = timeout
        self._open = 0
        self._lock = threading.Lock()
        self._engines: list[Engine] = []
        self._lifted = threading.local()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Count nothing that this thread opens within a ``with`` block."""
        self._lifted.now = True
        try:
            yield
        finally:
            self._lifted.now = False

    def cover(self, engine: Engine) -> None:
        """Count *engine*'s connections from now on."""
        self._engines.append(engine)
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "close", self._closed)
        event.listen(engine, "close_detached", self._closed)

    def _connect(self, dialect: Any, _record: Any, args: Any, options: Any) -> Any:
        if getattr(self._lifted, "now", False):
            return dialect.connect(*args, **options)
        deadline = time.monotonic() + self._timeout
        while not self._take():
            if time.monotonic() > deadline:
                raise sa_exc.TimeoutError(
                    f"all {self._limit} connections that the cluster's max_connections"
                    f" allows are in use; waited {self._timeout:.0f} s for one"
                )
            if dialect.is_async:
                import asyncio

                await_only(asyncio.sleep(0.01))
            else:
                time.sleep(0.01)
        try:
            return dialect.connect(*args, **options)
        except BaseException:
            self._closed()
            raise

    def _take(self) -> bool:
        with self._lock:
            if self._open < self._limit:
                self._open += 1
                return True
        # The close of an idle connection gives its place back through _closed.
        return self._close_idle() and self._take()

    def _close_idle(self) -> bool:
        for engine in self._engines:
            pool = engine.pool
            if isinstance(pool, QueuePool) and pool.checkedin():
                # Taking the record out of the queue is what keeps another thread from
                # checking it out meanwhile; SQLAlchemy has no public way to say it.
                try:
                    record = pool._pool.get(False)
                except Exception:
                    continue  # another thread was faster
                record.close()
                pool._dec_overflow()
                return True
        return False

    def _closed(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
