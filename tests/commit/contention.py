"""Many sessions on a few rows of several shards, and whether any is wronged.

``python -m tests.commit.contention SECONDS`` starts servers and lets sessions take the
rows of accounts in one order, so that they wait for each other much and never in a
circle: not one may be told of a deadlock. With ``--opposed`` they take them in any
order: they deadlock all the time, and may be told of nothing else.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter

import psycopg
from sqlalchemy import exc, select

from shardalchemy import Cluster, DeadlockDetected
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on

THREADS = 16
ROWS_A_SHARD = 2
BALANCE = 1_000_000
LONGEST = 0.15  # seconds for which a session keeps a row before it takes the next


def open_accounts(cluster: Cluster) -> list[int]:
    """Create some accounts on every shard, in the order of their numbers."""
    numbers: list[int] = []
    for shard in cluster.topology.shards:
        start = 1
        for _ in range(ROWS_A_SHARD):
            numbers.append(number_on(cluster, shard, start))
            start = numbers[-1] + 1
    with cluster.sessionmaker().begin() as session:
        session.add_all(Account(number=n, balance=BALANCE) for n in numbers)
    return sorted(numbers)


def contend(cluster: Cluster, seconds: float, *, opposed: bool) -> Counter[str]:
    """Let sessions contend for that long; return how often what became of them.

    Raises what none of them may be told.
    """
    numbers = open_accounts(cluster)
    Session = cluster.sessionmaker()
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    unexpected: list[BaseException] = []

    def transfer(choose: random.Random) -> None:
        chosen = choose.sample(numbers, 3)
        if not opposed:
            chosen.sort()
        with Session.begin() as session:
            accounts = []
            for number in chosen:
                account = session.get_one(Account, number, with_for_update=True)
                accounts.append(account)
                time.sleep(choose.uniform(0, LONGEST))
            first, *_, last = accounts
            first.balance -= 1
            last.balance += 1

    def work(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < until and not unexpected:
            try:
                transfer(choose)
                outcomes["committed"] += 1
            except DeadlockDetected as error:
                outcomes["deadlocks between shards"] += 1
                if not opposed:
                    unexpected.append(error)
            except exc.OperationalError as error:
                outcomes["deadlocks within one"] += 1
                local = isinstance(error.orig, psycopg.errors.DeadlockDetected)
                if not (opposed and local):
                    unexpected.append(error)
            except BaseException as error:
                unexpected.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if unexpected:
        raise unexpected[0]
    with Session() as session:
        held = session.scalars(select(Account.balance)).all()
    assert sum(held) == BALANCE * len(numbers), held
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--opposed", action="store_true")
    parser.add_argument("--shards", type=int, default=3)
    chosen = parser.parse_args()
    with (
        LocalCluster(chosen.shards, with_redis=False) as local,
        local.cluster(pool_size=THREADS) as cluster,
    ):
        cluster.create_all(Base.metadata)
        outcomes = contend(cluster, chosen.seconds, opposed=chosen.opposed)
        for name, count in sorted(outcomes.items()):
            print(f"{count:8} {name}")
        print(dict(cluster._transactions.counters.read()))


if __name__ == "__main__":
    main()
