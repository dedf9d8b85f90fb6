"""Snapshots of all shards, by what is read in them while others commit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, exc, func, insert, make_url, select, text, update
from sqlalchemy.orm import aliased

from shardalchemy import (
    Cluster,
    ConfigurationError,
    ShardedSession,
    SnapshotOver,
    SnapshotReadOnly,
    SnapshotUnavailable,
)
from shardalchemy.commit import driver
from shardalchemy.commit.gate import SHARED
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, number_on
from tests.commit.torn import TOTAL, open_accounts, read, transfer, transfers
from tests.conftest import Servers


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    """One account a shard, with TOTAL each."""
    open_accounts(cluster)
    return cluster


class Dead(BaseException):
    """The client stops here, as if its process had been killed."""


@contextlib.contextmanager
def client_dies(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    """Have a commit stop before ``_prepare`` or ``_settle``; the block is its last."""

    def die(*_: object) -> None:
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(driver, where, die)
        with pytest.raises(Dead):
            yield


def prepared(servers: Servers) -> dict[str, str]:
    return {shard: rows[0][0] for shard, rows in servers.prepared().items()}


def leave_prepared(
    bank: Cluster, a: int, b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave a transfer of 10 prepared on both of its shards."""
    with client_dies(monkeypatch, "_settle"), bank.sessionmaker()() as session:
        transfer(session, a, b, 10)
        session.commit()


BALANCES = {
    "scatter": lambda s: sum(a.balance for a in s.scalars(select(Account))),
    "combine": lambda s: s.scalar(select(func.sum(Account.balance))),
    "gather": lambda s: sum(
        s.scalars(
            select(Account.balance).where(
                Account.balance
                <= select(func.sum(aliased(Account).balance)).scalar_subquery()
            )
        )
    ),
    "textual": lambda s: sum(s.scalars(text("SELECT balance FROM accounts"))),
}


def test_a_plain_session_is_torn_and_a_snapshot_is_not(bank: Cluster) -> None:
    plain = read(bank, bank.sessionmaker(), 2)
    whole = read(bank, bank.snapshot, 2)
    print(f"plain session: {plain}; snapshots: {whole}")
    assert plain.torn > 0
    assert whole.torn == 0
    assert whole.reads > 20


@pytest.mark.parametrize("strict", [False, True])
def test_a_sum_over_all_shards_is_constant_in_every_kind_of_plan(
    bank: Cluster, strict: bool
) -> None:
    expected = TOTAL * len(bank.topology.shards)
    with transfers(bank) as done:
        before = sum(done)
        for _ in range(5 if strict else 25):
            with bank.snapshot(strict=strict) as session:
                for kind, total in BALANCES.items():
                    assert total(session) == expected, kind
        assert sum(done) > before
    counts = bank.counters
    assert counts["snapshots"] == (5 if strict else 25)


def test_without_a_base_of_its_own_a_snapshot_is_whole(bank: Cluster) -> None:
    expected = TOTAL * len(bank.topology.shards)
    snapshots = bank._transactions.snapshots
    with transfers(bank):
        for _ in range(60):
            snapshots._last = None
            with bank.snapshot() as session:
                assert BALANCES["combine"](session) == expected


def test_kinds_of_plans_are_what_the_test_above_takes_them_for(bank: Cluster) -> None:
    with bank.snapshot() as session:
        assert isinstance(session, ShardedSession)
        total = func.sum(Account.balance)
        assert session.explain(select(Account)).kind.value == "scatter"
        assert session.explain(select(total)).kind.value == "combine"
        inner = select(func.sum(aliased(Account).balance)).scalar_subquery()
        gathered = select(Account.balance).where(Account.balance <= inner)
        assert session.explain(gathered).kind.value == "gather"


def test_all_that_a_session_reads_is_of_one_moment(bank: Cluster) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.snapshot() as session:
        with bank.sessionmaker().begin() as writer:
            transfer(writer, a, b, 7)
        assert session.get_one(Account, a).balance == TOTAL
        session.expire_all()
        assert session.get_one(Account, b).balance == TOTAL
        with session.begin_nested() as savepoint:
            with pytest.raises(exc.DBAPIError):
                session.execute(text("SELECT 1/0"), execution_options={"shard": "s2"})
            savepoint.rollback()
        assert session.scalar(select(func.min(Account.balance))) == TOTAL
    with bank.snapshot() as session:
        assert session.get_one(Account, a).balance == TOTAL - 7


def test_a_transaction_committed_by_hand_on_one_shard_is_finished(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    for base in (True, False):
        leave_prepared(bank, a, b, monkeypatch)
        if not base:
            bank._transactions.snapshots._last = None
        with bank.snapshot() as session:  # not to be seen anywhere
            before = session.get_one(Account, a).balance
            assert BALANCES["combine"](session) == TOTAL * 4
        if not base:
            bank._transactions.snapshots._last = None
        with servers.connect("s1") as connection:
            connection.execute(f"COMMIT PREPARED '{prepared(servers)['s1']}'")
        start = time.monotonic()
        with bank.snapshot() as session:
            assert session.get_one(Account, a).balance == before - 10
            assert BALANCES["combine"](session) == TOTAL * 4
        assert time.monotonic() - start < 1
        assert servers.prepared() == {}
    assert bank.counters["snapshot.retries"] >= 2


def test_a_transaction_committed_long_before_on_one_shard_is_finished(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    leave_prepared(bank, a, b, monkeypatch)
    with servers.connect("s1") as connection:
        connection.execute(f"COMMIT PREPARED '{prepared(servers)['s1']}'")
    time.sleep(0.3)
    with bank.snapshot() as session:
        assert BALANCES["combine"](session) == TOTAL * 4
        assert session.get_one(Account, b).balance == TOTAL + 10


@pytest.mark.parametrize("shard", ["s1", "s2"])
def test_an_undecided_transaction_is_nowhere_and_keeps_nobody(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    leave_prepared(bank, a, b, monkeypatch)
    other = {"s1": "s2", "s2": "s1"}[shard]
    with servers.connect(other) as connection:
        connection.execute(f"ROLLBACK PREPARED '{prepared(servers)[other]}'")
    for _ in range(3):
        start = time.monotonic()
        with bank.snapshot() as session:
            assert {x.balance for x in session.scalars(select(Account))} == {TOTAL}
        assert time.monotonic() - start < 0.5
    assert set(servers.prepared()) == {shard}


def test_a_tombstone_is_no_commit(bank: Cluster, servers: Servers) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.snapshot():
        pass
    with bank.sessionmaker().begin() as session:
        transfer(session, a, b)
    [(gid,)] = servers.rows(
        "s1", "SELECT gid FROM shardalchemy.txn ORDER BY xid DESC LIMIT 1"
    )
    other = gid.replace(":3", ":6") if gid.endswith(":3") else gid[:-1] + "3"
    sql = "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'aborted')"
    with servers.connect("s2") as connection:
        connection.execute(sql, [other])
    with bank.snapshot() as session:
        assert session.get_one(Account, a).balance == TOTAL - 1
    counts = bank.counters
    assert counts.get("snapshot.retries", 0) == 0


def test_a_client_that_pauses_while_it_opens_starts_over(
    bank: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardalchemy.commit import finisher, snapshot

    monkeypatch.setattr(finisher, "RETENTION", 0.4)
    ask = snapshot._Opening._ask
    paused = []

    def pause_once(opening: object, evidence: object) -> None:
        ask(opening, evidence)  # type: ignore[arg-type]
        if not paused:
            paused.append(1)
            time.sleep(0.3)

    monkeypatch.setattr(snapshot._Opening, "_ask", pause_once)
    with bank.snapshot() as session:
        began = bank._transactions.snapshots._last
        assert began is not None
        assert time.monotonic() - began.began < 0.2
        assert BALANCES["scatter"](session) == TOTAL * 4


def test_markers_that_snapshots_may_need_outlive_their_process(
    bank: Cluster, servers: Servers
) -> None:
    bank.close()
    with servers.local.cluster() as cluster, cluster.sessionmaker()() as session:
        transfer(session, number_on(cluster, "s1"), number_on(cluster, "s2"))
        session.commit()
    sql = "SELECT gid FROM shardalchemy.txn ORDER BY xid DESC LIMIT 1"
    left = servers.where(sql)
    assert left["s1"] == left["s2"]


def test_a_role_that_may_only_read_has_whole_snapshots_too(
    bank: Cluster, servers: Servers
) -> None:
    servers.run(
        "DO $$ BEGIN CREATE ROLE reader LOGIN PASSWORD 'reader';"
        " EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        "ALTER ROLE reader SET default_transaction_read_only = on;"
        "GRANT USAGE ON SCHEMA public, shardalchemy TO reader;"
        "GRANT SELECT ON ALL TABLES IN SCHEMA public, shardalchemy TO reader"
    )
    urls = {
        shard: make_url(url).set(username="reader", password="reader")
        for shard, url in servers.local.urls.items()
    }
    with Cluster(urls, recover_in_background=False) as cluster, transfers(bank):
        for turn in range(30):
            with cluster.snapshot(strict=turn % 10 == 9) as session:
                assert BALANCES["scatter"](session) == TOTAL * 4
        counts = cluster.counters
    assert counts["snapshot.retries"] > 0


# -- writes, and the end ---------------------------------------------------------------


def test_writes_are_refused(bank: Cluster, servers: Servers) -> None:
    a = number_on(bank, "s1")
    new = number_on(bank, "s1", a + 1)
    with bank.snapshot() as session:
        for write in (
            lambda: session.execute(insert(Account).values(number=new, balance=1)),
            lambda: session.execute(update(Account).values(balance=1)),
            lambda: session.bulk_save_objects([Account(number=new, balance=1)]),
            lambda: session.lock_row(Account, a),
        ):
            with pytest.raises(SnapshotReadOnly, match="read-only"):
                write()
        session.get_one(Account, a).balance += 1
        with pytest.raises(SnapshotReadOnly, match="Account"):
            session.flush()
        session.expire_all()
        account = session.get_one(Account, a)
        account.balance = account.balance  # which changes nothing
        session.flush()
        session.add(Account(number=new, balance=1))
        with pytest.raises(SnapshotReadOnly, match="Account"):
            session.scalars(select(Account))
    with (
        bank.snapshot() as session,
        pytest.raises(exc.InternalError, match="read-only transaction"),
    ):
        session.execute(text("DELETE FROM accounts"), execution_options={"shard": "s1"})
    assert len(servers.where("SELECT * FROM accounts")) == 4


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "invalidate"])
def test_after_its_end_a_snapshot_reads_nothing_more(
    bank: Cluster, servers: Servers, end: str
) -> None:
    with bank.snapshot() as session:
        session.scalars(select(Account)).all()
        getattr(session, end)()
        for read in (
            lambda: session.scalars(select(Account)),
            lambda: session.get(Account, 1),
            lambda: session.begin(),
            lambda: session.export(),
        ):
            with pytest.raises(SnapshotOver, match="snapshot is over"):
                read()
    busy = "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    until(lambda: not servers.where(busy))


def test_a_snapshot_is_opened_once_and_knows_no_other_server(
    bank: Cluster, servers: Servers
) -> None:
    snapshot = bank.snapshot()
    engine = create_engine(servers.local.urls["s1"])
    with snapshot as session, pytest.raises(SnapshotOver, match="no shard of this"):
        session.execute(select(1), bind_arguments={"bind": engine})
    with pytest.raises(ConfigurationError, match="opened once"):
        snapshot.__enter__()
    engine.dispose()


def test_connections_go_back_clean(bank: Cluster) -> None:
    with bank.snapshot():
        pass
    with bank.sessionmaker()() as session:
        for shard in bank.topology.shards:
            connection = session.connection(bind_arguments={"shard": shard})
            for setting, value in (
                ("transaction_read_only", "off"),
                ("transaction_isolation", "read committed"),
                ("lock_timeout", "0"),
            ):
                assert connection.exec_driver_sql(f"SHOW {setting}").scalar() == value


def test_a_shard_given_as_a_connection_has_no_snapshot(
    servers: Servers, bank: Cluster
) -> None:
    engine = create_engine(servers.local.urls["s1"])
    with engine.connect() as connection:
        shards = {**servers.local.urls, "s1": connection}
        with (
            Cluster(shards) as cluster,
            pytest.raises(ConfigurationError, match="given as a Connection"),
        ):
            cluster.snapshot().__enter__()
    engine.dispose()


# -- export --------------------------------------------------------------------------


def test_an_exported_snapshot_is_read_by_others(
    bank: Cluster, servers: Servers
) -> None:
    with transfers(bank), bank.snapshot() as session:
        ids = session.export()
        total = 0
        for shard, snapshot in ids.items():
            with servers.connect(shard) as connection:
                connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
                row = connection.execute("SELECT sum(balance) FROM accounts").fetchone()
                assert row is not None
                total += row[0]
        assert set(ids) == set(servers)
        assert total == BALANCES["combine"](session) == TOTAL * 4


DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs PostgreSQL 15 from Debian")
def test_pg_dump_takes_an_exported_snapshot() -> None:
    with (
        LocalCluster(2, postgres=DEBIAN, with_redis=False) as local,
        local.cluster() as cluster,
    ):
        open_accounts(cluster)
        with transfers(cluster, 2), cluster.snapshot() as snapshot:
            time.sleep(0.1)
            dumped = sum(
                dumped_balance(local.urls[shard], name)
                for shard, name in snapshot.export().items()
            )
            assert dumped == BALANCES["combine"](snapshot) == 2 * TOTAL


def dumped_balance(url: str, snapshot: str) -> int:
    """Return the balance of a shard's one account, from what pg_dump writes."""
    program = DEBIAN / "pg_dump"
    options = [f"--snapshot={snapshot}", "--data-only", "--inserts", "--table=accounts"]
    run = subprocess.run(
        [program, *options, url.replace("+psycopg", "")],
        capture_output=True,
        text=True,
        check=True,
    )
    [row] = [line for line in run.stdout.splitlines() if line.startswith("INSERT")]
    return int(row.rstrip(");").rpartition(" ")[2])


# -- order -----------------------------------------------------------------------------


def commit_one_after_the_other(bank: Cluster, first: int, second: int) -> None:
    """Commit on one shard alone, and then on another one alone."""
    for number in (first, second):
        with bank.sessionmaker().begin() as session:
            session.get_one(Account, number).balance += 1


@pytest.mark.parametrize("strict", [True, False])
def test_strict_keeps_the_order_of_commits_on_single_shards(
    bank: Cluster, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    from shardalchemy.commit import snapshot

    first, second = number_on(bank, "s1"), number_on(bank, "s4")
    ask_all = snapshot.ask_all
    writers: list[threading.Thread] = []

    def slowly(connections: dict, commands: dict, **how: float) -> dict:
        """Open one shard after another, with two commits between the first and last."""
        if not any("REPEATABLE" in command for command in commands.values()):
            return ask_all(connections, commands, **how)
        found = {}
        for shard, command in sorted(commands.items()):
            found |= ask_all(connections, {shard: command}, **how)
            if not writers:
                thread = threading.Thread(
                    target=commit_one_after_the_other, args=(bank, first, second)
                )
                writers.append(thread)
                thread.start()
                thread.join(0.03 if strict else None)
        return found

    monkeypatch.setattr(snapshot, "ask_all", slowly)
    with bank.snapshot(strict=strict) as session:
        seen = [session.get_one(Account, n).balance for n in (first, second)]
    writers[0].join()
    # Of the two it may show neither, the first or both, but not the second alone.
    assert seen == ([TOTAL, TOTAL] if strict else [TOTAL, TOTAL + 1])
    with bank.snapshot(strict=strict) as session:
        assert session.get_one(Account, first).balance == TOTAL + 1


def test_strict_shows_what_was_acknowledged_when_it_was_prepared(bank: Cluster) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    Session = bank.sessionmaker(ack="prepared")
    for turn in range(1, 21):
        with Session.begin() as session:
            transfer(session, a, b)
        with bank.snapshot(strict=True) as session:
            assert session.get_one(Account, b).balance == TOTAL + turn


def test_a_commit_token_is_waited_for_before_a_snapshot_opens(bank: Cluster) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker(ack="prepared")() as session:
        for turn in range(1, 21):
            transfer(session, a, b)
            session.commit()
            with bank.snapshot(after=session.commit_token) as snapshot:
                assert snapshot.get_one(Account, b).balance == TOTAL + turn


def test_strict_finishes_what_a_dead_client_has_decided(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    leave_prepared(bank, a, b, monkeypatch)
    with bank.snapshot(strict=True) as session:
        assert session.get_one(Account, b).balance == TOTAL + 10
    assert servers.prepared() == {}


ADVISORY = "SELECT mode, granted FROM pg_locks WHERE locktype = 'advisory'"


def test_a_commit_that_never_ends_keeps_no_strict_snapshot(
    bank: Cluster, servers: Servers
) -> None:
    with servers.connect("s3") as connection:
        connection.execute(f"BEGIN; SELECT {SHARED}")
        start = time.monotonic()
        for _ in range(3):
            with bank.snapshot(strict=True) as session:
                assert BALANCES["scatter"](session) == TOTAL * 4
        assert time.monotonic() - start < 1
        assert servers.where(ADVISORY) == {"s3": [("ShareLock", True)]}
    until(lambda: not servers.where(ADVISORY))


def test_a_gate_that_opens_too_early_is_shut_again_until_the_timeout(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardalchemy.commit import gate, snapshot

    run = snapshot._Opening.run

    def late(*arguments: object) -> object:
        cut = run(*arguments)  # type: ignore[arg-type]
        time.sleep(1.5 * gate.PATIENCE)
        return cut

    with servers.connect("s2") as connection:
        connection.execute(f"BEGIN; SELECT {SHARED}")  # or it would be granted
        with monkeypatch.context() as patch:
            patch.setattr(snapshot._Opening, "run", late)
            with pytest.raises(SnapshotUnavailable, match="held up"):
                bank.snapshot(strict=True, timeout=0.5).__enter__()
        assert servers.where(ADVISORY) == {"s2": [("ShareLock", True)]}
    assert bank.counters["snapshot.gates"] >= 2


# -- in an event loop ------------------------------------------------------------------


async def test_the_same_in_an_event_loop(bank: Cluster) -> None:
    numbers = [number_on(bank, shard) for shard in bank.topology.shards]
    Session = bank.async_sessionmaker()
    stop = asyncio.Event()

    async def write(seed: int) -> None:
        choose = random.Random(seed)
        while not stop.is_set():
            async with Session.begin() as session:
                await session.run_sync(transfer, *choose.sample(numbers, 2))

    writers = [asyncio.create_task(write(n)) for n in range(3)]
    try:
        for turn in range(20):
            async with bank.snapshot(strict=turn % 5 == 4) as session:
                total = await session.scalar(select(func.sum(Account.balance)))
                accounts = await session.scalars(select(Account))
                assert total == sum(a.balance for a in accounts) == TOTAL * 4
                assert set(await session.export()) == set(bank.topology.shards)
                await session.rollback()
                with pytest.raises(SnapshotOver):
                    await session.scalars(select(Account))
    finally:
        stop.set()
        await asyncio.gather(*writers)
        await bank.aclose()


# -- shards that are down --------------------------------------------------------------


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killable() -> Iterator[LocalCluster]:
    with LocalCluster(2, with_redis=False) as local:
        yield local


def test_a_shard_that_is_down_or_does_not_answer_is_named(
    killable: LocalCluster,
) -> None:
    server = killable.servers["s2"]
    with killable.cluster() as cluster:
        cluster.create_all(Base.metadata)
        with cluster.snapshot() as session:
            assert session.scalars(select(Account)).all() == []
        server.pause()
        start = time.monotonic()
        with pytest.raises(SnapshotUnavailable, match="shard s2 did not answer"):
            cluster.snapshot(timeout=0.5).__enter__()
        assert time.monotonic() - start < 1.5
        server.kill()
        with pytest.raises(SnapshotUnavailable, match="shard s2 cannot be reached"):
            cluster.snapshot(timeout=5).__enter__()
        server.start()
        with cluster.snapshot() as session:
            assert session.scalars(select(Account)).all() == []
        # What lies in the pool was closed by its server; it is not taken for an answer.
        server.kill()
        server.start()
        with cluster.snapshot() as session:
            assert session.scalars(select(Account)).all() == []


async def test_a_shard_that_does_not_answer_is_named_in_an_event_loop(
    killable: LocalCluster,
) -> None:
    server = killable.servers["s2"]
    async with killable.cluster() as cluster:
        await cluster.create_all_async(Base.metadata)
        async with cluster.snapshot():
            pass
        server.pause()
        try:
            start = time.monotonic()
            with pytest.raises(SnapshotUnavailable, match="shard s2 did not answer"):
                await cluster.snapshot(timeout=0.5).__aenter__()
            assert time.monotonic() - start < 1.5
        finally:
            server.resume()
