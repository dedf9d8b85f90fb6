"""The ``shardalchemy`` schema that every shard carries.

There is no extra server: each shard holds the whole topology, and beside it the
markers of cross-shard transactions and the fences of named locks. `Topology` is the
value; `install` makes the schema and reads what is there; `ownership` writes into each
sharded table the CHECK that refuses a row on the wrong shard, whoever sends it.
"""

from shardalchemy.catalog.functions import function_volatilities
from shardalchemy.catalog.install import (
    CATALOG_VERSION,
    ShardState,
    read_state,
    write_catalog,
    write_topology,
)
from shardalchemy.catalog.ownership import (
    guarded_names,
    write_ownership,
    write_placement,
)
from shardalchemy.catalog.sequences import Sequences
from shardalchemy.catalog.topology import ShardAddress, Topology

__all__ = [
    "CATALOG_VERSION",
    "Sequences",
    "ShardAddress",
    "ShardState",
    "Topology",
    "function_volatilities",
    "guarded_names",
    "read_state",
    "write_catalog",
    "write_ownership",
    "write_placement",
    "write_topology",
]
