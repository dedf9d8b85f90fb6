"""Print a table of measurements.

``python -m tests.bench [ROUNDS]``: one row, one key, one commit at a time;
``python -m tests.bench queries [ROWS [ROUNDS]]``: statements over many rows;
``python -m tests.bench snapshots [ROUNDS]``: snapshots opened while others commit;
``python -m tests.bench stream [ROWS]``: all of a table through ``yield_per``;
``python -m tests.bench throughput [SECONDS]``: transactions over two shards;
``python -m tests.bench recovery [ORPHANS]``: what crashed processes left;
``python -m tests.bench markers [COUNT]``: the size of the table of markers.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import Text, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from shardalchemy.local import LocalCluster
from shardalchemy.ring import KEY_TYPES
from tests.bench import queries, recovery, snapshots, streaming, throughput
from tests.bench.bare import BareCommits
from tests.bench.paired import Row, in_turn, in_turn_async, table
from tests.bench.peers import Item, Peers, timed_commit


def orm(peers: Peers, rounds: int) -> list[Row]:
    """One row by its key: read, get, insert and flush, update and flush."""
    ids, free = peers.ids["s1"], peers.free["s1"]

    def read(session: Any, turn: int) -> None:
        session.scalars(select(Item).where(Item.id == ids[turn % 500])).one()

    def get(session: Any, turn: int) -> None:
        session.get(Item, ids[turn % 500])

    def insert_and_flush(session: Any, turn: int) -> None:
        session.add(Item(id=free[turn % 500], name="new", email="new@example.com"))
        session.flush()

    def update_and_flush(session: Any, turn: int) -> None:
        session.get(Item, ids[turn % 500]).stock += 1
        session.flush()

    rows = []
    sessions = {
        "plain Session": peers.plain("s1"),
        "ShardedSession": peers.sharded(),
        "horizontal_shard": peers.horizontal(),
    }
    for what in (read, get, insert_and_flush, update_and_flush):

        def run(turn: int, make: Any, what: Callable[..., None] = what) -> None:
            with make() as session:
                what(session, turn)

        ways = {
            way: (lambda turn, make=make, run=run: run(turn, make))
            for way, make in sessions.items()
        }
        name = f"ORM {what.__name__.replace('_', ' ')}"
        rows += in_turn(name, ways, rounds, {"ShardedSession": "≤ 1.10"})
    return rows


def scatter(peers: Peers, rounds: int) -> list[Row]:
    """A statement of 5 ms on each of four shards."""
    # One row a shard, so that each server sleeps once.
    first = [mine[0] for mine in peers.ids.values()]
    slow = func.pg_sleep(0.005).cast(Text())
    statement = select(Item.id, literal("").label("x")).where(
        Item.id.in_(first), slow.is_not(None)
    )
    one = select(Item.id).where(Item.id == first[0], slow.is_not(None))
    plain, sharded, horizontal = (
        peers.plain("s1"),
        peers.sharded(),
        peers.horizontal(),
    )

    def with_session(make: Any, statement: Any) -> Callable[[int], None]:
        def run(_: int) -> None:
            with make() as session:
                session.execute(statement).all()

        return run

    rows = in_turn(
        "scatter of 5 ms over 4 shards",
        {
            "one shard alone": with_session(plain, one),
            "ShardedSession": with_session(sharded, statement),
            "horizontal_shard": with_session(horizontal, statement),
        },
        rounds,
        {"ShardedSession": "≤ 1.50"},
    )
    engine = create_async_engine(peers.engines["s1"].url)
    make_async = peers.cluster.async_sessionmaker()

    async def alone(_: int) -> None:
        async with AsyncSession(engine) as session:
            (await session.execute(one)).all()

    async def scattered(_: int) -> None:
        async with make_async() as session:
            (await session.execute(statement)).all()

    async def close() -> None:
        await peers.cluster.aclose()
        await engine.dispose()

    rows += in_turn_async(
        "the same in an event loop",
        {"one shard alone": alone, "AsyncShardedSession": scattered},
        rounds,
        {"AsyncShardedSession": "≤ 1.50"},
        at_the_end=close,
    )
    return rows


def commits(peers: Peers, rounds: int) -> list[Row]:
    """Commit time alone, of one update a shard."""
    rows = []

    def change(session: Any, shards: list[str], turn: int) -> float:
        for shard in shards:
            session.get(Item, peers.ids[shard][turn % 500]).stock += 1
        session.flush()
        return timed_commit(session)

    def ours(shards: list[str], ack: str) -> Callable[[int], float]:
        make = peers.sharded(ack=ack)

        def run(turn: int) -> float:
            with make() as session:
                return change(session, shards, turn)

        return run

    def plain(turn: int) -> float:
        with peers.plain("s1")() as session:
            return change(session, ["s1"], turn)

    def two_phase(shards: list[str]) -> Callable[[int], float]:
        def run(turn: int) -> float:
            with Session(twophase=True) as session:
                for shard in shards:
                    connection = session.connection(
                        bind_arguments={"bind": peers.engines[shard]}
                    )
                    number = peers.ids[shard][turn % 500]
                    connection.execute(
                        update(Item.__table__)
                        .where(Item.id == number)
                        .values(stock=Item.stock + 1)
                    )
                return timed_commit(session)

        return run

    bare = BareCommits(peers)
    for count in (2, 4):
        shards = peers.shards[:count]
        rows += in_turn(
            f"commit on {count} shards",
            {
                "one shard, plain Session": plain,
                "one shard, ShardedSession": ours(["s1"], "committed"),
                "one shard, bare psycopg": lambda turn: bare.commit(["s1"], turn),
                "both rounds, bare psycopg": (
                    lambda turn, shards=shards: bare.commit(shards, turn)
                ),
                'ack="committed"': ours(shards, "committed"),
                'ack="prepared"': ours(shards, "prepared"),
                "Session(twophase=True)": two_phase(shards),
            },
            rounds,
            {'ack="committed"': "≤ 2.60", 'ack="prepared"': "≤ 1.50"},
        )
    bare.close()
    return rows


def routing(peers: Peers, rounds: int) -> list[Row]:
    """A key to its shard, a thousand at a time."""
    from uhashring import HashRing

    owners = peers.cluster.topology.owners
    int_slot, text_slot = KEY_TYPES["int8"].slot, KEY_TYPES["text"].slot
    ring = HashRing(nodes=peers.shards)
    numbers = [number * 7919 for number in range(1000)]
    texts = [str(uuid.UUID(int=number * 7919)) for number in range(1000)]

    def per_key(
        keys: list[Any], find: Callable[[Any], object]
    ) -> Callable[[int], float]:
        def run(_: int) -> float:
            start = time.perf_counter()
            for key in keys:
                find(key)
            return (time.perf_counter() - start) / len(keys)

        return run

    few = max(rounds // 10, 5)
    rows = in_turn(
        "route a bigint key",
        {
            "shardalchemy": per_key(numbers, lambda key: owners[int_slot(key)]),
            "uhashring": per_key([str(n) for n in numbers], ring.get_node),
        },
        few,
        {"shardalchemy": "≤ 1.5 µs"},
    )
    rows += in_turn(
        "route a 36-character text key",
        {
            "shardalchemy": per_key(texts, lambda key: owners[text_slot(key)]),
            "uhashring": per_key(texts, ring.get_node),
        },
        few,
        {"shardalchemy": "≤ 6 µs"},
    )
    return rows


_IMPORT = """
import time, sqlalchemy, sqlalchemy.orm, psycopg
start = time.perf_counter()
import shardalchemy
print(time.perf_counter() - start)
"""


def importing(peers: Peers, rounds: int) -> list[Row]:
    """What ``import shardalchemy`` adds to SQLAlchemy and psycopg."""

    def once(_: int) -> float:
        out = subprocess.run(
            [sys.executable, "-c", _IMPORT], capture_output=True, check=True, text=True
        )
        return float(out.stdout)

    return in_turn(
        "import, added to SQLAlchemy and psycopg",
        {"shardalchemy": once},
        max(rounds // 40, 3),
        {"shardalchemy": "< 60 ms"},
    )


ALL = (orm, scatter, commits, routing, importing)


def main(rounds: int) -> str:
    """Measure everything on servers of its own; return the table."""
    with LocalCluster(4, with_redis=False) as local, local.cluster() as cluster:
        peers = Peers(cluster, local.urls)
        try:
            rows = [row for measure in ALL for row in measure(peers, rounds)]
        finally:
            peers.close()
        counts = cluster.topology.ring.counts().values()
        return (
            f"{table(rows)}\n\nThe ring is uneven by {max(counts) - min(counts)} slots."
        )


if __name__ == "__main__":
    tables = {
        "queries": queries.main,
        "snapshots": snapshots.main,
        "stream": streaming.main,
        "throughput": throughput.main,
        "recovery": recovery.main,
        "markers": recovery.markers,
    }
    name, *numbers = sys.argv[1:] or ["400"]
    if name in tables:
        print(tables[name](*map(int, numbers)))
    else:
        print(main(int(name)))
