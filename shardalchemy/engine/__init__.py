"""Connections to many servers that can wait together.

`engines.ShardEngines` holds an engine per shard, made when first used, and bounds how
many connections are open in all. `fanout` runs one step on many connections at once,
in one thread or one event loop, and leaves none in an unknown state. A `Deadline`
bounds how long statements may take, on one connection or many. `ended` tells whether a
server has hung up. `wire` sends a command past SQLAlchemy, for the commit protocol,
which counts round trips. `Beside` has connections of its own, for what must go on when
all sessions wait; `Visits` goes to several shards in threads, and waits for none too
long.
"""

from shardalchemy.engine.background import Background
from shardalchemy.engine.beside import Beside
from shardalchemy.engine.broadcast import ask_all, broadcast
from shardalchemy.engine.cancelling import next_statement_held
from shardalchemy.engine.deadline import Deadline
from shardalchemy.engine.ended import ended
from shardalchemy.engine.engines import Bindings, ShardEngines
from shardalchemy.engine.fanout import attempt_all, fanout
from shardalchemy.engine.turnstile import OneAtATime
from shardalchemy.engine.visits import Visits
from shardalchemy.engine.wire import kept_if_sound

__all__ = [
    "Background",
    "Beside",
    "Bindings",
    "Deadline",
    "OneAtATime",
    "ShardEngines",
    "Visits",
    "ask_all",
    "attempt_all",
    "broadcast",
    "ended",
    "fanout",
    "kept_if_sound",
    "next_statement_held",
]
