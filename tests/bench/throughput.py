"""Two-shard transactions a second, from many clients in several processes.

The same ORM code for all: read a row on each of two shards, change both, commit. The
peer is SQLAlchemy's ``horizontal_shard`` with ``twophase=True``.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from typing import Any

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
    done = [0] * threads
    with Cluster(urls, pool_size=threads + 2) as cluster:
        peers = Peers.existing(cluster, urls, ids, pool_size=threads)
        make = (
            peers.horizontal(twophase=True)
            if way == "twophase"
            else peers.sharded(ack="prepared" if way == "prepared" else "committed")
        )
        cluster.topology  # noqa: B018
        barrier = threading.Barrier(threads)

        def run(mine: int) -> None:
            chooser = random.Random(seed * 100 + mine)
            barrier.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                with make() as session:
                    for shard in list(ids)[: 1 if way == "one shard" else 2]:
                        session.get(Item, chooser.choice(ids[shard])).stock += 1
                    session.commit()
                done[mine] += 1

        workers = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for engine in peers.engines.values():
            engine.dispose()
    counts.put(sum(done))
