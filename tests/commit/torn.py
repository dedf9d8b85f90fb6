"""Read all shards while money moves between them; count how often a sum is wrong.

``python -m tests.commit.torn [SECONDS]`` prints how many reads of the plain session and
of snapshots were torn, each in half of the time, under the same transfers.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on

__all__ = ["TOTAL", "Reads", "open_accounts", "read", "transfer", "transfers"]

TOTAL = 1_000
"""What each shard's account has at the beginning."""


def open_accounts(cluster: Cluster) -> None:
    """Open an account on each shard."""
    cluster.create_all(Base.metadata)
    with cluster.sessionmaker().begin() as session:
        for shard in cluster.topology.shards:
            session.add(Account(number=number_on(cluster, shard), balance=TOTAL))


def transfer(session: Session, a: int, b: int, amount: int = 1) -> None:
    """Move *amount* from one account to another."""
    for number, change in sorted([(a, -amount), (b, amount)]):
        session.execute(
            update(Account)
            .where(Account.number == number)
            .values(balance=Account.balance + change)
        )


@contextlib.contextmanager
def transfers(cluster: Cluster, writers: int = 4) -> Iterator[list[int]]:
    """Move money between the shards all the time; yields the writers' counts."""
    numbers = [number_on(cluster, shard) for shard in cluster.topology.shards]
    stop = threading.Event()
    done = [0] * writers
    failed: list[BaseException] = []

    def run(writer: int) -> None:
        choose = random.Random(writer)
        Session = cluster.sessionmaker()
        try:
            while not stop.is_set():
                with Session.begin() as session:
                    transfer(session, *choose.sample(numbers, 2))
                done[writer] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


@dataclass(frozen=True, slots=True)
class Reads:
    """Reads of all accounts, and those of them whose sum was not what it always is."""

    reads: int
    torn: int
    transfers: int

    def __str__(self) -> str:
        share = self.torn / self.reads
        return (
            f"{self.torn} of {self.reads} reads torn ({share:.1%}),"
            f" {self.transfers} transfers meanwhile"
        )


def read(
    cluster: Cluster, make: Callable[[], AbstractContextManager[Any]], seconds: float
) -> Reads:
    """Read all accounts again and again in a session of *make*, under transfers."""
    expected = TOTAL * len(cluster.topology.shards)
    reads = torn = 0
    with transfers(cluster) as done:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with make() as session:
                found = sum(session.scalars(select(Account.balance)))
            reads += 1
            torn += found != expected
        return Reads(reads, torn, sum(done))


def main(seconds: float) -> str:
    """Do both, on servers of their own; return what came out."""
    with LocalCluster(4, with_redis=False) as local, local.cluster() as cluster:
        open_accounts(cluster)
        plain = read(cluster, cluster.sessionmaker(), seconds / 2)
        whole = read(cluster, cluster.snapshot, seconds / 2)
        counts = cluster.counters
    return (
        f"plain session: {plain}\nsnapshots:     {whole},"
        f" {counts.get('snapshot.retries', 0)} repairs"
    )


if __name__ == "__main__":
    print(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20))
