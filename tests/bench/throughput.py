"""Two-shard transactions a second, from many clients in several processes."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from typing import Any

from sqlalchemy import create_engine, update
from sqlalchemy.orm import Session

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster
from tests.bench.peers import Item, Peers

__all__ = ["main"]


def main(seconds: int = 8, clients: int = 16, rounds: int = 3) -> str:
    """Return the rates of each way, each measured *rounds* times in turn."""
    ways = ("twophase", "committed", "prepared", "one shard")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with LocalCluster(2, with_redis=False) as local, local.cluster() as cluster:
        peers = Peers(cluster, local.urls)
        ids = {shard: mine[:500] for shard, mine in peers.ids.items()}
        for _ in range(rounds):
            for way in ways:
                rates[way].append(_rate(way, local.urls, ids, seconds, clients))
        peers.close()
    medians = {way: sorted(found)[len(found) // 2] for way, found in rates.items()}
    first = medians["twophase"]
    return "\n".join(
        f"{way:10}: {rate:7.0f} transactions a second, {rate / first:.2f} x"
        for way, rate in medians.items()
    )


def _rate(way: str, urls: Any, ids: Any, seconds: int, clients: int) -> float:
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    processes = [
        context.Process(
            target=_client_process,
            args=(way, dict(urls), ids, seconds, clients // 4, seed, counts),
        )
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    total = sum(counts.get() for _ in processes)
    for process in processes:
        process.join()
    return total / seconds


def _client_process(
    way: str, urls: Any, ids: Any, seconds: int, threads: int, seed: int, counts: Any
) -> None:
    engines = {
        shard: create_engine(url, pool_size=threads) for shard, url in urls.items()
    }
    ack: Any = way if way in ("committed", "prepared") else "committed"
    done = [0] * threads
    with Cluster(urls, pool_size=threads + 2) as cluster:
        Sharded = cluster.sessionmaker(ack=ack)
        cluster.topology  # noqa: B018
        barrier = threading.Barrier(threads)

        def change(session: Any, shard: str, number: int) -> None:
            if way == "twophase":
                connection = session.connection(bind_arguments={"bind": engines[shard]})
                connection.execute(
                    update(Item.__table__)
                    .where(Item.id == number)
                    .values(stock=Item.stock + 1)
                )
            else:
                session.execute(
                    update(Item)
                    .where(Item.id == number)
                    .values(stock=Item.stock + 1)
                    .execution_options(synchronize_session=False)
                )

        def run(mine: int) -> None:
            chooser = random.Random(seed * 100 + mine)
            barrier.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                make = Session(twophase=True) if way == "twophase" else Sharded()
                with make as session:
                    for shard in list(ids)[: 1 if way == "one shard" else 2]:
                        change(session, shard, chooser.choice(ids[shard]))
                    session.commit()
                done[mine] += 1

        workers = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for engine in engines.values():
        engine.dispose()
    counts.put(sum(done))
