"""Connections to many servers that can wait together.

`engines.ShardEngines` holds an engine per shard, made when first used, and bounds how
many connections are open in all. `fanout` runs one step on many connections at once,
in one thread or one event loop, and leaves none in an unknown state. A `Deadline`
bounds how long statements may take, on one connection or many. `wire` sends a command
past SQLAlchemy, for the commit protocol, which counts round trips.
"""

from shardalchemy.engine.broadcast import ask_all, broadcast
from shardalchemy.engine.deadline import Deadline
from shardalchemy.engine.engines import Bindings, ShardEngines
from shardalchemy.engine.fanout import attempt_all, fanout
from shardalchemy.engine.turnstile import OneAtATime

__all__ = [
    "Bindings",
    "Deadline",
    "OneAtATime",
    "ShardEngines",
    "ask_all",
    "attempt_all",
    "broadcast",
    "fanout",
]
