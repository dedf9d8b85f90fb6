"""``session.lock_row``: turns in Redis, then the row's own lock."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import BigInteger, exc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardalchemy import Cluster, LockTimeout, ShardKeyError, sharded_by
from shardalchemy.locks import turns
from tests.conftest import Servers


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    stock: Mapped[int]


@pytest.fixture
def shop(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    with cluster.sessionmaker().begin() as session:
        session.add_all(Product(id=n, stock=1000) for n in range(1, 9))
    return cluster


@pytest.fixture
def client(servers: Servers) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(servers.local.redis_url) as opened:
        opened.delete(*opened.scan_iter("shardalchemy:*"), "none")
        yield opened


def held(client: redis.Redis) -> list[bytes]:
    return list(client.scan_iter("shardalchemy:*:row:*"))


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_the_turn_is_held_until_the_transaction_ends(
    shop: Cluster, client: redis.Redis, end: str
) -> None:
    session = shop.sessionmaker()()
    product = session.lock_row(Product, 1)
    assert product.stock == 1000
    assert len(held(client)) == 1
    # A second time in the same transaction it is there already.
    assert session.lock_row(Product, 1) is product
    getattr(session, end)()
    assert held(client) == []
    session.close()


def test_no_two_sessions_have_the_row_at_once(shop: Cluster) -> None:
    Session = shop.sessionmaker()
    inside: list[int] = []
    most: list[int] = []

    def buy() -> None:
        for _ in range(10):
            with Session.begin() as session:
                product = session.lock_row(Product, 3, timeout=60)
                inside.append(1)
                most.append(len(inside))
                product.stock -= 1
                session.flush()
                inside.pop()

    threads = [threading.Thread(target=buy) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Session() as session:
        assert session.get_one(Product, 3).stock == 920
    assert max(most) == 1


def test_the_turn_that_does_not_come_is_a_timeout(shop: Cluster) -> None:
    Session = shop.sessionmaker()
    with Session() as first, Session() as second:
        first.lock_row(Product, 1)
        start = time.monotonic()
        with pytest.raises(LockTimeout, match="turn of products"):
            second.lock_row(Product, 1, timeout=0.3)
        assert 0.2 < time.monotonic() - start < 5
        # It waited without a transaction, so nothing of it has failed.
        assert second.get_one(Product, 2).stock == 1000


def test_a_row_that_stays_locked_in_postgresql_is_a_timeout(
    shop: Cluster, client: redis.Redis
) -> None:
    Session = shop.sessionmaker()
    with Session() as first, Session() as second:
        first.get(Product, 1, with_for_update=True)
        with pytest.raises(LockTimeout, match="stayed locked"):
            second.lock_row(Product, 1, timeout=0.3)
        second.rollback()
        assert held(client) == []


def test_lock_timeout_is_left_as_it_was(shop: Cluster) -> None:
    with shop.sessionmaker()() as session:
        shard = {"bind_arguments": {"shard": shop.shard_for(Product, 1)}}
        connection = session.connection(**shard)
        connection.exec_driver_sql("SET LOCAL lock_timeout = '7s'")
        session.lock_row(Product, 1)
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "7s"


def test_a_missing_row_and_a_missing_key(shop: Cluster, client: redis.Redis) -> None:
    with shop.sessionmaker()() as session:
        with pytest.raises(exc.NoResultFound):
            session.lock_row(Product, 99)
        with pytest.raises(ShardKeyError):
            session.lock_row(Product, "one")
    assert held(client) == []


def test_a_turn_is_renewed_for_as_long_as_its_holder_lives(
    shop: Cluster, servers: Servers, client: redis.Redis
) -> None:
    mine = turns.Turns(servers.local.redis_url, lease=0.5)
    turn = mine.acquire("shardalchemy:test:row:x", time.monotonic() + 1)
    assert turn is not None
    time.sleep(1.2)
    assert mine.acquire("shardalchemy:test:row:x", time.monotonic() + 0.1) is None
    turn.release()
    assert held(client) == []
    mine.close()


def test_a_turn_that_was_lost_is_not_taken_from_the_next(
    servers: Servers, client: redis.Redis
) -> None:
    mine = turns.Turns(servers.local.redis_url, lease=60)
    turn = mine.acquire("shardalchemy:test:row:y", time.monotonic() + 1)
    assert turn is not None
    client.set("shardalchemy:test:row:y", "another's")
    turn.release()
    assert client.get("shardalchemy:test:row:y") == b"another's"
    mine.close()


def test_the_turn_of_a_killed_holder_passes_on(
    servers: Servers, client: redis.Redis
) -> None:
    program = f"""
        import time
        from shardalchemy.locks.turns import Turns
        turns = Turns({servers.local.redis_url!r}, lease=1.0)
        assert turns.acquire("shardalchemy:test:row:z", time.monotonic() + 5)
        print("held", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        time.sleep(1.5)  # longer than its lease, which it renews
        assert held(client)
        holder.kill()
    mine = turns.Turns(servers.local.redis_url)
    turn = mine.acquire("shardalchemy:test:row:z", time.monotonic() + 5)
    assert turn is not None
    turn.release()
    mine.close()


def test_without_redis_the_row_is_locked_by_postgresql(
    shop: Cluster, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    with Cluster(servers.local.urls, redis="redis://127.0.0.1:1/0") as lonely:
        for _ in range(2):
            with lonely.sessionmaker().begin() as session:
                session.lock_row(Product, 5, timeout=10).stock -= 1
    away = [r for r in caplog.records if "Redis is away" in r.getMessage()]
    assert len(away) == 1
    with Cluster(servers.local.urls) as without, without.sessionmaker()() as session:
        assert session.lock_row(Product, 5).stock == 998


async def test_the_same_in_an_event_loop(shop: Cluster, client: redis.Redis) -> None:
    Session = shop.async_sessionmaker()

    async def buy() -> None:
        async with Session.begin() as session:
            product = await session.lock_row(Product, 4, timeout=60)
            product.stock -= 1

    await asyncio.gather(*(buy() for _ in range(30)))
    async with Session() as session:
        assert (await session.get_one(Product, 4)).stock == 970
        await session.lock_row(Product, 4)
        async with Session() as other:
            with pytest.raises(LockTimeout):
                await other.lock_row(Product, 4, timeout=0.1)
            waiting = asyncio.ensure_future(other.lock_row(Product, 4, timeout=30))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    await shop.aclose()
    assert held(client) == []
