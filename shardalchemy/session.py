"""The drop-in session.

`ShardedSession` is a ``sqlalchemy.orm.Session`` that chooses a connection for each
statement and each flushed row. A statement's way: `_execute_internal` asks the planner
(once a cache key) and the topology which shards it needs; one shard means that
SQLAlchemy goes on as ever, with that shard's engine; several mean the same at once on
each, and the rows one after another. A row's way is `_connection_for_row`.

Statements over unannotated tables take SQLAlchemy's own path on the home shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, Insert, Table, inspect
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.session import SessionTransactionOrigin
from sqlalchemy.util import EMPTY_DICT, await_only

from shardalchemy.engine import fanout
from shardalchemy.engine.replicated import ReplicatedConnection
from shardalchemy.errors import (
    ConfigurationError,
    ShardKeyError,
    UnsupportedQueryError,
)
from shardalchemy.planner import Plan, PlanKind
from shardalchemy.planner.slots import Arguments
from shardalchemy.rows import generated_default, row_placement
from shardalchemy.schema import Kind, placement_of
from shardalchemy.transaction import ShardedTransaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Column
    from sqlalchemy.orm import ORMExecuteState
    from sqlalchemy.orm.session import SessionTransaction

    from shardalchemy.catalog import Topology
    from shardalchemy.cluster import Cluster
    from shardalchemy.commit import Ack
    from shardalchemy.planner import Analysis

__all__ = ["ShardedSession"]

T = TypeVar("T")


class ShardedSession(Session):
    """A Session over the shards of a cluster; made by ``Cluster.sessionmaker()``.

    Takes what ``sqlalchemy.orm.Session`` takes, but for ``bind`` and ``twophase``.
    ``ack="prepared"`` returns from a cross-shard commit once it is decided, before
    every shard has carried it out; this session waits for that before it uses those
    shards again.
    """

    def __init__(
        self,
        bind: None = None,
        *,
        cluster: Cluster,
        ack: Ack | None = None,
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
        self._engines = cluster._engines_for(self._is_async)
        self._names = self._engines.names
        self._ack: Ack = ack or cluster.ack
        self._routed: str | None = None
        self._flush_connections: dict[str, Any] = {}
        self._written_shards: set[str] = set()
        self._unfinished: dict[str, Any] = {}
        self._turns: list[Any] = []
        super().__init__(**options)

    _is_async = False

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
            self._written_shards.clear()
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
        if self._unfinished:
            self._wait_until_finished(self._names.get(engine.engine))
        connection: Connection = super()._connection_for_bind(
            engine, execution_options, **kw
        )
        return connection

    def _commit_on(self, connections: Mapping[str, Connection]) -> None:
        """Commit shards that have all been written on; for `ShardedTransaction`."""
        done = self._cluster._commit(connections, self._ack)
        if done is not None:
            self._unfinished.update(dict.fromkeys(connections, done))

    def _wait_until_finished(self, shard: str | None) -> None:
        """Wait until this session's last commit has reached *shard*."""
        done = None if shard is None else self._unfinished.pop(shard, None)
        if done is not None and not done.done():
            if self._is_async:
                import asyncio

                await_only(asyncio.wrap_future(done))
            else:
                done.result()

    def _release_turns(self) -> None:
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
            entity = inspect(mapper)
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

    def _execute_internal(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY_DICT,
        bind_arguments: dict[str, Any] | None = None,
        _parent_execute_state: Any = None,
        _add_event: Any = None,
        _scalar_result: bool = False,
    ) -> Any:
        decided = bind_arguments and (
            "shard" in bind_arguments or "bind" in bind_arguments
        )
        if decided or _parent_execute_state is not None:
            return super()._execute_internal(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
                _parent_execute_state=_parent_execute_state,
                _add_event=_add_event,
                _scalar_result=_scalar_result,
            )
        if self.dispatch.do_orm_execute:
            # A listener may still change the statement, so the last one routes it.
            return super()._execute_internal(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
                _add_event=_RouteLast(_add_event),
                _scalar_result=_scalar_result,
            )
        statement = getattr(statement, "__clause_element__", lambda: statement)()
        shards, analysis, params = self._destination(
            statement, params, execution_options
        )

        def run(shard: str | None) -> Any:
            return super(ShardedSession, self)._execute_internal(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=(
                    bind_arguments
                    if shard is None
                    else {**(bind_arguments or {}), "shard": shard}
                ),
                _add_event=_add_event,
                _scalar_result=_scalar_result and len(shards) == 1,
            )

        if len(shards) == 1:
            return self._run_routed(run, shards[0], analysis)
        result = self._run_on_all(run, shards, analysis, execution_options)
        return result.scalar() if _scalar_result else result

    def _run_routed(
        self, run: Any, shard: str | None, analysis: Analysis | None
    ) -> Any:
        if analysis is None or not analysis.writes or shard is None:
            return run(shard)
        self._written_shards.add(shard)
        # The ORM asks for a bulk statement's connection by its mapper alone.
        before, self._routed = self._routed, shard
        try:
            return run(shard)
        finally:
            self._routed = before

    def _run_on_all(
        self,
        run: Any,
        shards: Sequence[Any],
        analysis: Analysis | None,
        options: Mapping[str, Any],
    ) -> Any:
        if analysis is not None and analysis.writes:
            # A reference table: home first, where writers of one row meet.
            results = [self._run_routed(run, shard, analysis) for shard in shards]
            return results[0]
        load = options.get("_sa_orm_load_options")
        if options.get("autoflush", True) and (load is None or load._autoflush):
            self._autoflush()
        connections = {
            shard: self._connection_for_bind(self._engines.of(shard))
            for shard in shards
        }
        with self.no_autoflush:
            results = list(fanout(lambda shard, _: run(shard), connections).values())
        return results[0].merge(*results[1:])

    def _destination(
        self, statement: Any, params: Any, options: Mapping[str, Any]
    ) -> tuple[Sequence[str | None], Analysis | None, Any]:
        """Return the shards that run *statement*, its analysis, and its parameters.

        A shard of None is the home shard by SQLAlchemy's own rules.
        """
        named = self._named_shard(statement, options)
        if named is not None:
            return (named,), None, params
        topology = self._topology()
        analysis, extracted = self._cluster._analyser.analyse(statement)
        if analysis.kind is Kind.HOME:
            return _HOME, analysis, params
        if analysis.kind is Kind.REFERENCE:
            if analysis.writes:
                self._check_replicable(statement, analysis, params)
                return self._home_first(topology), analysis, params
            return (self._shard_at_hand(topology),), analysis, params
        if isinstance(statement, Insert):
            slots: set[int] | None
            params, slots = self._insert_slots(statement, analysis, params)
        else:
            # A parameter that stands for a pending object's key needs it flushed.
            if any(p.callable is not None for p in extracted):
                self._autoflush()
            arguments = Arguments(
                extracted, params if isinstance(params, Mapping) else None
            )
            only = analysis.only_slots
            slots = (
                only.evaluate(arguments)
                if only is not None
                else _all_slots(analysis, arguments)
            )
        if slots is not None and len(slots) == 1:
            (slot,) = slots
            return (topology.owners[slot],), analysis, params
        shards = _owners(topology, slots)
        if not shards:
            shards = (self._shard_at_hand(topology),)
        if len(shards) > 1 and analysis.scatter_problem is not None:
            raise UnsupportedQueryError(
                f"{analysis.scatter_problem} over several shards"
                f" ({', '.join(shards)}) is not supported."
                " Pin every sharded table to one key (… == value on its shard key or a"
                " locator), or send the statement to one shard with"
                " execution_options(shard_key=…) or execution_options(shard=…)."
            )
        return shards, analysis, params

    def _named_shard(self, statement: Any, options: Mapping[str, Any]) -> str | None:
        """Return the shard that options name, by its name or by a key."""
        load = options.get("_sa_orm_load_options")
        if load is not None and load._identity_token is not None:
            token: str = load._identity_token
            return token if token in self._engines.shards else None
        own = getattr(statement, "_execution_options", EMPTY_DICT)
        if not options and not own:
            return None
        shard: str | None = options.get("shard", own.get("shard"))
        if shard is not None:
            self._engines.of(shard)
            return shard
        key = options.get("shard_key", own.get("shard_key"))
        if key is None:
            return None
        topology = self._topology()
        return topology.owner(self._cluster.slot_of_value(key))

    def _shard_at_hand(self, topology: Topology) -> str:
        """Return a shard this transaction already uses, or else the home shard."""
        if self._transaction is not None:
            for bind in self._transaction._connections:
                name = self._names.get(bind.engine)
                if name is not None:
                    return name
        return topology.home

    def _shard_of_identity(self, mapper: Mapper[Any], ident: Any) -> str:
        """Return the shard of the row with a primary key as ``get`` takes it."""
        rows = row_placement(mapper)
        topology = self._topology()
        if rows.kind is not Kind.SHARDED:
            return topology.home
        assert rows.identity_pin is not None
        if isinstance(ident, Mapping):
            column = mapper.primary_key[rows.identity_index]
            value = ident[mapper.get_property_by_column(column).key]
        elif isinstance(ident, tuple | list):
            value = ident[rows.identity_index]
        else:
            value = ident
        slot = rows.identity_pin.slot(value)
        if slot is None:
            raise ShardKeyError(
                f"{value!r} is no key of {rows.name}; it must be"
                f" {rows.identity_pin.accepts}."
            )
        return topology.owners[slot]

    def _home_first(self, topology: Topology) -> Sequence[str]:
        return (topology.home, *(s for s in topology.shards if s != topology.home))

    def _check_replicable(
        self, statement: Any, analysis: Analysis, params: Any
    ) -> None:
        """Refuse an INSERT whose defaults each copy would evaluate for itself."""
        if not isinstance(statement, Insert) or analysis.table is None:
            return
        sets = params if isinstance(params, list | tuple) else [params or {}]
        given = {getattr(c, "key", c) for c in statement._values or ()}
        for column in analysis.table.c:
            generated = (
                column.default
                or column.server_default
                or (column is analysis.table.autoincrement_column)
            )
            supplied = column.key in given or all(column.key in p for p in sets)
            if generated and not supplied and not statement._multi_values:
                raise UnsupportedQueryError(
                    f"INSERT into the reference table {analysis.table} without"
                    f" {column.name}: each copy would be given a value of its own."
                    " Supply it, or add the objects through the session."
                )

    def _insert_slots(
        self, statement: Any, analysis: Analysis, params: Any
    ) -> tuple[Any, set[int]]:
        """Return an INSERT's parameters, completed, and the slots of its rows."""
        table = analysis.table
        assert table is not None
        placement = placement_of(table)
        column, pin = placement.column, placement.pin
        assert column is not None
        assert pin is not None
        subject = statement._propagate_attrs.get("plugin_subject")
        if subject is None or isinstance(params, Mapping | None):
            name = column.key
        else:  # the ORM's bulk INSERT takes attribute names
            name = subject.mapper.get_property_by_column(column).key
        many = isinstance(params, list | tuple)
        rows = [dict(p) for p in params] if many else [dict(params or {})]
        fixed = {getattr(c, "key", c): v for c, v in (statement._values or {}).items()}
        if statement._multi_values:
            fixed_rows = [
                {getattr(c, "key", c): v for c, v in values.items()}
                for group in statement._multi_values
                for values in group
            ]
        else:
            fixed_rows = [fixed] * len(rows)
        slots = set()
        for index, values in enumerate(fixed_rows):
            row = rows[index] if index < len(rows) else {}
            key = row.get(name, values.get(column.key))
            key = getattr(key, "effective_value", key)
            if key is None and not statement._multi_values:
                key = generated_default(column)
                if key is None and column is table.autoincrement_column:
                    key = self._next_value(column)
                row[name] = key
            slot = None if key is None else pin.slot(key)
            if slot is None:
                raise ShardKeyError(
                    f"INSERT into {table}: the shard key {column.name} is {key!r}; it"
                    f" must be {pin.accepts}."
                )
            slots.add(slot)
        completed = rows if many else rows[0] if rows[0] or params else params
        return completed, slots

    def _next_value(self, column: Column[Any]) -> int:
        return self._cluster._sequences.next(column, self.bind)

    # -- where rows go --------------------------------------------------------------

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        self._flush_connections = {}
        self.connection_callable = self._connection_for_row
        try:
            if len(self._new) > 1:
                self._order_new_by_shard()
            super()._flush(objects)
        finally:
            self.connection_callable = None
            self._flush_connections = {}

    def _connection_for_row(
        self,
        mapper: Mapper[Any] | None = None,
        instance: object | None = None,
        **_: Any,
    ) -> Any:
        """Return the connection on which the unit of work writes *instance*'s row."""
        state: Any = inspect(instance)
        rows = row_placement(state.manager.mapper)
        if rows.kind is Kind.SHARDED:
            slot = (
                rows.new_slot(state, self._next_value)
                if state.key is None
                else rows.stored_slot(state)
            )
            shard = self._topology().owners[slot]
        else:
            shard = rows.kind.value
        connection = self._flush_connections.get(shard)
        if connection is None:
            connection = self._flush_connections[shard] = self._connect_flush(
                rows.kind, shard
            )
        return connection

    def _connect_flush(self, kind: Kind, shard: str) -> Any:
        if kind is Kind.HOME:
            return self._connection_for_bind(self.bind)
        topology = self._topology()
        if kind is Kind.SHARDED:
            self._written_shards.add(shard)
            return self._connection_for_bind(self._engines.of(shard))
        home, *others = (
            (name, self._connection_for_bind(self._engines.of(name)))
            for name in self._home_first(topology)
        )
        self._written_shards.update(topology.shards)
        return ReplicatedConnection(home[1], dict(others))

    def _order_new_by_shard(self) -> None:
        """Let new rows of one shard follow each other: one INSERT takes a whole run.

        SQLAlchemy inserts in the order of ``insert_order``; nothing else reads it.
        """
        owners = None
        ranked = []
        for state in self._new:
            rows = row_placement(state.manager.mapper)
            slot = rows.peeked_slot(state) if rows.kind is Kind.SHARDED else None
            if slot is not None and owners is None:
                owners = self._topology().owners
            shard = "" if slot is None or owners is None else owners[slot]
            ranked.append((shard, state.insert_order or 0, state))
        if owners is None:
            return
        places = sorted(order for _, order, _ in ranked)
        ranked.sort(key=lambda item: item[:2])
        for place, (_, _, state) in zip(places, ranked, strict=True):
            state.insert_order = place

    # -- beyond Session ----------------------------------------------------------------

    def explain(
        self,
        statement: Any,
        params: Mapping[str, Any] | None = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY_DICT,
    ) -> Plan:
        """Return on which shards *statement* would run, and why; run nothing.

        Raises what executing it would raise before anything is sent.
        """
        shards, analysis, _ = self._destination(statement, params, execution_options)
        topology = self._topology()
        names = tuple(topology.home if s is None else s for s in shards)
        if analysis is None:
            why = "named by an execution option"
        elif analysis.kind is Kind.HOME:
            why = "its tables live on the home shard"
        elif analysis.kind is Kind.REFERENCE:
            why = "every shard has a copy of its reference tables"
        elif len(names) == 1:
            why = "owns every key that the statement pins"
        elif None in analysis.slots:
            why = "nothing pins the shard key"
        else:
            why = "owns some of the keys that the statement pins"
        kind = PlanKind.ROUTE if len(names) == 1 else PlanKind.SCATTER
        return Plan(kind, names, dict.fromkeys(names, why))

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


_HOME: tuple[None] = (None,)


class _RouteLast:
    """A ``do_orm_execute`` listener that comes after the application's own."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, state: ORMExecuteState) -> Any:
        if self._before is not None:
            result = self._before(state)
            if result:
                return result
        session: Any = state.session
        options = state.local_execution_options
        shards, analysis, params = session._destination(
            state.statement, state.parameters, options
        )

        def run(shard: str | None) -> Any:
            return state.invoke_statement(
                params=None if params is state.parameters else params,
                bind_arguments=None if shard is None else {"shard": shard},
            )

        if len(shards) > 1:
            return session._run_on_all(run, shards, analysis, options)
        if shards[0] is None:
            return None  # SQLAlchemy goes on as ever
        return session._run_routed(run, shards[0], analysis)


def _all_slots(analysis: Analysis, arguments: Arguments) -> set[int] | None:
    found: set[int] = set()
    for slots in analysis.slots:
        some = None if slots is None else slots.evaluate(arguments)
        if some is None:
            return None
        found |= some
    return found


def _owners(topology: Topology, slots: set[int] | None) -> Sequence[str]:
    """Return the shards that own any of *slots*, in the topology's order."""
    owners = topology.owners
    needed = set(owners) if slots is None else {owners[slot] for slot in slots}
    return tuple(shard for shard in topology.shards if shard in needed)
