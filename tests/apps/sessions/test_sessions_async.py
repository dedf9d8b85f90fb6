"""The same under asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sessions_models import Account, Country, Customer, Note, Order, Reading, Savings
from sessions_servers import Servers, keys_on_each_shard
from sqlalchemy import event, func, insert, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    async_object_session,
    async_sessionmaker,
)
from sqlalchemy.orm import selectinload

from shardalchemy import (
    AsyncShardedSession,
    Cluster,
    ConfigurationError,
    ShardedSession,
    ShardKeyError,
    UnsupportedQueryError,
)

Maker = async_sessionmaker[AsyncShardedSession]


@pytest.fixture
def keys(cluster: Cluster) -> list[int]:
    return keys_on_each_shard(cluster, Customer, 2)


@pytest.fixture
async def stored(AsyncSession: Maker, keys: list[int]) -> list[int]:
    async with AsyncSession.begin() as session:
        for key in keys:
            orders = [Order(number=n) for n in (2, 1)]
            session.add(Customer(id=key, name=f"c{key}", orders=orders))
    return keys


async def test_rows_are_committed_on_their_shards(
    cluster: Cluster, servers: Servers, stored: list[int]
) -> None:
    for shard, ids in servers.rows("SELECT id FROM customer").items():
        assert {cluster.shard_for(Customer, ident) for ident in ids} == {shard}
    assert servers.count("orders") == 16
    assert servers.prepared() == 0


async def test_objects_are_found_changed_and_deleted(
    AsyncSession: Maker, stored: list[int], servers: Servers
) -> None:
    async with AsyncSession() as session:
        customer = await session.get_one(Customer, stored[0])
        assert await session.get(Customer, stored[0]) is customer
        assert async_object_session(customer) is session
        every = (await session.scalars(select(Customer))).all()
        assert any(c is customer for c in every)
        assert len(every) == 8
        orders = await customer.awaitable_attrs.orders
        assert [o.number for o in orders] == [1, 2]
        assert (await orders[0].awaitable_attrs.customer) is customer
        customer.name = "changed"
        await session.commit()
        await session.refresh(customer)
        assert (customer.name, customer.version) == ("changed", 2)
        for one in every[:4]:
            await session.delete(one)
        await session.commit()
        merged = await session.merge(Customer(id=stored[0], name="merged"))
        assert merged.id == stored[0]
        await session.rollback()
    assert servers.count("customer") == 4
    assert servers.count("orders") == 8


async def test_eager_loading_over_all_shards(
    AsyncSession: Maker, stored: list[int]
) -> None:
    async with AsyncSession() as session:
        statement = select(Customer).options(selectinload(Customer.orders))
        customers = (await session.scalars(statement)).all()
        assert [[o.number for o in c.orders] for c in customers] == [[1, 2]] * 8


async def test_iterating_a_unique_result_loses_no_row(AsyncSession: Maker) -> None:
    async with AsyncSession.begin() as session:
        session.add_all(Customer(id=n, name="A") for n in range(500))
    async with AsyncSession() as session:
        result = (await session.scalars(select(Customer))).unique()
        assert sorted(c.id for c in result) == list(range(500))


async def test_streams_over_all_shards(AsyncSession: Maker) -> None:
    async with AsyncSession.begin() as session:
        session.add_all(Reading(sensor=n, number=1, value=n) for n in range(100))
    async with AsyncSession() as session:
        rows = await session.stream_scalars(select(Reading.value))
        assert sorted([value async for value in rows]) == list(range(100))
        parts = await session.stream(
            select(Reading), execution_options={"yield_per": 10}
        )
        sizes = [len(part) async for part in parts.partitions()]
        assert sum(sizes) == 100
        assert max(sizes) <= 10
        one = await session.stream_scalars(
            select(Reading).where(Reading.sensor == 7).order_by(Reading.number)
        )
        assert [r.sensor async for r in one] == [7]


async def test_savepoints_and_failures_span_shards(
    AsyncSession: Maker, keys: list[int], servers: Servers
) -> None:
    async with AsyncSession() as session:
        session.add(Customer(id=keys[0], name="A"))
        await session.flush()
        nested = await session.begin_nested()
        session.add_all(Customer(id=key, name="lost") for key in keys[1:])
        await session.flush()
        await nested.rollback()
        with pytest.raises(sa_exc.IntegrityError):
            async with session.begin_nested():
                session.add_all(Customer(id=k, name="B") for k in (keys[5], keys[0]))
        async with session.begin_nested():
            session.add(Customer(id=keys[7], name="kept"))
        await session.commit()
        session.add_all(Customer(id=key, name="C") for key in keys)
        with pytest.raises(sa_exc.IntegrityError):
            await session.commit()
        await session.rollback()
    held = servers.rows("SELECT name FROM customer")
    assert sorted(n for names in held.values() for n in names) == ["A", "kept"]
    assert servers.prepared() == 0


async def test_begin_blocks_and_rollbacks(
    AsyncSession: Maker, keys: list[int], servers: Servers
) -> None:
    async with AsyncSession() as session, session.begin():
        session.add_all(Customer(id=key, name="A") for key in keys)

    async def fail() -> None:
        async with AsyncSession.begin() as session:
            session.add_all(Reading(sensor=key, number=1, value=1) for key in keys)
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert servers.count("customer") == 8
    assert servers.count("reading") == 0


async def test_statements_over_all_shards_are_answered(
    AsyncSession: Maker, stored: list[int]
) -> None:
    async with AsyncSession() as session:
        ordered = select(Customer).order_by(Customer.id.desc())
        found = (await session.scalars(ordered.limit(5))).all()
        assert [c.id for c in found] == sorted(stored, reverse=True)[:5]
        total = select(func.count(), func.sum(Order.number))
        assert (await session.execute(total)).one() == (16, 24)
        most = select(func.max(Customer.id)).scalar_subquery()
        last = select(Customer).where(Customer.id == most)
        assert (await session.scalars(last)).one().id == max(stored)
        plain = await session.scalars(text("SELECT id FROM customer"))
        assert sorted(plain) == sorted(stored)


async def test_refusals_are_the_same(AsyncSession: Maker, stored: list[int]) -> None:
    async with AsyncSession() as session:
        with pytest.raises(UnsupportedQueryError, match="FOR UPDATE would lock"):
            await session.execute(select(Customer).limit(1).with_for_update())
        with pytest.raises(UnsupportedQueryError):
            await session.execute(text("SELECT name FROM customer ORDER BY id"))
        session.add(Customer(name="no key"))
        with pytest.raises(ShardKeyError):
            await session.flush()
        await session.rollback()
        customer = await session.get_one(Customer, stored[0])
        customer.id = "x"
        with pytest.raises(ShardKeyError):
            await session.commit()
        await session.rollback()
        assert await session.scalar(
            select(Customer.name).where(Customer.id == stored[0]).limit(1)
        )


async def test_run_sync_gives_the_sync_session(
    AsyncSession: Maker, stored: list[int]
) -> None:
    def count(session: Any) -> int:
        assert isinstance(session, ShardedSession)
        return sum(len(c.orders) for c in session.scalars(select(Customer)).all())

    async with AsyncSession() as session:
        assert await session.run_sync(count) == 16


async def test_the_connection_of_each_shard(
    AsyncSession: Maker, cluster: Cluster
) -> None:
    async with AsyncSession() as session:
        for shard in cluster.topology.shards:
            connection = await session.connection(bind_arguments={"shard": shard})
            assert isinstance(connection, AsyncConnection)
            result = await connection.execute(
                text("SELECT shard FROM shardalchemy.catalog")
            )
            assert result.scalar() == shard


async def test_events_fire_once_and_their_connection_is_usable(
    AsyncSession: Maker, keys: list[int], cluster: Cluster
) -> None:
    shards: dict[int, str] = {}
    fired: list[str] = []

    def before_insert(_: Any, connection: Any, target: Customer) -> None:
        found = connection.execute(text("SELECT shard FROM shardalchemy.catalog"))
        shards[target.id] = found.scalar()

    event.listen(Customer, "before_insert", before_insert)
    try:
        async with AsyncSession() as session:
            for name in ("before_flush", "after_flush", "after_commit"):
                event.listen(
                    session.sync_session, name, lambda *_, name=name: fired.append(name)
                )
            session.add_all(Customer(id=key, name="A") for key in keys)
            await session.commit()
    finally:
        event.remove(Customer, "before_insert", before_insert)
    assert fired == ["before_flush", "after_flush", "after_commit"]
    assert shards == {key: cluster.shard_for(Customer, key) for key in keys}


async def test_reference_inheritance_and_write_only(
    AsyncSession: Maker, stored: list[int], servers: Servers
) -> None:
    async with AsyncSession() as session:
        session.add(Country(code="AT", name="Austria"))
        session.add(Savings(owner="s", rate=3))
        customer = await session.get_one(Customer, stored[2])
        customer.country_code = "AT"
        customer.notes.add(Note(body="x"))
        await session.commit()
        assert (await session.get_one(Savings, "s")).rate == 3
        notes = await session.scalars(customer.notes.select())
        assert [n.body for n in notes] == ["x"]
        assert (await customer.awaitable_attrs.country).name == "Austria"
        await session.execute(
            update(Account).where(Account.owner == "s").values(balance=9)
        )
        await session.execute(
            insert(Reading), [{"sensor": 1, "number": n, "value": n} for n in (1, 2)]
        )
        await session.commit()
    assert servers.count("country") == 4
    assert servers.count("reading") == 2
    assert [*servers.rows("SELECT balance FROM account").values()] == [[9]]


async def test_tasks_with_sessions_of_their_own(
    AsyncSession: Maker, servers: Servers
) -> None:
    async def work(number: int) -> None:
        for turn in range(3):
            async with AsyncSession.begin() as session:
                base = number * 1000 + turn * 10
                session.add_all(Customer(id=base + n, name="t") for n in range(5))
            async with AsyncSession() as session:
                mine = await session.scalars(
                    select(Customer.id).where(
                        Customer.id.between(number * 1000, number * 1000 + 999)
                    )
                )
                assert len(mine.all()) == (turn + 1) * 5

    await asyncio.gather(*(work(number) for number in range(1, 6)))
    assert servers.count("customer") == 75
    assert servers.prepared() == 0


async def test_a_cancelled_task_leaves_nothing_behind(
    AsyncSession: Maker, keys: list[int], servers: Servers
) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with AsyncSession() as session:
            session.add_all(Customer(id=key, name="A") for key in keys)
            await session.flush()
            started.set()
            slow = text("SELECT pg_sleep(30)").execution_options(shard_key=keys[0])
            await session.execute(slow)

    task = asyncio.create_task(work())
    await started.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with AsyncSession() as session:
        assert (await session.scalars(select(Customer))).all() == []
        session.add_all(Customer(id=key, name="A") for key in keys)
        await session.commit()
    assert servers.count("customer") == 8
    assert servers.prepared() == 0


async def test_options_of_the_async_sessionmaker(cluster: Cluster) -> None:
    class Office(AsyncShardedSession):
        pass

    made = cluster.async_sessionmaker(class_=Office, info={"a": 1}, autoflush=False)
    async with made() as session:
        assert isinstance(session, Office)
        assert session.info == {"a": 1}
        assert session.autoflush is False
    with pytest.raises(ConfigurationError):
        cluster.async_sessionmaker(class_=ShardedSession)
