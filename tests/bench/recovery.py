"""What crashes leave behind, and how long it takes to put it right."""

from __future__ import annotations

import statistics
import threading
import time

import psycopg

from shardalchemy import Cluster
from shardalchemy.commit import Gid
from shardalchemy.local import LocalCluster
from tests.bench.peers import Base

__all__ = ["main", "markers"]


def main(orphans: int = 1000, rounds: int = 3) -> str:
    """Recover *orphans* over 4 shards; a quarter can only be rolled back."""
    settings = {"max_prepared_transactions": str(orphans + 10)}
    times = []
    with LocalCluster(4, with_redis=False, settings=settings) as local:
        for _ in range(rounds):
            with local.cluster(recover_in_background=False) as cluster:
                cluster.create_all(Base.metadata)
                whole = _leave(cluster, local, orphans)
                start = time.perf_counter()
                report = cluster.recover(grace=0)
                times.append(time.perf_counter() - start)
                assert len(report.committed) == whole, report
                assert len(report.rolled_back) == orphans - whole
    return (
        f"{orphans} orphans over 4 shards, {whole} committed and {orphans - whole}"
        f" rolled back: {statistics.median(times):.2f} s, median of {rounds}; target:"
        " 1,000 in 5 s"
    )


def _leave(cluster: Cluster, local: LocalCluster, orphans: int) -> int:
    """Prepare transactions of two participants each; return how many are whole."""
    topology = cluster.topology
    shards = list(topology.shards)
    connections = {
        shard: psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
        for shard, url in local.urls.items()
    }
    whole = 0
    for turn in range(orphans):
        pair = [shards[turn % 4], shards[(turn + 1 + turn % 3) % 4]]
        numbers = {shard: topology.addresses[shard].number for shard in pair}
        gid = Gid.new(topology.cluster, numbers.values())
        is_whole = turn % 4 != 0
        whole += is_whole
        for shard in pair if is_whole else pair[:1]:
            connections[shard].execute(
                "BEGIN; INSERT INTO shardalchemy.txn (gid, outcome)"
                f" VALUES ('{gid}', 'committed');"
                f" PREPARE TRANSACTION '{gid.on(numbers[shard])}'"
            )
    for connection in connections.values():
        connection.close()
    return whole


def markers(count: int = 1_000_000, writers: int = 4) -> str:
    """Leave *count* markers on one shard as commits do; return the table's sizes."""
    lines = []
    with (
        LocalCluster(1, with_redis=False) as local,
        local.cluster(recover_in_background=False) as cluster,
    ):
        cluster.create_all(Base.metadata)
        topology = cluster.topology
        finisher = cluster._transactions.finisher
        url = local.urls["s1"].replace("+psycopg", "")

        def write() -> None:
            with psycopg.connect(url, autocommit=True) as connection:
                for _ in range(count // writers):
                    gid = Gid.new(topology.cluster, [0])
                    connection.pgconn.exec_(
                        b"SET synchronous_commit = off; INSERT INTO shardalchemy.txn"
                        b" (gid, outcome) VALUES ('%s', 'committed')"
                        % str(gid).encode()
                    )
                    finisher.forget(gid, ("s1",))

        threads = [threading.Thread(target=write) for _ in range(writers)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        with psycopg.connect(url, autocommit=True) as reader:
            while any(thread.is_alive() for thread in threads):
                time.sleep(15)
                row = reader.execute(
                    "SELECT count(*), pg_relation_size('shardalchemy.txn'),"
                    " pg_indexes_size('shardalchemy.txn') FROM shardalchemy.txn"
                ).fetchone()
                lines.append(
                    f"after {time.perf_counter() - start:4.0f} s: {row[0]:7,} markers,"
                    f" table {row[1] / 1e6:5.1f} MB, indexes {row[2] / 1e6:5.1f} MB"
                )
        rate = count / (time.perf_counter() - start)
    return "\n".join([f"{count:,} markers at {rate:,.0f} a second", *lines])
