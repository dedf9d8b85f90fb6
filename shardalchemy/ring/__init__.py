"""The ring: from a shard key's value to a slot, and from slots to shards.

A key comes in as a Python value; its `KeyType` turns it into a slot, one of 4096 equal
cuts of PostgreSQL's own 64-bit hash. A `Ring` is the list of the slots' owners: stored,
never derived from names, so adding a shard moves only what must move. What one shard
owns is, in SQL, an ``int8multirange`` of hashes: the same expression guards its tables.

Read in this order: `hashing`, `keys`, `slots`, `allocation`, `arcs`.
"""

from shardalchemy.ring.allocation import allocate, reallocate
from shardalchemy.ring.arcs import arcs, multirange
from shardalchemy.ring.keys import KEY_TYPES, KeyType
from shardalchemy.ring.slots import SLOTS, Ring, slot_of_hash, slot_range

__all__ = [
    "KEY_TYPES",
    "SLOTS",
    "KeyType",
    "Ring",
    "allocate",
    "arcs",
    "multirange",
    "reallocate",
    "slot_of_hash",
    "slot_range",
]
