"""Commits over several shards, by what the servers hold afterwards."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import warnings
from concurrent.futures import wait

import pytest
from sqlalchemy import event, exc, func, select, text

from shardalchemy import Cluster, ConfigurationError, TransactionAborted
from shardalchemy.commit import Gid, finisher
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Account, Base, Note, number_on
from tests.conftest import Servers


@pytest.fixture
def bank(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    return cluster


BALANCES = "SELECT number, balance FROM accounts ORDER BY number"
MARKERS = "SELECT gid, outcome FROM shardalchemy.txn"


def cleared_markers(servers: Servers) -> None:
    servers.run("DELETE FROM shardalchemy.txn")


@pytest.mark.parametrize("ack", ["committed", "prepared"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_transaction_over_shards_is_on_all_of_them(
    bank: Cluster, servers: Servers, ack: str, count: int
) -> None:
    cleared_markers(servers)
    shards = list(servers)[:count]
    numbers = {shard: number_on(bank, shard) for shard in shards}
    Session = bank.sessionmaker(ack=ack)
    with Session() as session:
        session.add_all(Account(number=n, balance=100) for n in numbers.values())
        session.commit()
        # The session waits for the second step before it reads there again.
        for number in numbers.values():
            assert session.get_one(Account, number).balance == 100
    assert servers.where(BALANCES) == {s: [(n, 100)] for s, n in numbers.items()}
    markers = servers.where(MARKERS)
    assert set(markers) == set(shards)
    assert len({gid for rows in markers.values() for gid, _ in rows}) == 1
    assert servers.prepared() == {}


@pytest.mark.parametrize("resolve_commits", [True, False])
def test_one_writer_leaves_one_marker_or_none(
    bank: Cluster,
    servers: Servers,
    resolve_commits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finisher, "_FORGET_EVERY", 60.0)
    cleared_markers(servers)
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with (
        servers.local.cluster(resolve_commits=resolve_commits) as cluster,
        cluster.sessionmaker()() as session,
    ):
        session.add(Account(number=a, balance=1))
        session.commit()
        assert set(servers.where(MARKERS)) == ({"s1"} if resolve_commits else set())
        cleared_markers(servers)
        session.get(Account, b)  # read on s2, write on s1
        session.get_one(Account, a).balance = 2
        session.commit()
        assert set(servers.where(MARKERS)) == ({"s1"} if resolve_commits else set())
        cleared_markers(servers)
        session.add(Note(text="at home, and in no other table"))
        session.commit()
    assert servers.where(MARKERS) == {}
    assert servers.where(BALANCES) == {"s1": [(a, 2)]}


def test_a_lock_for_update_makes_a_shard_a_writer(
    bank: Cluster, servers: Servers
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker().begin() as session:
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
    cleared_markers(servers)
    with bank.sessionmaker().begin() as session:
        session.get(Account, b, with_for_update=True)
        session.get_one(Account, a).balance = 2
    assert set(servers.where(MARKERS)) == {"s1", "s2"}


def test_what_was_written_past_the_orm_takes_part(
    bank: Cluster, servers: Servers
) -> None:
    a = number_on(bank, "s1")
    with bank.sessionmaker().begin() as session:
        session.add(Account(number=a, balance=1))
        home = session.connection(bind_arguments={"shard": "s3"})
        home.exec_driver_sql("CREATE TABLE extra (x int)")
    assert servers.where("SELECT to_regclass('extra')::text")["s3"] == [("extra",)]
    assert servers.where(BALANCES) == {"s1": [(a, 1)]}
    servers.run("DROP TABLE IF EXISTS extra")


def test_rows_of_a_home_table_commit_with_the_others(
    bank: Cluster, servers: Servers
) -> None:
    b = number_on(bank, "s2")
    with bank.sessionmaker().begin() as session:
        session.add_all([Note(text="moved"), Account(number=b, balance=5)])
    assert servers.rows("s1", "SELECT text FROM notes") == [("moved",)]
    assert servers.where(BALANCES) == {"s2": [(b, 5)]}


def test_a_definite_failure_leaves_nothing_on_any_shard(
    bank: Cluster, servers: Servers
) -> None:
    servers.run(
        "ALTER TABLE accounts ADD CONSTRAINT odd EXCLUDE (balance WITH =)"
        " DEFERRABLE INITIALLY DEFERRED"
    )
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    c = number_on(bank, "s2", b + 1)
    with bank.sessionmaker()() as session:
        session.add_all(
            [
                Account(number=a, balance=1),
                Account(number=b, balance=7),
                Account(number=c, balance=7),
            ]
        )
        # The constraint is checked at the commit, here by PREPARE.
        with pytest.raises(exc.IntegrityError):
            session.commit()
        # The session is as after any failed commit: rolled back, and usable.
        assert session.scalars(select(Account)).all() == []
    assert servers.where(BALANCES) == {}
    assert servers.prepared() == {}


def test_a_failed_statement_on_one_shard_keeps_all_from_committing(
    bank: Cluster, servers: Servers
) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    with bank.sessionmaker()() as session:
        session.add_all([Account(number=a, balance=1), Account(number=b, balance=1)])
        session.flush()
        with pytest.raises(exc.DBAPIError):
            session.execute(text("SELECT 1/0"), execution_options={"shard": "s2"})
        with pytest.raises(TransactionAborted, match="shard s2 has failed"):
            session.commit()
    assert servers.where(BALANCES) == {}


def test_a_savepoint_spans_shards(bank: Cluster, servers: Servers) -> None:
    a, b, c = (number_on(bank, shard) for shard in ("s1", "s2", "s3"))
    with bank.sessionmaker().begin() as session:
        session.add(Account(number=a, balance=1))
        session.flush()
        savepoint = session.begin_nested()
        session.add(Account(number=b, balance=1))
        session.flush()
        session.add(Account(number=c, balance=-1))
        with pytest.raises(exc.IntegrityError):
            session.flush()
        savepoint.rollback()
        session.get_one(Account, a).balance = 3
    assert servers.where(BALANCES) == {"s1": [(a, 3)]}


def test_a_rollback_is_on_all_shards(bank: Cluster, servers: Servers) -> None:
    with bank.sessionmaker()() as session:
        session.add_all(
            Account(number=number_on(bank, shard), balance=1) for shard in servers
        )
        session.flush()
        session.rollback()
    assert servers.where(BALANCES) == {}


def test_session_events_are_fired_once(bank: Cluster, servers: Servers) -> None:
    seen: list[str] = []
    Session = bank.sessionmaker()
    for name in ("before_commit", "after_commit", "before_flush", "after_rollback"):
        event.listen(Session, name, lambda *_, name=name: seen.append(name))
    with Session() as session:
        session.add_all(
            Account(number=number_on(bank, shard), balance=1) for shard in servers
        )
        session.commit()
        assert seen == ["before_commit", "before_flush", "after_commit"]
        session.rollback()


def held_finisher(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold the second step of commits that nobody waits for until the event is set."""
    finish = finisher.Finisher.finish
    let_go = threading.Event()

    def held(self: finisher.Finisher, works: list) -> list:
        let_go.wait(10)
        return finish(self, works)

    monkeypatch.setattr(finisher.Finisher, "finish", held)
    return let_go


def test_a_session_given_a_commit_token_sees_that_commit(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = held_finisher(monkeypatch)
    numbers = [number_on(bank, shard) for shard in servers]
    with (
        bank.sessionmaker(ack="prepared")() as writer,
        servers.local.cluster() as elsewhere,
        elsewhere.sessionmaker()() as unaware,
    ):
        assert writer.commit_token is None
        writer.add_all(Account(number=n, balance=1) for n in numbers)
        writer.commit()
        token = writer.commit_token
        assert token is not None
        assert unaware.scalars(select(Account)).all() == []
        threading.Timer(0.2, let_go.set).start()
        with elsewhere.sessionmaker()(after=token) as reader:
            assert reader.commit_token == token
            assert len(reader.scalars(select(Account)).all()) == 4
            assert reader.commit_token is None
        assert len(writer.scalars(select(Account)).all()) == 4
        assert writer.commit_token is None
        with elsewhere.sessionmaker()(after=writer.commit_token) as reader:
            assert reader.get_one(Account, numbers[0]).balance == 1


def test_a_token_of_a_process_that_is_gone_is_seen_all_the_same(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher.Finisher, "finish", lambda self, works: works)
    numbers = [number_on(bank, shard) for shard in servers]
    with bank.sessionmaker(ack="prepared")() as writer:
        writer.add_all(Account(number=n, balance=1) for n in numbers)
        writer.commit()
        with bank.sessionmaker()(after=writer.commit_token) as reader:
            assert len(reader.scalars(select(Account)).all()) == 4


@pytest.mark.parametrize("token", ["sa1:00000000:" + "0" * 32 + ":3", "nonsense"])
def test_what_is_no_token_of_this_cluster_is_refused(bank: Cluster, token: str) -> None:
    with pytest.raises(ConfigurationError, match="token"):
        bank.sessionmaker()(after=token).scalars(select(Account)).all()


async def test_a_token_in_an_event_loop(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = held_finisher(monkeypatch)
    Session = bank.async_sessionmaker(ack="prepared")
    async with Session() as writer, Session() as plain:
        writer.add_all(
            Account(number=number_on(bank, shard), balance=1) for shard in servers
        )
        await writer.commit()
        threading.Timer(0.2, let_go.set).start()
        async with Session(after=writer.commit_token) as reader:
            assert len((await reader.scalars(select(Account))).all()) == 4
        assert len((await writer.scalars(select(Account))).all()) == 4
        assert plain.commit_token is None
    await bank.aclose()


async def test_the_same_in_an_event_loop(bank: Cluster, servers: Servers) -> None:
    numbers = {shard: number_on(bank, shard) for shard in servers}
    for ack in ("committed", "prepared"):
        async with bank.async_sessionmaker(ack=ack)() as session:
            async with session.begin():
                for number in numbers.values():
                    account = await session.get(Account, number)
                    if account is None:
                        session.add(Account(number=number, balance=1))
                    else:
                        account.balance += 1
            found = await session.scalars(select(Account))
            assert {a.number for a in found} == set(numbers.values())
    await bank.aclose()
    assert servers.where(BALANCES) == {s: [(n, 2)] for s, n in numbers.items()}
    assert servers.prepared() == {}


async def test_many_tasks_commit_at_once(bank: Cluster, servers: Servers) -> None:
    a, b = number_on(bank, "s1"), number_on(bank, "s2")
    Session = bank.async_sessionmaker()
    async with Session.begin() as session:
        session.add_all([Account(number=a, balance=100), Account(number=b, balance=0)])

    async def transfer() -> None:
        async with Session.begin() as session:
            source = await session.get_one(Account, a, with_for_update=True)
            target = await session.get_one(Account, b, with_for_update=True)
            source.balance -= 1
            target.balance += 1

    await asyncio.gather(*(transfer() for _ in range(40)))
    await bank.aclose()
    assert servers.where(BALANCES) == {"s1": [(a, 60)], "s2": [(b, 40)]}


def test_markers_are_deleted_in_time(
    bank: Cluster, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher, "RETENTION", 0.0)
    with bank.sessionmaker().begin() as session:
        session.add_all(
            Account(number=number_on(bank, shard), balance=1) for shard in servers
        )
    bank.close()  # which finishes what is pending
    assert servers.where(MARKERS) == {}


def test_a_server_without_prepared_transactions_is_named_at_the_start() -> None:
    settings = {"max_prepared_transactions": "0"}
    with LocalCluster(2, with_redis=False, settings=settings) as local:
        with (
            local.cluster() as cluster,
            pytest.raises(ConfigurationError, match="max_prepared_transactions"),
        ):
            cluster.create_all(Base.metadata)
        # One shard alone prepares nothing.
        with Cluster({"s1": local.urls["s1"]}) as cluster:
            cluster.create_all(Base.metadata)
            with cluster.sessionmaker().begin() as session:
                session.add(Account(number=1, balance=1))


def test_prepared_slots_that_run_out_roll_back_everywhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    settings = {"max_prepared_transactions": "1"}
    with (
        LocalCluster(2, with_redis=False, settings=settings) as local,
        local.cluster() as cluster,
    ):
        cluster.create_all(Base.metadata)
        servers = Servers(local)
        with servers.connect("s2") as other:
            other.execute("BEGIN")
            other.execute("CREATE TABLE taken (x int)")
            other.execute("PREPARE TRANSACTION 'someone''s'")
            with cluster.sessionmaker()() as session:
                session.add_all(
                    Account(number=number_on(cluster, shard), balance=1)
                    for shard in ("s1", "s2")
                )
                with pytest.raises(exc.OperationalError, match="max_prepared"):
                    session.commit()
            assert servers.where(BALANCES) == {}
            other.execute("ROLLBACK PREPARED 'someone''s'")


@pytest.mark.parametrize("where", ["home", "sharded"])
def test_a_commit_on_a_connection_that_has_ended_does_not_return(
    bank: Cluster, servers: Servers, where: str
) -> None:
    resolve_commits = where == "home"
    with (
        servers.local.cluster(resolve_commits=resolve_commits) as cluster,
        cluster.sessionmaker()() as session,
    ):
        session.add(
            Note(text="lost")
            if where == "home"
            else Account(number=number_on(bank, "s1"), balance=1)
        )
        session.flush()
        pid = session.scalar(select(func.pg_backend_pid()))
        servers.rows("s1", "SELECT pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(exc.OperationalError) as caught:
            session.commit()
        assert caught.value.connection_invalidated
    assert servers.where(BALANCES) == {}
    assert servers.rows("s1", "SELECT text FROM notes") == []


def test_a_backlog_of_the_second_step_is_finished_to_the_last(
    bank: Cluster, servers: Servers
) -> None:
    topology = bank.topology
    done = []

    def away(shard: str) -> object:
        raise exc.OperationalError("", {}, ConnectionRefusedError())

    behind = finisher.Finisher(away)
    for _ in range(1010):
        gid = Gid.new(topology.cluster, [0, 1])
        branches = {"s1": gid.on(0), "s2": gid.on(1)}
        done.append(behind.commit(gid, branches, marked=branches))
    time.sleep(0.5)
    behind._connect = bank._sync.connect  # back again; another has finished them all
    wait(done, timeout=60)
    assert all(one.done() and one.exception() is None for one in done)
    behind.close()


def test_recovery_runs_in_the_process_that_made_the_tables_and_in_its_forks(
    servers: Servers, empty_servers: Servers
) -> None:
    def patrols() -> int:
        names = [thread.name for thread in threading.enumerate()]
        return names.count("shardalchemy-recovery")

    others = patrols()
    with servers.local.cluster() as cluster:
        cluster.create_all(Base.metadata)
        with cluster.sessionmaker().begin() as session:
            session.add(Account(number=1, balance=1))
        assert patrols() == others + 1
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and threads
            child = os.fork()
        if child == 0:
            try:
                with cluster.sessionmaker()() as session:
                    session.get(Account, 1)
                os.write(writer, str(patrols()).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as said:
            assert said.read() == "1"  # a fork has none of its parent's threads
        cluster.close()
        assert patrols() == others
