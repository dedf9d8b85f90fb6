"""Create what a cluster needs on its shards: the catalog, the tables, the checks."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING

from shardalchemy.catalog import (
    ShardAddress,
    ShardState,
    Topology,
    read_state,
    write_catalog,
    write_ownership,
    write_placement,
    write_topology,
)
from shardalchemy.catalog.install import lock_catalog
from shardalchemy.engine import fanout
from shardalchemy.engine.wire import driver_of
from shardalchemy.errors import ConfigurationError
from shardalchemy.ring import allocate
from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import Connection, MetaData

    from shardalchemy.engine import Bindings, ShardEngines
    from shardalchemy.schema import Placement

__all__ = ["agreed", "create_all"]

_OLDEST_SERVER = 150000


def create_all(
    metadata: MetaData,
    placements: Iterable[Placement],
    engines: Bindings,
    shards: ShardEngines,
    commit: Callable[[Topology, Mapping[str, Connection]], object],
) -> Topology:
    """Create what is missing on every shard, in one transaction; return the topology.

    *commit* commits the connections of several shards together. Raises
    ConfigurationError where a server cannot be used, with nothing changed.
    """
    with ExitStack() as stack:
        connections = {
            name: stack.enter_context(engines.connect(name)) for name in engines.shards
        }
        states: dict[str, ShardState] = {}
        locked: dict[int, str] = {}
        for name in sorted(connections):
            connection = connections[name]
            if not lock_catalog(connection, locked):
                raise ConfigurationError(
                    f"shard {name} is the same database as one of"
                    f" {', '.join(locked.values())}. Compare the URLs."
                )
            locked[driver_of(connection).info.backend_pid] = name
            states[name] = read_state(connection)
        topology = agreed(states)
        is_new = topology is None
        topology = topology or _initial(states, shards)
        for name, connection in connections.items():
            if is_new or states[name].is_outdated:
                write_catalog(connection, topology.cluster, name)
            if is_new:
                write_topology(connection, topology)
        members = {name: connections[name] for name in topology.shards}

        def make(shard: str, connection: Connection) -> None:
            here = [p for p in placements if _is_on(p, shard, topology)]
            if not here:
                return  # no table, and none of the metadata's own events
            metadata.create_all(connection, tables=[p.table for p in here])
            for placement in here:
                write_ownership(connection, placement, topology, shard)
                write_placement(connection, placement)

        fanout(make, members)
        if len(members) > 1:
            commit(topology, members)
        for connection in connections.values():
            connection.commit()
    return topology


def _is_on(placement: Placement, shard: str, topology: Topology) -> bool:
    return placement.kind is not Kind.HOME or shard == topology.home


def agreed(states: Mapping[str, ShardState]) -> Topology | None:
    """Return the newest topology that the shards hold, or None if none has one.

    Raises ConfigurationError where a server is too old, cannot prepare transactions,
    or is not the shard it was given as.
    """
    newest: Topology | None = None
    for name, state in states.items():
        if state.server_version < _OLDEST_SERVER:
            raise ConfigurationError(
                f"shard {name} runs PostgreSQL {state.server_version // 10000};"
                " shardalchemy needs 15 or newer."
            )
        if len(states) > 1 and state.max_prepared_transactions == 0:
            raise ConfigurationError(
                f"shard {name} has max_prepared_transactions = 0, so it cannot take"
                " part in a transaction with others. Set it in postgresql.conf, best to"
                " the value of max_connections, and restart that server."
            )
        if state.shard is not None and state.shard != name:
            raise ConfigurationError(
                f"the server given as shard {name} says that it is shard {state.shard}."
                " Compare the URLs."
            )
        if state.topology is None:
            continue
        if newest is not None and newest.cluster != state.topology.cluster:
            raise ConfigurationError(
                f"shard {name} belongs to another cluster ({state.topology.cluster})"
                f" than the shards before it ({newest.cluster}). Compare the URLs."
            )
        if newest is None or state.topology.epoch > newest.epoch:
            newest = state.topology
    if newest is not None:
        missing = [name for name in newest.shards if name not in states]
        if missing:
            raise ConfigurationError(
                f"the cluster also has shard {', '.join(missing)}, for which no URL was"
                " given. Add it to Cluster({…})."
            )
    return newest


def _initial(states: Mapping[str, ShardState], shards: ShardEngines) -> Topology:
    """Return the first topology: slots shared evenly, the first shard as home."""
    names = list(states)
    return Topology(
        epoch=1,
        cluster=str(uuid.uuid4()),
        home=shards.names[0],
        addresses={
            name: ShardAddress.of(number, shards.url(name))
            for number, name in enumerate(shards.names)
        },
        ring=allocate([name for name in shards.names if name in names]),
    )
