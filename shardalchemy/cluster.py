"""The cluster: what an application makes one of, and takes its sessions from."""

from __future__ import annotations

import os
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.orm import sessionmaker
from sqlalchemy.util import greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from shardalchemy.catalog import (
    Sequences,
    ShardState,
    Topology,
    function_volatilities,
    guarded_names,
    read_state,
)
from shardalchemy.creation import agreed, create_all
from shardalchemy.engine import Bindings, OneAtATime, ShardEngines
from shardalchemy.errors import (
    CatalogVersionError,
    ConfigurationError,
    ShardKeyError,
)
from shardalchemy.guards import ScatterGuard, checked_timeout
from shardalchemy.isolation import checked_level
from shardalchemy.locks import RowLocks
from shardalchemy.retry import ATTEMPTS, TIMEOUT, run, run_async
from shardalchemy.schema import Kind, checked, placement_of
from shardalchemy.session import ShardedSession, sessions_of
from shardalchemy.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy import URL, Engine, MetaData
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    from shardalchemy.asyncio import AsyncShardedSession
    from shardalchemy.commit import Ack, Commit, Listing, RecoveryReport, Transactions
    from shardalchemy.guards import Scatter
    from shardalchemy.planner import Analyser, Plan

__all__ = ["Cluster"]

_clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()

S = TypeVar("S", bound=ShardedSession)
A = TypeVar("A", bound="AsyncShardedSession")
T = TypeVar("T")


class Cluster:
    """The shards of one application, and what its sessions share.

    *shards* maps short stable names to URLs, engines or connections; the first is the
    home shard of a cluster that is created with it. *redis* is a URL of the Redis or
    Valkey in which hot rows are queued for. *ack* says when a cross-shard commit
    returns: ``"committed"`` everywhere, or as soon as all shards have ``"prepared"``.
    *max_connections* bounds the connections this process opens to all shards together,
    but for one a shard by which waits are looked at while sessions wait.
    *gather_max_rows* bounds the rows that a statement may bring from all shards to one,
    where it cannot be answered otherwise.
    *scatter* says what becomes of a statement whose shard keys nothing pins, so that it
    runs on every shard: ``"allow"`` it, ``"warn"`` with its plan (`ScatterWarning`), or
    ``"forbid"`` it (`UnsupportedQueryError`). Keys in an ``IN`` are pinned, however
    many. *scatter_loop* is after how many executions of one such statement in one
    transaction there is a warning, once in this process; 0 for never. A session, a
    statement or a call says otherwise by ``execution_options(scatter=…)``, also for the
    relationships that are loaded with it.
    *statement_timeout* bounds each statement of a session, in seconds, from when it is
    executed until all shards have answered: past it, it is cancelled on every shard and
    raises `StatementTimeout`. ``execution_options(timeout=…)`` says otherwise, None for
    no bound. Flushes, commits and the later rows of a streamed result take their time.
    *recover_in_background* lets a thread of this process look every few seconds for
    transactions that other processes have left prepared, and finish them.
    *resolve_commits* lets a commit on one shard leave a marker, as those on several do,
    in the message of its COMMIT: if the reply is lost, it is known all the same whether
    it has committed. Without it that is an error of the connection, as in a plain
    ``Session``.
    Other options are passed to ``create_engine`` for each shard: ``pool_size``,
    ``max_overflow``, ``echo``, ``connect_args``.

        cluster = Cluster({"s1": "postgresql+psycopg://…", "s2": "…"})
        cluster.create_all(Base.metadata)
        Session = cluster.sessionmaker()

    Nothing is sent to a server before something asks. One cluster serves any number of
    threads and event loops, and goes on in a process that is forked, with connections
    of its own, but for engines that were given to it; close it at the end, or use it as
    a context manager.
    """

    def __init__(
        self,
        shards: Mapping[str, str | URL | Engine | AsyncEngine | Connection],
        *,
        redis: str | None = None,
        ack: Ack = "committed",
        max_connections: int | None = None,
        gather_max_rows: int = 100_000,
        scatter: Scatter = "allow",
        scatter_loop: int = 100,
        statement_timeout: float | None = None,
        recover_in_background: bool = True,
        resolve_commits: bool = True,
        **engine_options: Any,
    ) -> None:
        if not shards:
            raise ConfigurationError("a cluster needs at least one shard.")
        for name in shards:
            if not name.isidentifier():
                raise ConfigurationError(
                    f"{name!r} cannot be a shard's name: use letters, digits and _."
                )
        self.ack = ack
        self.gather_max_rows = gather_max_rows
        self.statement_timeout = checked_timeout(
            statement_timeout, "Cluster(statement_timeout=…)"
        )
        self.resolve_commits = resolve_commits
        self._recover_in_background = recover_in_background
        self._scatter_guard = ScatterGuard(scatter, scatter_loop)
        self._shards = ShardEngines(
            shards, max_connections=max_connections, **engine_options
        )
        self._sync = Bindings(self._shards, is_async=False)
        self._async = Bindings(self._shards, is_async=True)
        self._working_in: int | None = None
        self._known: Topology | None = None
        self._loading = OneAtATime()
        self._sequences = Sequences()
        self._row_locks = RowLocks(redis, lambda: self.topology.cluster)
        _clusters.add(self)

    # The planner and the commit protocol are imported by the first that needs them: a
    # program that only opens a session on its home shard starts the sooner.

    @cached_property
    def _analyser(self) -> Analyser:
        from shardalchemy import planner

        return planner.Analyser(self._function_volatilities)

    def _function_volatilities(self) -> Mapping[str, str]:
        # Asked within a session's statement: with engines of that session's kind.
        engines = self._async if in_greenlet() else self._sync
        with engines.connect(self.topology.home) as connection:
            return function_volatilities(connection)

    @cached_property
    def _transactions(self) -> Transactions:
        from shardalchemy import commit

        this = weakref.ref(self)
        return commit.Transactions(
            self._shards.connect_in_background,
            lambda: self.topology,
            self._shards.connect_beside,
            lambda: sessions_of(this()),
        )

    def _work_in_background(self) -> None:
        """Begin what goes on beside the sessions of this process; at each transaction.

        That is nothing with one shard, nor where one was given as a connection, which
        has no second one that could be asked.
        """
        # A fork has to start its own threads.
        if self._working_in != (process := os.getpid()):
            self._working_in = process
            if len(self._shards.names) > 1 and not self._shards.has_connections:
                self._transactions.waits.start()
                if self._recover_in_background:
                    self._transactions.patrol.start()

    def _forked(self) -> None:
        """Begin anew what a fork cannot share with its parent."""
        self._shards.forked()
        self._loading = OneAtATime()
        vars(self).pop("_transactions", None)

    def __repr__(self) -> str:
        return f"Cluster({', '.join(self._shards.names)})"

    # -- setting up ------------------------------------------------------------------

    def create_all(self, metadata: MetaData) -> None:
        """Create what is missing: the catalog, the tables, the ownership checks.

        Sharded and reference tables are made on every shard, other tables on the home
        shard. All of it is one transaction over all shards, and may be repeated.

        Raises DeclarationError where a model cannot be kept as declared, and
        ConfigurationError where a server cannot be used, with nothing changed.
        """
        self._create_all(metadata, self._sync)

    async def create_all_async(self, metadata: MetaData) -> None:
        """Do what `create_all` does, over the async engines."""
        await greenlet_spawn(self._create_all, metadata, self._async)

    def _create_all(self, metadata: MetaData, engines: Bindings) -> None:
        placements = checked(metadata)
        self._known = create_all(
            metadata,
            placements,
            engines,
            self._shards,
            lambda topology, members: self._transactions.commit(
                topology, members, ack="committed"
            ),
        )
        self._analyser.guard(
            f"{p.table.schema or 'public'}.{p.table.name}"
            for p in placements
            if p.kind is not Kind.HOME
        )
        self._analyser.see(p.table for p in placements)

    # -- sessions --------------------------------------------------------------------

    @overload
    def sessionmaker(self, **options: Any) -> sessionmaker[ShardedSession]: ...

    @overload
    def sessionmaker(self, class_: type[S], **options: Any) -> sessionmaker[S]: ...

    def sessionmaker(self, class_: Any = ShardedSession, **options: Any) -> Any:
        """Return a ``sqlalchemy.orm.sessionmaker`` of this cluster's sessions.

        Takes what SQLAlchemy's takes, ``ack`` and ``isolation_level``. *class_* is
        `ShardedSession` or a subclass of it.
        """
        if not issubclass(class_, ShardedSession):
            raise ConfigurationError(
                f"class_ is {class_.__name__}; it must be a subclass of ShardedSession."
            )
        if options.get("isolation_level") is not None:
            checked_level(options["isolation_level"])
        return sessionmaker(class_=class_, cluster=self, **options)

    def async_sessionmaker(self, **options: Any) -> async_sessionmaker[Any]:
        """Return an ``async_sessionmaker`` of this cluster's async sessions."""
        from sqlalchemy.ext.asyncio import async_sessionmaker

        from shardalchemy.asyncio import AsyncShardedSession

        class_: type[AsyncShardedSession] = options.pop("class_", AsyncShardedSession)
        if not issubclass(class_, AsyncShardedSession):
            raise ConfigurationError(
                f"class_ is {class_.__name__}; it must be a subclass of"
                " AsyncShardedSession."
            )
        if options.get("isolation_level") is not None:
            checked_level(options["isolation_level"])
        return async_sessionmaker(class_=class_, cluster=self, **options)

    def run(
        self,
        fn: Callable[[S], T],
        *,
        sessionmaker: Callable[[], S] | None = None,
        attempts: int | None = ATTEMPTS,
        timeout: float | None = TIMEOUT,
    ) -> T:
        """Call ``fn(session)`` in one transaction, commit, and return its result.

            def transfer(session):
                session.get_one(Account, 1, with_for_update=True).balance -= 10
                session.get_one(Account, 2, with_for_update=True).balance += 10

            cluster.run(transfer)

        It is run again, in a new session, where that cannot do anything twice: after a
        serialization failure, a deadlock, TopologyChanged, TransactionAborted, when a
        server has no slot for a prepared transaction, and when a connection was lost,
        or could not be made, before any shard was asked to commit. Never after
        CommitOutcomeUnknown or a reply to a commit that was lost, nor after an error of
        the application. So *fn* may be called several times, and should do nothing that
        a rollback does not undo; it leaves the commit to this.

        *sessionmaker* is what ``cluster.sessionmaker(…)`` returned, for sessions with
        options: ``expire_on_commit=False`` where *fn* returns objects. *attempts* and
        *timeout*, in seconds from the first attempt to the last one's start, bound the
        repetition; None for no bound. Between attempts it waits for a random time, up
        to 0.05 s at first and 2 s at last, by stamina: its hooks are called, and
        ``stamina.set_active(False)`` and ``stamina.set_testing(True)`` hold. What the
        last attempt raised is raised.
        """
        maker: Any = sessionmaker or self.sessionmaker()
        return run(self, fn, maker, attempts=attempts, timeout=timeout)

    async def run_async(
        self,
        fn: Callable[[A], Awaitable[T]],
        *,
        sessionmaker: Callable[[], A] | None = None,
        attempts: int | None = ATTEMPTS,
        timeout: float | None = TIMEOUT,  # noqa: ASYNC109
    ) -> T:
        """Do what `run` does with ``await fn(session)``, in an async session."""
        maker: Any = sessionmaker or self.async_sessionmaker()
        return await run_async(self, fn, maker, attempts=attempts, timeout=timeout)

    def snapshot(
        self, *, timeout: float = 10.0, strict: bool = False, **options: Any
    ) -> Snapshot:
        """Return a read-only session of one moment of all shards, for ``with``.

            with cluster.snapshot() as session:
                session.scalar(select(func.sum(Account.balance)))

        ``async with`` gives an async one. It has a transaction on every shard from the
        start, REPEATABLE READ and READ ONLY, and ends with it: after a commit, rollback
        or close a statement raises `SnapshotOver`. ``session.export()`` returns what
        ``pg_dump --snapshot=`` takes. *timeout* is how many seconds the opening may
        take; connecting to a server takes as long as ``connect_timeout`` lets it.
        *options* are those of a session.

        What is promised: a transaction over several shards is wholly visible or not at
        all; on each shard there is the one moment that PostgreSQL's REPEATABLE READ
        gives; and what has returned from its commit is visible, but with
        ``ack="prepared"`` perhaps not yet, unless ``after=`` its commit token. What is
        not: an order between transactions on different shards. Of two, each on one
        shard, the later may be visible and the earlier not, if both commit while the
        snapshot is opened.

        With *strict* what had returned from its commit is visible whatever its ``ack``,
        and with each transaction all those whose commits had returned before its own
        began. Commits that begin while the snapshot is opened wait for that, some
        milliseconds and at most two tenths of a second at a time; a second connection
        to each shard is taken for so long. Outside of this order is what does not
        commit through a ShardedSession, and what does so on one shard alone and has
        written only to tables that are not sharded, only past the session (on its
        ``connection()``), or with ``resolve_commits=False``.

        Raises SnapshotUnavailable if a shard cannot be reached, or the timeout passes.
        SnapshotReadOnly is what a write in the session raises.
        """
        return Snapshot(self, timeout=timeout, strict=strict, options=options)

    def _engines_for(self, is_async: bool) -> Bindings:
        return self._async if is_async else self._sync

    # -- the topology ----------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """The topology as this process knows it; read from the shards when first used.

        In an event loop, read it after the first statement of an async session.
        """
        return self._topology_for(self._sync)

    def _topology_for(self, engines: Bindings) -> Topology:
        known = self._known
        if known is not None:
            return known
        with self._loading.held(is_async=engines.is_async):
            return self._known or self._load(engines)

    def _load(self, engines: Bindings) -> Topology:
        states: dict[str, ShardState] = {}
        for name in engines.shards:
            with engines.connect(name) as connection:
                states[name] = read_state(connection)
                if states[name].topology is not None:
                    self._analyser.guard(guarded_names(connection))
        topology = agreed(states)
        if topology is None:
            raise ConfigurationError(
                "the shards have no shardalchemy catalog yet. Call"
                " cluster.create_all(metadata) once, before the first session."
            )
        older = [name for name, state in states.items() if state.is_outdated]
        if older:
            raise CatalogVersionError(
                f"shard {', '.join(older)} has a catalog of an older version. Call"
                " cluster.create_all(metadata) once, which brings it up to date."
            )
        self._known = topology
        self._work_in_background()
        return topology

    def shard_for(self, entity: Any, key: Any) -> str:
        """Return the name of the shard on which rows with this shard key live.

        *entity* is a mapped class or a table; *key* the value of its shard key.
        """
        inspected = inspect(entity)
        table = getattr(inspected, "local_table", inspected)
        if not isinstance(table, Table):
            raise ConfigurationError(
                f"{entity!r} is neither a mapped class nor a table"
            )
        placement = placement_of(table)
        if placement.kind is Kind.HOME:
            return self.topology.home
        if placement.pin is None:
            raise ShardKeyError(f"{table} is a reference table: it is on every shard.")
        slot = placement.pin.slot(key)
        if slot is None:
            raise ShardKeyError(
                f"{key!r} is no key of {table}; it must be {placement.pin.accepts}."
            )
        return self.topology.owner(slot)

    def explain(self, statement: Any, params: Mapping[str, Any] | None = None) -> Plan:
        """Return on which shards *statement* would run, and why."""
        with ShardedSession(cluster=self) as session:
            return session.explain(statement, params)

    # -- commits ---------------------------------------------------------------------

    def _commit(self, connections: Mapping[str, Connection], ack: Ack) -> Commit:
        assert self._known is not None
        return self._transactions.commit(self._known, connections, ack)

    def _commit_alone(self, shard: str, connection: Connection) -> None:
        assert self._known is not None
        self._transactions.commit_alone(self._known, shard, connection)

    def recover(self, *, grace: float = 3.0) -> RecoveryReport:
        """Finish what crashed processes have left prepared.

        Looks at transactions of this cluster that were prepared over *grace* seconds
        ago; commits those that all participants prepared, rolls the others back. One
        with a participant that cannot be reached stays in doubt until it can.
        """
        return self._transactions.recover(grace)

    def prepared_transactions(self, *, grace: float = 60.0) -> Listing:
        """Return what is prepared on the shards, and what recovery waits for.

        Each has its ``gid``, ``age``, ``state`` and ``participants``; what others have
        prepared is there as ``"foreign"``. Nothing is changed. *grace* is that of
        `recover`. In an event loop use `prepared_transactions_async`.
        """
        from shardalchemy.commit.listing import prepared_transactions

        return prepared_transactions(self._sync.connect, self.topology, grace)

    async def prepared_transactions_async(self, *, grace: float = 60.0) -> Listing:
        """Do what `prepared_transactions` does, without holding up the event loop."""
        import asyncio

        return await asyncio.to_thread(self.prepared_transactions, grace=grace)

    @property
    def counters(self) -> Mapping[str, int]:
        """What has become of this process's transactions: counts by name, as of now.

        ``commits.2``, ``aborts``, ``lost_replies``, ``recovery.committed``: all names
        are explained in ``shardalchemy.commit.counters``.
        """
        return self._transactions.counters.read()

    # -- the end -----------------------------------------------------------------------

    def close(self) -> None:
        """Finish pending commits, and close the connections opened here."""
        self._working_in = None
        if "_transactions" in vars(self):
            self._transactions.close()
        self._row_locks.close()
        self._shards.dispose()

    async def aclose(self) -> None:
        """Do what `close` does, for async sessions as well."""
        import asyncio

        self._working_in = None
        if "_transactions" in vars(self):
            await asyncio.to_thread(self._transactions.close)
        await self._row_locks.aclose()
        await self._shards.dispose_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _forked() -> None:
    for cluster in list(_clusters):
        cluster._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
