"""An error on one of several shards: which it is, and what can go on after it."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardalchemy import Cluster, sharded_by
from shardalchemy.errors import TransactionAborted
from tests.conftest import Servers


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    v: Mapped[int]
    token: Mapped[uuid.UUID | None] = mapped_column(onupdate=uuid.uuid4)


ROWS = [{"id": n, "v": 0} for n in range(40)]


@pytest.fixture
def stored(cluster: Cluster) -> Cluster:
    cluster.create_all(Base.metadata)
    with cluster.sessionmaker().begin() as session:
        session.execute(insert(Item), ROWS)
    return cluster


def values(cluster: Cluster) -> set[int]:
    with cluster.sessionmaker()() as session:
        return set(session.scalars(select(Item.v)))


def test_the_error_names_its_shard_and_keeps_its_type(stored: Cluster) -> None:
    new = [{"id": n, "v": 1} for n in range(100, 140)]
    shard = stored.shard_for(Item, 7)
    with stored.sessionmaker()() as session:
        with pytest.raises(sa_exc.IntegrityError, match=f"shard {shard}") as raised:
            session.execute(insert(Item), [*new, {"id": 7, "v": 1}])
        assert raised.value.orig.sqlstate == "23505"  # type: ignore[union-attr]
        with pytest.raises((TransactionAborted, sa_exc.DBAPIError)):
            session.commit()
        session.rollback()
        assert len(session.scalars(select(Item)).all()) == 40
    assert values(stored) == {0}


def test_a_failed_read_of_several_shards_names_one(stored: Cluster) -> None:
    with stored.sessionmaker()() as session:
        broken = select(Item.id).where(text("1 / (id - 7) > 0"))
        shard = stored.shard_for(Item, 7)
        with pytest.raises(sa_exc.DataError, match=f"on shard {shard}"):
            session.execute(broken)


@pytest.mark.parametrize("first", [False, True])
def test_a_savepoint_undoes_a_failed_write_on_every_shard(
    stored: Cluster, first: bool
) -> None:
    """*first* says that the connections are opened inside the savepoint."""
    with stored.sessionmaker()() as session:
        if not first:
            session.execute(update(Item).values(v=1))
        nested = session.begin_nested()
        session.execute(update(Item).values(v=2))
        rows = [{"id": n, "v": 5} for n in range(7, 60)]
        with pytest.raises(sa_exc.IntegrityError):
            session.execute(insert(Item), rows)
        nested.rollback()
        assert set(session.scalars(select(Item.v))) == {0 if first else 1}
        session.execute(delete(Item).where(Item.id < 4))
        session.commit()
    assert values(stored) == {0 if first else 1}
    with stored.sessionmaker()() as session:
        assert sorted(session.scalars(select(Item.id))) == list(range(4, 40))


def test_a_savepoint_that_is_rolled_back_by_hand(stored: Cluster) -> None:
    with stored.sessionmaker()() as session:
        objects = session.scalars(select(Item)).all()
        nested = session.begin_nested()
        session.execute(update(Item).values(v=Item.v + 2))
        assert {item.v for item in objects} == {2}
        nested.rollback()
        assert {item.v for item in objects} == {0}
        session.execute(update(Item).values(v=Item.v + 3))
        session.commit()
    assert values(stored) == {3}


def test_a_failed_write_leaves_nothing_prepared(
    stored: Cluster, servers: Servers
) -> None:
    def fail() -> None:
        with stored.sessionmaker().begin() as session:
            session.execute(update(Item).values(v=9))
            session.execute(insert(Item), ROWS)

    with pytest.raises(sa_exc.IntegrityError):
        fail()
    assert servers.prepared() == {}
    assert values(stored) == {0}


def test_what_python_gives_an_update_it_gives_to_all_rows(stored: Cluster) -> None:
    with stored.sessionmaker()() as session:
        items = session.scalars(select(Item)).all()
        session.execute(update(Item).values(v=1))
        (token,) = {item.token for item in items}
        assert token is not None
        session.expire_all()
        assert {item.token for item in items} == {token}
        rows = [{"id": item.id, "v": 2} for item in items]
        session.execute(update(Item), rows)
        assert token not in set(session.scalars(select(Item.token)))


async def test_an_async_session_writes_on_several_shards(stored: Cluster) -> None:
    AsyncSession = stored.async_sessionmaker(expire_on_commit=False)
    new = [{"id": n, "v": n} for n in range(100, 140)]
    async with AsyncSession() as session:
        statement = insert(Item).returning(Item, sort_by_parameter_order=True)
        items = (await session.scalars(statement, new)).all()
        assert [item.id for item in items] == list(range(100, 140))
        changed: Any = await session.execute(update(Item).values(v=Item.v + 1))
        assert changed.rowcount == 80
        assert [item.v for item in items] == list(range(101, 141))
        await session.execute(
            update(Item), [{"id": n, "v": 3} for n in range(100, 140)]
        )
        with pytest.raises(sa_exc.IntegrityError, match="on shard"):
            async with session.begin_nested():
                await session.execute(insert(Item), ROWS)
        await session.execute(delete(Item).where(Item.id < 40))
        await session.commit()
    async with AsyncSession() as session:
        assert set(await session.scalars(select(Item.v))) == {3}
    await stored.aclose()
