"""The drop-in session.

`ShardedSession` is a ``sqlalchemy.orm.Session`` that chooses a connection for each
statement and each flushed row. A statement's way: `_execute_internal` asks the planner
(once a cache key) and the topology which shards it needs; one shard means that
SQLAlchemy goes on as ever, with that shard's engine; several mean the same at once on
each, and the rows one after another. A row's way is `_connection_for_row`.

Statements over unannotated tables take SQLAlchemy's own path on the home shard.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, Table, inspect
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.session import SessionTransactionOrigin, _sessions
from sqlalchemy.util import EMPTY_DICT, immutabledict

from shardalchemy.assembly import COMPILED, OneCompiled
from shardalchemy.bulk import save_in_bulk
from shardalchemy.deadlock import raise_deadlock
from shardalchemy.errors import (
    ConfigurationError,
    UnsupportedQueryError,
)
from shardalchemy.explain import explained
from shardalchemy.flush import RowConnections, order_new_by_shard
from shardalchemy.guards import bounded
from shardalchemy.isolation import checked_level
from shardalchemy.routing import (
    check_not_a_copy,
    destination,
    shard_of_identity,
)
from shardalchemy.schema import Kind, placement_of
from shardalchemy.settings import Settings
from shardalchemy.statements import RouteLast, run_statement
from shardalchemy.transaction import ShardedTransaction, check_not_failed
from shardalchemy.unpreparable import Unpreparable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Column
    from sqlalchemy.orm.session import SessionTransaction

    from shardalchemy.catalog import Topology
    from shardalchemy.cluster import Cluster
    from shardalchemy.commit import Ack
    from shardalchemy.commit.waitgraph import Deadlock
    from shardalchemy.engine import Deadline
    from shardalchemy.guards import ScatterCount
    from shardalchemy.planner import Analysis, Plan
    from shardalchemy.visibility import Unseen
    from shardalchemy.writes import Part

__all__ = ["ShardedSession", "sessions_of"]

T = TypeVar("T")

# In a form that reads the same whatever the session's DateStyle is.
_BEGAN_AT = (
    "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'"
)


class ShardedSession(Session):
    """A Session over the shards of a cluster; made by ``Cluster.sessionmaker()``.

    Takes what ``sqlalchemy.orm.Session`` takes, but for ``bind`` and ``twophase``.
    ``ack="prepared"`` returns from a cross-shard commit once it is decided, before
    every shard has carried it out; this session waits for that before it uses those
    shards again, and so does one made with ``after=`` its `commit_token`.

    ``isolation_level="SERIALIZABLE"``, or ``"REPEATABLE READ"``, is that of its
    transactions on every shard that they touch; so is what the first
    ``session.connection(execution_options={"isolation_level": …})`` of a transaction
    says. Each shard is serializable by itself, and a serialization failure on one, also
    while it prepares, rolls back all. There is no serial order over all shards, and
    each is seen as it was when the transaction first came to it: for reads of one
    moment use ``cluster.snapshot()``. ``"AUTOCOMMIT"`` is for one shard at a time.
    """

    # What the watching of waits has found; set in its thread.
    _deadlock: Deadlock | None = None
    _in_doubt: str | None = None

    def __init__(
        self,
        bind: None = None,
        *,
        cluster: Cluster,
        ack: Ack | None = None,
        after: str | None = None,
        isolation_level: str | None = None,
        is_async: bool = False,
        **options: Any,
    ) -> None:
        if bind is not None:
            raise ConfigurationError(
                "a ShardedSession takes its connections from its cluster; give bind="
                " to a plain Session, or the connection to Cluster({name: connection})."
            )
        if options.pop("twophase", False):
            raise ConfigurationError(
                "twophase=True is not needed: a ShardedSession prepares a transaction"
                " on several shards by itself, in a way that can be recovered."
            )
        if ack not in (None, "committed", "prepared"):
            raise ConfigurationError(
                f"ack is {ack!r}; it is 'committed' or 'prepared'."
            )
        self._cluster = cluster
        self._is_async = is_async
        self._engines = cluster._engines_for(is_async)
        self._names = self._engines.names
        self._ack: Ack = ack or cluster.ack
        self._routed: str | None = None
        self._copies: Any = None
        self._written_shards: set[str] = set()
        self._unseen: Unseen | None = None if after is None else _unseen(after)
        self._turns: list[Any] = []
        self._began_at: str | None = None
        self._settings = Settings()
        self._unpreparable = Unpreparable()
        self._scattered: ScatterCount = {}
        self._deadline: Deadline | None = None
        whole = options.get("execution_options")  # SQLAlchemy 2.1 takes them
        if isolation_level is None and whole:
            isolation_level = whole.get("isolation_level")
        self._isolation_level = (
            None if isolation_level is None else checked_level(isolation_level)
        )
        # Whether any shard may have been asked to commit, ever; for `retry`.
        self._commit_began = False
        super().__init__(**options)

    @property
    def bind(self) -> Engine | Connection:
        """The home shard's engine, which is what an unannotated model is bound to."""
        return self._engines.of(self._topology().home)

    @bind.setter
    def bind(self, value: object) -> None:
        if value is not None:
            raise ConfigurationError(
                "a ShardedSession takes its connections from its cluster."
            )

    def _topology(self) -> Topology:
        return self._cluster._topology_for(self._engines)

    # -- transactions ---------------------------------------------------------------

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is None and (begin or self.autobegin):
            self._cluster._work_in_background()
            return ShardedTransaction(
                self,
                SessionTransactionOrigin.BEGIN
                if begin
                else SessionTransactionOrigin.AUTOBEGIN,
            )
        return super()._autobegin_t(begin)

    def _connection_for_bind(
        self, engine: Engine | Connection, execution_options: Any = None, **kw: Any
    ) -> Connection:
        if self._unseen:
            shard = self._names.get(engine.engine)
            if shard is not None and shard not in self._connections_in_use():
                self._unseen.wait(shard, self._engines, self._cluster)
        connection: Connection = super()._connection_for_bind(
            engine, execution_options, **kw
        )
        check_not_failed(self, connection)
        if self._unpreparable:
            self._check_preparable(engine)
        if self._deadline is not None:
            shard = self._names.get(connection.engine)
            if shard is not None:
                self._deadline.cover(shard, connection)
        if self._settings:
            self._settings.repeat(self._names[engine.engine], connection)
        return connection

    def _run_setting(self, run: Any, statement: Any, params: Any) -> Any:
        """Run what changes a setting at home, and wherever the transaction is."""
        result = run(None)
        home = self._topology().home
        self._settings.add(home, statement, params)
        for shard, connection in self._connections_in_use().items():
            self._settings.repeat(shard, connection)
        return result

    def _note_obstacle(
        self, statement: Any, shard: str | None, analysis: Analysis | None
    ) -> None:
        """Note what keeps the transaction on *shard* from being prepared, if it does.

        *analysis* is None where an option has named the shard.
        """
        if analysis is not None:
            obstacle = analysis.obstacle
        else:
            from shardalchemy.planner import obstacle_of

            obstacle = obstacle_of(statement)
        if obstacle is not None:
            where = shard or self._topology().home
            self._unpreparable.add(where, obstacle, self._written_shards)

    def _check_preparable(self, engine: Engine | Connection) -> None:
        if self.connection_callable is not None:  # a flush, which writes
            self._written_shards.add(self._names[engine.engine])
        self._unpreparable.check(self._written_shards)

    def _connections_in_use(self) -> dict[str, Connection]:
        transaction = self._transaction
        if transaction is None:
            return {}
        return {
            self._names[connection.engine]: connection
            for connection, *_ in set(transaction._connections.values())
            if connection.engine in self._names
        }

    def _drivers_in_use(self) -> dict[str, Any]:
        """Return the psycopg connections in use by shard; any thread may ask."""
        transaction: Any = self._transaction
        while transaction is not None and transaction.parent is not None:
            transaction = transaction.parent
        # list() is one step, beside a thread that adds to it.
        members = () if transaction is None else list(transaction._connections.values())
        found = {}
        for connection, *_ in members:
            shard = self._names.get(connection.engine)
            # Connection.connection would connect again where it was lost.
            pooled = connection._dbapi_connection
            driver = None if pooled is None else pooled.driver_connection
            if shard is not None and driver is not None:
                found[shard] = driver
        return found

    def _commit_on(self, connections: Mapping[str, Connection]) -> None:
        """Commit shards that have all been written on; for `ShardedTransaction`."""
        try:
            commit = self._cluster._commit(connections, self._ack)
        except sa_exc.OperationalError as error:
            raise_deadlock(self, error)
            raise
        if commit.done is not None:
            if self._unseen is None:
                self._unseen = _unseen(None)
            self._unseen.add(commit.gid, commit.done, self._topology())

    def _commit_alone(self, shard: str, connection: Connection) -> None:
        """Commit the one shard that has been written on; for `ShardedTransaction`."""
        try:
            self._cluster._commit_alone(shard, connection)
        except sa_exc.OperationalError as error:
            raise_deadlock(self, error)
            raise

    def _forget_transaction(self) -> None:
        """Let others have the rows' turns; for `ShardedTransaction` at its end."""
        self._written_shards.clear()
        self._began_at = None
        self._settings.clear()
        self._unpreparable.clear()
        self._scattered.clear()
        self._deadlock = None
        while self._turns:
            self._turns.pop().release()

    # -- where statements go --------------------------------------------------------

    def get_bind(
        self,
        mapper: Any = None,
        *,
        shard: str | None = None,
        bind: Any = None,
        clause: Any = None,
        **kw: Any,
    ) -> Engine | Connection:
        """Return the engine of a shard, of the home shard where none is called for.

        As *bind_arguments*, ``{"shard": name}`` names one. Raises
        UnsupportedQueryError for a sharded entity without a shard: an entity alone
        does not say where its rows live.
        """
        if shard is not None:
            return self._engines.of(shard)
        if bind is None and mapper is not None:
            entity = inspect(mapper, raiseerr=False)
            table = getattr(getattr(entity, "mapper", entity), "local_table", None)
            if isinstance(table, Table):
                kind = placement_of(table).kind
                if kind is not Kind.HOME:
                    if self._routed is not None:
                        return self._engines.of(self._routed)
                    if kind is Kind.SHARDED:
                        raise UnsupportedQueryError(
                            f"{table} is on several shards, and nothing says which is"
                            " meant. Give bind_arguments={'shard': name} (see"
                            " cluster.shard_for), or use add_all() and select()"
                            " instead of the bulk_* methods."
                        )
        return super().get_bind(mapper, clause=clause, bind=bind, **kw)

    def _execute_internal(self, statement: Any, params: Any = None, **how: Any) -> Any:
        """Run a statement where it belongs.

        Every ``execute``, ``scalars``, ``get`` and lazy load comes through here; *how*
        is what SQLAlchemy's own method takes by keyword.
        """
        if self.connection_callable is not None:
            # A listener's statement within a flush is no row of that flush.
            with self._outside_of_flush():
                return self._execute_internal(statement, params, **how)
        if how.get("_parent_execute_state") is not None:
            return super()._execute_internal(statement, params, **how)
        named = how.get("bind_arguments") or EMPTY_DICT
        if self.dispatch.do_orm_execute and not named.keys() & {"shard", "bind"}:
            # A listener may still change the statement, so the last one routes it.
            how["_add_event"] = RouteLast(how.get("_add_event"))
            return super()._execute_internal(statement, params, **how)
        try:
            with bounded(self, statement, how.get("execution_options", EMPTY_DICT)):
                return self._execute_routed(statement, params, how)
        except sa_exc.OperationalError as error:
            raise_deadlock(self, error)
            raise

    def _execute_routed(self, statement: Any, params: Any, how: dict[str, Any]) -> Any:
        run_here = super()._execute_internal
        bind_arguments = how.get("bind_arguments")
        if bind_arguments and "shard" in bind_arguments:
            check_not_a_copy(statement)
            self._note_obstacle(statement, bind_arguments["shard"], None)
            return self._run_routed(
                lambda _: run_here(statement, params, **how),
                bind_arguments["shard"],
                None,
            )
        if bind_arguments and "bind" in bind_arguments:
            return run_here(statement, params, **how)
        if hasattr(statement, "__clause_element__"):
            statement = statement.__clause_element__()
        options = how.get("execution_options", EMPTY_DICT)
        if isinstance(options.get(COMPILED), OneCompiled):
            # A loader's statement, with the options of the one that it loads for.
            options = {k: v for k, v in options.items() if k != COMPILED}
            how["execution_options"] = immutabledict(options)
        scalar = how.pop("_scalar_result", False)
        given = bind_arguments or EMPTY_DICT

        def run(shard: str | None, part: Part) -> Any:
            nonlocal scalar
            own = how
            if scalar and part.is_whole:
                own, scalar = {**own, "_scalar_result": True}, False
            if part.options:
                own = {**own, "execution_options": {**options, **part.options}}
            if shard is not None:
                own = {**own, "bind_arguments": {**given, "shard": shard}}
            return run_here(part.statement, part.params, **own)

        result = run_statement(self, statement, params, options, run)
        return result.scalar() if scalar else result

    def _run_routed(
        self, run: Any, shard: str | None, analysis: Analysis | None
    ) -> Any:
        if shard is None or (analysis is not None and not analysis.writes):
            return run(shard)
        if analysis is not None:
            self._written_shards.add(shard)
        # The ORM asks for a bulk statement's connection by its mapper alone.
        before, self._routed = self._routed, shard
        try:
            return run(shard)
        finally:
            self._routed = before

    def _transaction_time(self, connection: Connection) -> str:
        """Return when the transaction began, for all shards the same."""
        if self._began_at is None:
            self._began_at = str(connection.exec_driver_sql(_BEGAN_AT).scalar_one())
        return self._began_at

    def _shard_of_identity(self, mapper: Mapper[Any], ident: Any) -> str:
        return shard_of_identity(self._topology(), mapper, ident)

    def _next_value(self, column: Column[Any]) -> int:
        return self._cluster._sequences.next(column, self.bind)

    # -- where rows go --------------------------------------------------------------

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        self.connection_callable = RowConnections(self)
        try:
            if len(self._new) > 1:
                order_new_by_shard(self)
            super()._flush(objects)
        except sa_exc.OperationalError as error:
            raise_deadlock(self, error)
            raise
        finally:
            self.connection_callable = None

    @contextmanager
    def _outside_of_flush(self) -> Iterator[None]:
        callable_, self.connection_callable = self.connection_callable, None
        try:
            yield
        finally:
            self.connection_callable = callable_

    def _bulk_save_mappings(self, mapper: Any, mappings: Any, **how: Any) -> None:
        # SQLAlchemy refuses these to sessions that choose a connection for each row.
        try:
            with self._outside_of_flush():
                save_in_bulk(self, super()._bulk_save_mappings, mapper, mappings, how)
        except sa_exc.OperationalError as error:
            raise_deadlock(self, error)
            raise

    # -- beyond Session ----------------------------------------------------------------

    @property
    def commit_token(self) -> str | None:
        """What another session, in any process, takes as ``after=`` to see all of this.

        It names the commits over several shards of this session, and those that it was
        itself made ``after``, which some shard may not show yet; None if there are
        none. It is short text of letters, digits, ``:`` and ``,``, fit for a header or
        a cookie.
        """
        return None if self._unseen is None else self._unseen.token

    def explain(
        self,
        statement: Any,
        params: Mapping[str, Any] | None = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY_DICT,
    ) -> Plan:
        """Return on which shards *statement* would run, and why; run nothing.

        Raises what executing it would raise before anything is sent, but for the guard
        against statements on every shard.
        """
        where = destination(self, statement, params, execution_options)
        return explained(self, where)

    def lock_row(
        self,
        entity: type[T],
        ident: Any,
        *,
        timeout: float = 10.0,
    ) -> T:
        """Wait for the row's turn, then return it locked ``FOR UPDATE``.

        Sessions that want one hot row queue in Redis, where a waiter holds no database
        connection; the row's own lock in PostgreSQL is what keeps it correct, so a
        Redis that is away costs speed and nothing else. The turn is passed on at
        commit, rollback or close. *timeout* is in seconds, for the turn and the row
        lock together.

        Raises LockTimeout, or NoResultFound where there is no such row.
        """
        row: T = self._cluster._row_locks.lock(self, entity, ident, timeout)
        return row


def sessions_of(cluster: Cluster | None) -> Iterator[ShardedSession]:
    """Yield the sessions that there are of *cluster*; any thread may ask."""
    # SQLAlchemy keeps all sessions in a dictionary of its own, so a list of them costs
    # a new one nothing.
    for reference in _sessions.valuerefs():
        session = reference()
        if isinstance(session, ShardedSession) and session._cluster is cluster:
            yield session


def _unseen(after: str | None) -> Unseen:
    # Imported by the first that needs it, and with it the commit protocol.
    from shardalchemy.visibility import Unseen

    return Unseen(after)
