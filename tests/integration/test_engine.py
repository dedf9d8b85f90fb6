"""Connections that wait together, on real servers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, create_engine, exc, text
from sqlalchemy.util import greenlet_spawn

from shardalchemy import Cluster, ConfigurationError
from shardalchemy.engine import ShardEngines, attempt_all, fanout
from shardalchemy.engine.wire import driver_of, simple_query
from tests.conftest import Servers


@pytest.fixture
def connections(servers: Servers) -> Iterator[dict[str, Connection]]:
    engines = ShardEngines(servers.local.urls)
    opened = {name: engines.sync(name).connect() for name in servers}
    yield opened
    for connection in opened.values():
        connection.close()
    engines.dispose()


def sleep(seconds: float) -> object:
    return lambda _, connection: connection.scalar(
        text("SELECT pg_backend_pid() FROM pg_sleep(:s)"), {"s": seconds}
    )


def test_waits_overlap_in_one_thread(connections: dict[str, Connection]) -> None:
    threads = threading.active_count()
    start = time.monotonic()
    pids = fanout(sleep(0.4), connections)
    assert time.monotonic() - start < 1.0
    assert len(set(pids.values())) == 4
    assert threading.active_count() == threads
    # Afterwards each connection waits for itself again.
    assert all("wait" not in vars(driver_of(c)) for c in connections.values())


def test_an_error_cancels_the_others_and_leaves_them_known(
    connections: dict[str, Connection],
) -> None:
    def step(shard: str, connection: Connection) -> None:
        seconds = "1/0" if shard == "s3" else "30"
        connection.execute(text(f"SELECT pg_sleep({seconds})"))

    start = time.monotonic()
    with pytest.raises(exc.DataError, match="division by zero"):
        fanout(step, connections)
    assert time.monotonic() - start < 5
    for connection in connections.values():
        status = driver_of(connection).info.transaction_status
        assert status == TransactionStatus.INERROR
        connection.rollback()
        assert connection.scalar(text("SELECT 1")) == 1


def test_attempt_all_lets_the_others_finish(connections: dict[str, Connection]) -> None:
    def step(shard: str, connection: Connection) -> str:
        connection.execute(text("SELECT 1/0" if shard == "s2" else "SELECT 1"))
        return shard

    outcomes = attempt_all(step, connections)
    assert isinstance(outcomes.pop("s2"), exc.DataError)
    assert outcomes == {shard: shard for shard in ("s1", "s3", "s4")}


def test_ctrl_c_cancels_all(connections: dict[str, Connection]) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fanout(sleep(30), connections)
    assert time.monotonic() - start < 5
    for connection in connections.values():
        connection.rollback()
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_server_that_does_not_answer_a_cancellation_is_given_up(
    servers: Servers,
    connections: dict[str, Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # `shardalchemy.engine.fanout` is also the name of the function.
    monkeypatch.setattr(sys.modules[fanout.__module__], "CANCEL_TIMEOUT", 0.5)
    server = servers.local.servers["s4"]

    def step(shard: str, connection: Connection) -> None:
        if shard == "s1":
            connection.execute(text("SELECT pg_sleep(0.3)"))
            server.pause()
            raise ValueError("on purpose")
        connection.execute(text("SELECT pg_sleep(30)"))

    try:
        with pytest.raises(ValueError, match="on purpose"):
            fanout(step, connections)
    finally:
        server.resume()
    assert connections["s4"].invalidated
    assert not connections["s2"].invalidated


async def test_the_same_in_an_event_loop(servers: Servers) -> None:
    engines = ShardEngines(servers.local.urls)
    opened = {name: await engines.asynchronous(name).connect() for name in servers}
    sync = {name: connection.sync_connection for name, connection in opened.items()}
    start = time.monotonic()
    await greenlet_spawn(fanout, sleep(0.4), sync)
    assert time.monotonic() - start < 1.0

    def step(shard: str, connection: Connection) -> None:
        seconds = "1/0" if shard == "s3" else "30"
        connection.execute(text(f"SELECT pg_sleep({seconds})"))

    with pytest.raises(exc.DataError):
        await greenlet_spawn(fanout, step, sync)
    for connection in opened.values():
        await connection.rollback()
        assert await connection.scalar(text("SELECT 1")) == 1

    task = asyncio.ensure_future(greenlet_spawn(fanout, sleep(30), sync))
    await asyncio.sleep(0.2)
    task.cancel()
    start = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - start < 5
    for connection in opened.values():
        await connection.rollback()
        assert await connection.scalar(text("SELECT 1")) == 1
        await connection.close()
    await engines.dispose_async()


def test_a_simple_query_returns_its_tags_and_sqlalchemy_s_errors(
    connections: dict[str, Connection],
) -> None:
    connection = connections["s1"]
    connection.execute(text("SELECT 1"))
    tags = simple_query(connection, "CREATE TEMP TABLE x (i int); ROLLBACK")
    assert tags == ["CREATE TABLE", "ROLLBACK"]
    with pytest.raises(exc.ProgrammingError) as caught:
        simple_query(connection, "SELECT nonsense")
    assert isinstance(caught.value.orig, psycopg.errors.UndefinedColumn)


def test_all_connections_together_are_bounded(servers: Servers) -> None:
    engines = ShardEngines(servers.local.urls, max_connections=3, pool_timeout=0.5)
    first = [engines.sync(name).connect() for name in ("s1", "s2", "s3")]
    with pytest.raises(exc.TimeoutError, match="all 3 connections"):
        engines.sync("s4").connect()
    # An idle connection of another shard makes room.
    first[0].close()
    fourth = engines.sync("s4").connect()
    assert fourth.scalar(text("SELECT 1")) == 1
    for connection in (*first[1:], fourth):
        connection.close()
    with engines.sync("s1").connect() as again:
        assert again.scalar(text("SELECT 1")) == 1
    engines.dispose()


def test_engines_are_made_when_first_used(servers: Servers) -> None:
    engines = ShardEngines({"s1": "postgresql://nobody@nowhere.invalid/x"})
    assert engines.url("s1").drivername == "postgresql+psycopg"
    engine = create_engine(servers.local.urls["s1"])
    given = ShardEngines({"s1": engine})
    assert given.sync("s1") is engine
    given.dispose()
    with engine.connect() as connection:  # the caller's own, so it was left alone
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


def test_another_driver_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="psycopg 3"):
        Cluster({"s1": "postgresql+psycopg2://u@h/d"})


@pytest.mark.parametrize("name", ["", "a b", "1a", "s-1"])
def test_a_shard_s_name_is_an_identifier(name: str) -> None:
    with pytest.raises(ConfigurationError, match="shard's name"):
        Cluster({name: "postgresql://u@h/d"})


def test_a_password_is_not_shown(servers: Servers) -> None:
    with servers.local.cluster() as cluster:
        assert repr(cluster) == "Cluster(s1, s2, s3, s4)"
