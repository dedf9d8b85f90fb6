"""Make the catalog on a shard, and read what one says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from sqlalchemy import text

from shardalchemy.catalog.topology import Topology
from shardalchemy.errors import CatalogVersionError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

__all__ = [
    "CATALOG_VERSION",
    "ShardState",
    "read_state",
    "write_catalog",
    "write_topology",
]

CATALOG_VERSION = 2

# Two processes that start at once would otherwise both find no schema and create it.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtext('shardalchemy.catalog'))")
_HOLDER = text(
    """
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (classid::bigint << 32 | objid::bigint)
          = hashtext('shardalchemy.catalog')::bigint
    """
)
_INSTALLED = text("SELECT to_regclass('shardalchemy.catalog') IS NOT NULL")
_STATE = text(
    """
    SELECT c.version, c.cluster::text, c.shard, t.epoch, t.document
    FROM shardalchemy.catalog AS c
    LEFT JOIN LATERAL (
        SELECT epoch, document FROM shardalchemy.topology ORDER BY epoch DESC LIMIT 1
    ) AS t ON true
    """
)
_SETTINGS = text(
    "SELECT current_setting('max_prepared_transactions')::int,"
    " current_setting('server_version_num')::int"
)
_WRITE_CATALOG = text(
    "INSERT INTO shardalchemy.catalog (version, cluster, shard)"
    " VALUES (:version, CAST(:cluster AS uuid), :shard)"
    " ON CONFLICT (only_row) DO UPDATE SET version = excluded.version"
)
_WRITE_TOPOLOGY = text(
    "INSERT INTO shardalchemy.topology (epoch, document)"
    " VALUES (:epoch, CAST(:document AS jsonb))"
)


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a server says of itself; from ``version`` on None before install."""

    max_prepared_transactions: int
    server_version: int
    version: int | None = None
    cluster: str | None = None
    shard: str | None = None
    topology: Topology | None = None

    @property
    def is_outdated(self) -> bool:
        """Whether an older library has installed the catalog."""
        return self.version is not None and self.version < CATALOG_VERSION


def read_state(connection: Connection) -> ShardState:
    """Return the state of one shard.

    Raises CatalogVersionError where a newer library has installed the catalog.
    """
    prepared, version = connection.execute(_SETTINGS).one()
    if not connection.scalar(_INSTALLED):
        return ShardState(prepared, version)
    row = connection.execute(_STATE).one_or_none()
    if row is None:
        return ShardState(prepared, version)
    if row.version > CATALOG_VERSION:
        raise CatalogVersionError(
            f"shard {row.shard}'s catalog has version {row.version}; this library"
            f" knows up to {CATALOG_VERSION}. Upgrade shardalchemy in this process."
        )
    topology = (
        None if row.epoch is None else Topology.from_document(row.epoch, row.document)
    )
    return ShardState(prepared, version, row.version, row.cluster, row.shard, topology)


def lock_catalog(connection: Connection, own: Collection[int]) -> bool:
    """Wait until no other transaction changes this shard's catalog.

    Returns False, without waiting, if one of the *own* backends does.
    """
    if own and connection.scalar(_HOLDER) in own:
        return False
    connection.execute(_LOCK)
    return True


def write_catalog(connection: Connection, cluster: str, shard: str) -> None:
    """Make the schema, and say which shard of which cluster this database is.

    A schema of an older version becomes one of this version.
    """
    script = resources.files(__package__).joinpath("schema.sql").read_text()
    connection.exec_driver_sql(script)
    connection.execute(
        _WRITE_CATALOG,
        {"version": CATALOG_VERSION, "cluster": cluster, "shard": shard},
    )


def write_topology(connection: Connection, topology: Topology) -> None:
    """Add an epoch of the topology."""
    connection.execute(
        _WRITE_TOPOLOGY,
        {"epoch": topology.epoch, "document": json.dumps(topology.document())},
    )
