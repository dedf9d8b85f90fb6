"""Each message of the protocol lost once: on its way there, and on its way back.

What the caller is told is held against what the servers hold.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import update

from shardalchemy import (
    Cluster,
    CommitOutcomeUnknown,
    TransactionAborted,
    UnsupportedQueryError,
)
from shardalchemy.commit import Gid, driver
from tests.commit.accounts import Account, Base, number_on
from tests.conftest import Servers, roll_back_prepared, wipe
from tests.proxy import CuttingProxy

BALANCES = "SELECT number, balance FROM accounts"
# Past the session, which would refuse what it can see.
TEMPORARY = "CREATE TEMPORARY TABLE IF NOT EXISTS passing (n int)"

before_or_after = pytest.mark.parametrize(
    "cut_before", [True, False], ids=["before it arrives", "before the reply"]
)
sync_or_async = pytest.mark.parametrize(
    "is_async", [False, True], ids=["sync", "async"]
)
on_each = pytest.mark.parametrize("shard", ["s1", "s2"])


class Bank:
    """A cluster that reaches s1 and s2 through proxies."""

    def __init__(
        self,
        servers: Servers,
        proxies: dict[str, CuttingProxy],
        numbers: dict[str, int],
    ) -> None:
        self.servers = servers
        self.proxies = proxies
        self.numbers = numbers
        urls = dict(servers.local.urls)
        for shard, proxy in proxies.items():
            port = servers.local.servers[shard].port
            urls[shard] = urls[shard].replace(f":{port}/", f":{proxy.port}/")
        self.cluster = Cluster(urls, recover_in_background=False)

    def cut(self, shard: str, request: bytes, *, before: bool) -> CuttingProxy:
        proxy = self.proxies[shard]
        proxy.cut_on, proxy.cut_before = request, before
        return proxy

    async def commit(
        self, *shards: str, is_async: bool, refused_on: str | None = None
    ) -> None:
        """Add an account on each of *shards*, and commit."""
        rows = [Account(number=self.numbers[shard], balance=1) for shard in shards]
        refused = {"bind_arguments": {"shard": refused_on}}
        if is_async:
            async with self.cluster.async_sessionmaker()() as session:
                session.add_all(rows)
                await session.flush()
                if refused_on is not None:
                    connection = await session.connection(**refused)
                    await connection.exec_driver_sql(TEMPORARY)
                await session.commit()
        else:
            with self.cluster.sessionmaker()() as session:
                session.add_all(rows)
                session.flush()
                if refused_on is not None:
                    session.connection(**refused).exec_driver_sql(TEMPORARY)
                session.commit()

    def holds(self) -> list[str]:
        """Return the shards that hold their account, once nothing is prepared."""
        end = time.monotonic() + 10
        while self.servers.prepared():
            assert time.monotonic() < end, self.servers.prepared()
            time.sleep(0.01)
        return list(self.servers.where(BALANCES))

    def leave_prepared(self, *shards: str) -> Gid:
        """Leave a transaction on s1 and s2 that its client has prepared on *shards*."""
        topology = self.cluster.topology
        numbers = {s: topology.addresses[s].number for s in self.proxies}
        gid = Gid.new(topology.cluster, numbers.values())
        for shard in shards:
            with self.servers.connect(shard) as connection:
                account = f"({self.numbers[shard]}, 1)"
                connection.execute(
                    f"BEGIN; INSERT INTO accounts (number, balance) VALUES {account};"
                    + driver._COMMANDS[driver.Request.PREPARE].format(
                        gid=gid, branch=gid.on(numbers[shard])
                    )
                )
        return gid


@pytest.fixture(scope="module")
def numbers(servers: Servers) -> Iterator[dict[str, int]]:
    """Make the tables; return the number of an account on s1, and of one on s2."""
    wipe(servers)
    with servers.local.cluster(recover_in_background=False) as cluster:
        cluster.create_all(Base.metadata)
        yield {shard: number_on(cluster, shard) for shard in ("s1", "s2")}
    wipe(servers)


@pytest.fixture
async def bank(servers: Servers, numbers: dict[str, int]) -> AsyncIterator[Bank]:
    roll_back_prepared(servers)  # or a test that has failed holds up the others
    servers.run("TRUNCATE accounts; DELETE FROM shardalchemy.txn")
    ports = {shard: servers.local.servers[shard].port for shard in numbers}
    with CuttingProxy(ports["s1"]) as one, CuttingProxy(ports["s2"]) as two:
        made = Bank(servers, {"s1": one, "s2": two}, numbers)
        yield made
        await made.cluster.aclose()
    assert servers.prepared() == {}


@on_each
@sync_or_async
async def test_prepare_that_does_not_arrive_rolls_back(
    bank: Bank, shard: str, is_async: bool
) -> None:
    proxy = bank.cut(shard, b"PREPARE TRANSACTION", before=True)
    with pytest.raises(TransactionAborted, match=f"shard {shard}"):
        await bank.commit("s1", "s2", is_async=is_async)
    assert proxy.cuts == 1
    assert bank.holds() == []


@on_each
@sync_or_async
async def test_prepare_whose_reply_is_lost_commits(
    bank: Bank, shard: str, is_async: bool
) -> None:
    proxy = bank.cut(shard, b"PREPARE TRANSACTION", before=False)
    await bank.commit("s1", "s2", is_async=is_async)
    assert proxy.cuts == 1
    assert bank.holds() == ["s1", "s2"]


@before_or_after
@sync_or_async
async def test_prepare_lost_to_a_shard_that_stays_away_is_unknown(
    bank: Bank, cut_before: bool, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = bank.cluster._transactions.recovery
    monkeypatch.setattr(recovery, "_patience", 0.3)
    proxy = bank.cut("s2", b"PREPARE TRANSACTION", before=cut_before)

    def close_the_door(*arguments: object) -> object:
        proxy.lets_in = False
        return prepare(*arguments)

    prepare = driver._prepare
    monkeypatch.setattr(driver, "_prepare", close_the_door)
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await bank.commit("s1", "s2", is_async=is_async)
    proxy.lets_in = True
    report = bank.cluster.recover(grace=0)
    ended = report.rolled_back if cut_before else report.committed
    assert ended == (caught.value.gid,)
    assert bank.holds() == ([] if cut_before else ["s1", "s2"])


@on_each
@before_or_after
@sync_or_async
async def test_commit_prepared_that_is_lost_is_repeated(
    bank: Bank, shard: str, cut_before: bool, is_async: bool
) -> None:
    proxy = bank.cut(shard, b"COMMIT PREPARED", before=cut_before)
    await bank.commit("s1", "s2", is_async=is_async)
    assert proxy.cuts == 1
    assert bank.holds() == ["s1", "s2"]


@before_or_after
@sync_or_async
async def test_rollback_prepared_that_is_lost_is_repeated(
    bank: Bank, cut_before: bool, is_async: bool
) -> None:
    # PostgreSQL refuses to prepare what has touched a temporary table.
    proxy = bank.cut("s1", b"ROLLBACK PREPARED", before=cut_before)
    with pytest.raises(UnsupportedQueryError, match="temporary objects"):
        await bank.commit("s1", "s2", is_async=is_async, refused_on="s2")
    assert proxy.cuts == 1
    assert bank.holds() == []


@before_or_after
@sync_or_async
async def test_the_commit_on_one_shard_that_is_lost_is_told_as_it_is(
    bank: Bank, cut_before: bool, is_async: bool
) -> None:
    proxy = bank.cut("s2", b"; COMMIT", before=cut_before)
    if cut_before:
        with pytest.raises(TransactionAborted):
            await bank.commit("s2", is_async=is_async)
    else:
        await bank.commit("s2", is_async=is_async)
    assert proxy.cuts == 1
    assert bank.holds() == ([] if cut_before else ["s2"])


RECOVERY_ASKS = {
    "LOOK where it is prepared": (b"AND gid = ANY", "s1", ["s1", "s2"]),
    "LOOK where it is absent": (b"AND gid = ANY", "s2", ["s1"]),
    "FENCE": (b"'aborted'", "s2", ["s1"]),
    "COMMIT PREPARED": (b"COMMIT PREPARED", "s2", ["s1", "s2"]),
    "ROLLBACK PREPARED": (b"ROLLBACK PREPARED", "s1", ["s1"]),
}


@before_or_after
@pytest.mark.parametrize("what", RECOVERY_ASKS)
async def test_recovery_asks_again_for_what_it_has_lost(
    bank: Bank, what: str, cut_before: bool
) -> None:
    request, shard, prepared = RECOVERY_ASKS[what]
    gid = bank.leave_prepared(*prepared)
    proxy = bank.cut(shard, request, before=cut_before)
    report = bank.cluster.recover(grace=0)
    assert proxy.cuts == 1
    is_whole = len(prepared) == 2
    assert (report.committed if is_whole else report.rolled_back) == (str(gid),)
    assert bank.holds() == (["s1", "s2"] if is_whole else [])


@before_or_after
@pytest.mark.parametrize("what", [b"AND gid = ANY", b"'aborted'", b"COMMIT PREPARED"])
@sync_or_async
async def test_a_session_that_loses_one_reply_after_another_is_told_as_it_is(
    bank: Bank, what: bytes, cut_before: bool, is_async: bool
) -> None:
    never_arrives = what == b"'aborted'"
    one = bank.cut("s1", b"PREPARE TRANSACTION", before=never_arrives)

    # Once its PREPARE is lost, what recovery asks of it is lost as well.
    def next_cut(*arguments: object, **options: object) -> object:
        bank.cut("s1", what, before=cut_before)
        return recover(*arguments, **options)

    recover = bank.cluster._transactions.recovery.conclude
    bank.cluster._transactions.recovery.conclude = next_cut
    if never_arrives:
        with pytest.raises(TransactionAborted):
            await bank.commit("s1", "s2", is_async=is_async)
    else:
        await bank.commit("s1", "s2", is_async=is_async)
    assert one.cuts == 2
    assert bank.holds() == ([] if never_arrives else ["s1", "s2"])


def test_prepare_that_arrives_when_its_tombstone_is_old_is_refused(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast = driver.broadcast

    def held_up(connections: dict, commands: dict) -> dict:
        """Let others recover, and clean up, before PREPARE gets to s2."""
        if "PREPARE TRANSACTION" not in commands["s1"]:
            return broadcast(connections, commands)
        parts = [{shard: connections[shard]} for shard in ("s1", "s2")]
        found = broadcast(parts[0], commands)
        with bank.servers.local.cluster(recover_in_background=False) as other:
            assert len(other.recover(grace=0).rolled_back) == 1
            for _ in range(3):
                other._transactions.housekeeping.clean(age=0)
        return found | broadcast(parts[1], commands)

    monkeypatch.setattr(driver, "broadcast", held_up)
    with bank.cluster.sessionmaker()() as session:
        session.add(Account(number=bank.numbers["s1"], balance=1))
        session.flush()
        # It matches no row: s2 counts as written on, by a transaction without an id.
        nothing = update(Account).where(Account.number == bank.numbers["s2"])
        session.execute(nothing.values(balance=2))
        with pytest.raises(TransactionAborted, match="recovery"):
            session.commit()
    assert bank.holds() == []
