"""``cluster.counters``: a process's own account of its transactions."""

from __future__ import annotations

import pytest
from sqlalchemy import exc

from shardalchemy import Cluster, ShardedSession, TopologyChanged
from shardalchemy.commit.counters import NAMES
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers
from tests.proxy import CuttingProxy

TWO = ("s1", "s2")


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


def counted(cluster: Cluster, before: dict[str, int]) -> dict[str, int]:
    """Return what has been added since *before*."""
    now = cluster.counters
    return {n: c - before.get(n, 0) for n, c in now.items() if c != before.get(n, 0)}


def test_every_name_is_there_from_the_start(servers: Servers) -> None:
    with servers.local.cluster() as cluster:
        assert cluster.counters == dict.fromkeys(NAMES, 0)


def test_commits_and_aborts_are_counted(bank: Cluster, servers: Servers) -> None:
    numbers = {s: number_on(bank, s) for s in servers}
    before = dict(bank.counters)
    for count in (1, 2, 4, 4):
        with bank.sessionmaker().begin() as session:
            for number in [*numbers.values()][:count]:
                session.merge(Account(number=number, balance=count))
    servers.run(
        "ALTER TABLE accounts ADD CONSTRAINT odd EXCLUDE (balance WITH =)"
        " DEFERRABLE INITIALLY DEFERRED"
    )
    with bank.sessionmaker()() as session:
        for shard in TWO:
            again = number_on(bank, shard, numbers[shard] + 1)
            session.add(Account(number=again, balance=4))
        with pytest.raises(exc.IntegrityError):
            session.commit()
    counts = counted(bank, before)
    assert counts == {"commits.1": 1, "commits.2": 1, "commits.4": 2, "aborts": 1}


def test_recoveries_are_counted(bank: Cluster, servers: Servers) -> None:
    before = dict(bank.counters)
    cluster = bank.topology.cluster[:8]
    with servers.connect("s1") as connection:
        connection.execute("BEGIN; CREATE TABLE half (x int)")
        connection.execute(f"PREPARE TRANSACTION 'sa1:{cluster}:{'0' * 31}1:3/0'")
    assert len(bank.recover(grace=0).rolled_back) == 1
    assert counted(bank, before) == {"recovery.rolled_back": 1}


def test_a_lost_reply_is_counted(bank: Cluster, servers: Servers) -> None:
    port = servers.local.servers["s2"].port
    with CuttingProxy(port) as proxy:
        urls = dict(servers.local.urls)
        urls["s2"] = urls["s2"].replace(f":{port}/", f":{proxy.port}/")
        with Cluster(urls) as cluster:
            with cluster.sessionmaker()() as session:
                session.add_all(
                    Account(number=number_on(cluster, s), balance=1) for s in TWO
                )
                session.flush()
                proxy.cut_on = b"PREPARE TRANSACTION"
                session.commit()
            counts = cluster.counters
    assert counts["lost_replies"] == 1
    assert counts["commits.2"] == 1
    assert counts["unknown"] == 0


def test_what_is_run_again_is_counted(bank: Cluster) -> None:
    calls = []

    def work(session: ShardedSession) -> None:
        calls.append(session)
        if len(calls) < 3:
            raise TopologyChanged("twice")

    before = dict(bank.counters)
    bank.run(work)
    assert counted(bank, before) == {"run.retries": 2}
