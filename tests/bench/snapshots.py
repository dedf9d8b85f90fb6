"""How long a snapshot takes to open, and what it costs those who write meanwhile.

Eight writers in a process of their own commit on two shards each as fast as they can,
on bare psycopg with the protocol's own commands. What they write adds up to nothing, so
a snapshot that tears a transaction shows.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from types import SimpleNamespace
from typing import Any

from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session

from shardalchemy.commit import driver
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Request
from shardalchemy.local import LocalCluster
from tests.bench.bare import Bare
from tests.bench.paired import shuffled
from tests.bench.peers import Item, Peers

__all__ = ["main"]

WRITERS = 8
_BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_WRITE = "BEGIN; UPDATE bench_items SET stock = stock + {change} WHERE id = {id}; "
_FORGET = """
    DELETE FROM shardalchemy.txn WHERE at < clock_timestamp() - interval '10 seconds'
"""


class PlainTransactions(Bare):
    """A REPEATABLE READ transaction on each shard, whatever they have in common."""

    def in_turn(self) -> float:
        start = time.perf_counter()
        for connection in self.connections.values():
            connection.execute(_BEGIN)
            connection.execute("SELECT 1").fetchall()
        return self._ended(start)

    def at_once(self) -> float:
        start = time.perf_counter()
        for command in (_BEGIN, "SELECT 1"):
            self.send(dict.fromkeys(self.connections, command))
        return self._ended(start)

    def _ended(self, start: float) -> float:
        elapsed = time.perf_counter() - start
        self.send(dict.fromkeys(self.connections, "ROLLBACK"))
        return elapsed


class Writers(Bare):
    """One writer's connections, its rows, and the protocol's commands on them."""

    def __init__(self, spec: Any, writer: int) -> None:
        super().__init__(SimpleNamespace(engines=spec.engines))
        self._spec = spec
        self._choose = random.Random(writer)
        # No two writers have a row in common: nothing but commits is waited for.
        self._own = {s: ids[writer::WRITERS] for s, ids in spec.ids.items()}

    def write(self) -> None:
        """Move one piece of stock from a shard to another."""
        shards = sorted(self._choose.sample(list(self.connections), 2))
        numbers = self._spec.numbers
        gid = Gid.new(self._spec.cluster, (numbers[s] for s in shards))
        branches = {s: gid.on(numbers[s]) for s in shards}
        self.send(
            {
                shard: _WRITE.format(
                    change=change, id=self._choose.choice(self._own[shard])
                )
                + driver._COMMANDS[Request.PREPARE].format(
                    gid=gid, branch=branches[shard]
                )
                for shard, change in zip(shards, (1, -1), strict=True)
            }
        )
        commit = driver._COMMANDS[Request.COMMIT]
        self.send({s: commit.format(branch=branches[s]) for s in shards})

    def forget(self) -> None:
        """Delete old markers, as each process does for its own."""
        for connection in self.connections.values():
            connection.execute(_FORGET)


def write_until(
    urls: Mapping[str, str],
    ids: Mapping[str, list[int]],
    cluster: str,
    numbers: Mapping[str, int],
    done: Synchronized[int],
    stop: Any,
) -> None:
    """Run all writers in this process, until *stop* is set."""
    spec = SimpleNamespace(
        engines={name: create_engine(url) for name, url in urls.items()},
        ids=ids,
        cluster=cluster,
        numbers=numbers,
    )

    def run(writer: Writers) -> None:
        while not stop.is_set():
            writer.write()
            with done.get_lock():
                done.value += 1

    writers = [Writers(spec, number) for number in range(WRITERS)]
    threads = [threading.Thread(target=run, args=(w,)) for w in writers]
    for thread in threads:
        thread.start()
    forgetting = Writers(spec, 0)
    while not stop.wait(1):
        forgetting.forget()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def writing(peers: Peers, urls: Mapping[str, str]) -> Iterator[Callable[[], int]]:
    """Have the writers write; yields what tells how many commits there have been."""
    spawned = multiprocessing.get_context("spawn")
    done = spawned.Value("q", 0)
    stop = spawned.Event()
    topology = peers.cluster.topology
    numbers = {name: a.number for name, a in topology.addresses.items()}
    process = spawned.Process(
        target=write_until,
        args=(dict(urls), peers.ids, topology.cluster, numbers, done, stop),
    )
    process.start()
    try:
        while done.value < 100:
            assert process.is_alive()
            time.sleep(0.05)
        yield lambda: done.value
    finally:
        stop.set()
        process.join()


@dataclass(frozen=True, slots=True)
class Times:
    """One way's times, in seconds."""

    when: str
    way: str
    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def p99(self) -> float:
        return sorted(self.times)[int(len(self.times) * 0.99)]


def opened(peers: Peers, strict: bool, *, reads: bool = True) -> float:
    """Return the seconds that a snapshot takes to open; see that it tears nothing."""
    start = time.perf_counter()
    with peers.cluster.snapshot(strict=strict) as session:
        elapsed = time.perf_counter() - start
        if reads:
            assert session.scalar(select(func.sum(Item.stock))) == 0
    return elapsed


def plain_sessions(peers: Peers) -> Callable[[], float]:
    engines = [
        engine.execution_options(isolation_level="REPEATABLE READ")
        for engine in peers.engines.values()
    ]

    def run() -> float:
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for engine in engines:
                stack.enter_context(Session(engine)).execute(text("SELECT 1"))
            return time.perf_counter() - start

    return run


def measured(when: str, peers: Peers, rounds: int) -> list[Times]:
    """Open in every way, in turn."""
    bare = PlainTransactions(peers)
    ways: dict[str, Callable[[], float]] = {
        "4 plain transactions in turn, bare psycopg": bare.in_turn,
        "4 plain transactions at once, bare psycopg": bare.at_once,
        "4 plain Sessions in turn": plain_sessions(peers),
        "cluster.snapshot()": lambda: opened(peers, False),
        "cluster.snapshot(strict=True)": lambda: opened(peers, True),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for way in shuffled(ways, turn):
                times[way].append(ways[way]())
    finally:
        gc.enable()
    bare.close()
    return [Times(when, way, found) for way, found in times.items()]


def slowed(
    peers: Peers, commits: Callable[[], int], seconds: float, every: float
) -> tuple[float, float]:
    """Return the writers' rate alone, and with a snapshot opened *every* seconds."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    for reads in (False, True, True, False) * 3:
        start, before = time.perf_counter(), commits()
        while (now := time.perf_counter()) - start < seconds / 12:
            if reads:
                opened(peers, strict=False, reads=False)
            time.sleep(max(0.0, every - (time.perf_counter() - now)))
        rates[reads].append((commits() - before) / (time.perf_counter() - start))
    return statistics.mean(rates[False]), statistics.mean(rates[True])


def main(rounds: int = 400, seconds: float = 24) -> str:
    """Measure on servers of its own; return the tables."""
    with LocalCluster(4, with_redis=False) as local, local.cluster() as cluster:
        peers = Peers(cluster, local.urls)
        found = measured("idle", peers, rounds)
        with writing(peers, local.urls) as commits:
            start, before = time.perf_counter(), commits()
            found += measured("under load", peers, rounds)
            during = (commits() - before) / (time.perf_counter() - start)
            alone, with_reader = slowed(peers, commits, seconds, every=0.1)
        retries = cluster.counters.get("snapshot.retries", 0)
        peers.close()
    lines = [
        "| when | way | median | ratio | p99 | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for times in found:
        first = next(t for t in found if t.when == times.when)
        lines.append(
            f"| {times.when} | {times.way} | {times.median * 1e3:.2f} ms"
            f" | {times.median / first.median:.2f} | {times.p99 * 1e3:.2f} ms"
            f" | {times.p99 / first.p99:.2f} |"
        )
    lines += [
        "",
        "Targets of cluster.snapshot(): median ≤ 3.00, p99 under load ≤ 20.00.",
        f"{retries} repairs. {during:,.0f} commits/s while all this was opened.",
        f"{alone:,.0f} commits/s alone, {with_reader:,.0f} with 10 snapshots/s:"
        f" {1 - with_reader / alone:.1%} slower"
        " (target < 5 %).",
    ]
    return "\n".join(lines)
