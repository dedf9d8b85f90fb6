"""The blog under AsyncSession and under the cluster's async sessions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from blog_data import fill
from blog_listeners import listen
from blog_models import AuditEntry, Author, Comment, Person, Post, Revision, Tag
from blog_recorder import listening, settled
from blog_stage import (
    AsyncMaker,
    Installation,
    async_sessions,
)
from sqlalchemy import delete, event, func, insert, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_object_session
from sqlalchemy.orm import selectinload, sessionmaker


async def names(session: Any) -> list[str]:
    return list(await session.scalars(select(Tag.name).order_by(Tag.name)))


async def test_objects_are_added_read_and_deleted(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        await session.run_sync(fill)
        await session.commit()
        post = (await session.scalars(select(Post).where(Post.slug == "joins"))).one()
        assert await session.get(Post, post.id) is post
        assert await session.get_one(Post, post.id) is post
        await session.refresh(post, ["comments", "tags", "attachments"])
        assert [c.writer for c in post.comments] == ["Bea", "Cal", "Dan"]
        await session.delete(post)
        await session.commit()
        assert await session.scalar(select(func.count(Comment.id))) == 0
        assert async_object_session(post) is None


async def test_eager_loading_and_relationship_order(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        await session.run_sync(fill)
        session.expunge_all()
        authors = await session.scalars(
            select(Author).options(selectinload(Author.posts)).order_by(Author.id)
        )
        assert [[p.slug for p in a.posts] for a in authors] == [
            ["joins", "windows"],
            ["compilers"],
        ]


async def test_lazy_loading_outside_of_a_greenlet_is_refused(
    make_async_session: Any,
) -> None:
    async with make_async_session()() as session:
        await session.run_sync(fill)
        session.expunge_all()
        post = (await session.scalars(select(Post).limit(1))).one()
        with pytest.raises(sa_exc.SQLAlchemyError, match="greenlet_spawn"):
            _ = post.comments
        assert await session.run_sync(lambda _: len(post.comments)) == 3


async def test_streams_come_in_partitions(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        await session.execute(insert(Tag), [{"name": f"t{n:02}"} for n in range(25)])
        result = await session.stream_scalars(
            select(Tag.name).order_by(Tag.name).execution_options(yield_per=10)
        )
        assert [len(part) async for part in result.partitions()] == [10, 10, 5]
        rows = await session.stream(select(Tag.id, Tag.name))
        assert len([row.name async for row in rows]) == 25


async def test_savepoints_failures_and_rollbacks(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        session.add(Tag(name="sql"))
        with pytest.raises(sa_exc.IntegrityError):
            async with session.begin_nested():
                session.add(Tag(name="sql"))
        async with session.begin_nested():
            session.add(Tag(name="python"))
        await session.commit()
        session.add(Tag(name="sql"))
        with pytest.raises(sa_exc.IntegrityError):
            await session.flush()
        await session.rollback()
        assert await names(session) == ["python", "sql"]


async def test_begin_blocks_commit_or_roll_back(make_async_session: Any) -> None:
    make = make_async_session()
    async with make.begin() as session:
        session.add(Tag(name="kept"))
    with pytest.raises(ZeroDivisionError):
        async with make.begin() as session:
            session.add(Tag(name=str(1 / 0)))
    async with make() as session, session.begin():
        assert await names(session) == ["kept"]


async def test_bulk_statements_and_merge(make_async_session: Any) -> None:
    async with make_async_session(expire_on_commit=False)() as session:
        ids = (
            await session.scalars(
                insert(Tag).returning(Tag.id), [{"name": "a"}, {"name": "b"}]
            )
        ).all()
        await session.execute(update(Tag), [{"id": ids[0], "name": "A"}])
        await session.execute(delete(Tag).where(Tag.id == ids[1]))
        merged = await session.merge(Tag(id=ids[0], name="merged"))
        await session.commit()
        assert merged.name == "merged"
        assert await names(session) == ["merged"]


async def test_the_connection_is_the_sessions(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        connection = await session.connection()
        assert isinstance(connection, AsyncConnection)
        await connection.execute(insert(Tag), [{"name": "sql"}])
        assert await names(session) == ["sql"]
        assert connection.sync_engine is session.get_bind()
        driver = (await connection.get_raw_connection()).driver_connection
        assert type(driver).__name__ == "AsyncConnection"


async def test_the_bind_of_an_async_session_is_its_engine(
    make_async_session: Any,
) -> None:
    async with make_async_session()() as session:
        await session.execute(text("SELECT 1"))
        assert session.bind is not None
        assert session.bind.sync_engine is session.get_bind()


async def test_tasks_have_sessions_of_their_own(make_async_session: Any) -> None:
    make = make_async_session()

    async def add(number: int) -> None:
        async with make.begin() as session:
            session.add(Tag(name=f"t{number}"))

    await asyncio.gather(*(add(number) for number in range(8)))
    async with make() as session:
        assert len(await names(session)) == 8


async def test_write_only_collections_are_awaited(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        await session.run_sync(fill)
        post = (await session.scalars(select(Post).limit(1))).one()
        post.revisions.add(Revision(body="1"))
        await session.flush()
        assert len((await session.scalars(post.revisions.select())).all()) == 1


async def test_events_are_heard_on_the_sync_session_class(
    make_async_session: Any, blog: Installation
) -> None:
    """The way SQLAlchemy's manual gives: a sync sessionmaker as the class within."""
    inner = sessionmaker() if blog.name == "plain" else sessionmaker(class_=blog.base)
    listen(inner)
    make = make_async_session(sync_session_class=inner)
    async with make() as session:
        session.add(
            Author(name="A", email="a@x.org", posts=[Post(slug="a", title="A")])
        )
        await session.commit()
        assert (await session.scalars(select(AuditEntry.subject))).all() == ["a"]
        driver = await (await session.connection()).get_raw_connection()
        assert type(driver.driver_connection).__name__ == "AsyncConnection"


async def test_events_are_heard_on_one_session(make_async_session: Any) -> None:
    async with make_async_session()() as session:
        assert isinstance(session, AsyncSession)
        heard: list[str] = []
        for name in ("before_flush", "after_commit", "do_orm_execute"):
            event.listen(
                session.sync_session, name, lambda *_, name=name: heard.append(name)
            )
        session.add(Person(name="A", email="a@x.org"))
        await session.commit()
        await names(session)
        assert heard == ["before_flush", "after_commit", "do_orm_execute"]


async def _script(make: AsyncMaker) -> list[Any]:
    observed: list[Any] = []
    async with make()() as session:
        await session.run_sync(fill)
        await session.commit()
        post = (await session.scalars(select(Post).where(Post.slug == "joins"))).one()
        await session.refresh(post, ["comments"])
        observed.append([c.writer for c in post.comments])
        post.stars = Post.stars + 1
        await session.commit()
        observed.append(await session.scalar(select(Post.stars).where(Post.stars > 12)))
        session.add(Tag(name="sql"))
        try:
            await session.commit()
        except sa_exc.IntegrityError as error:
            observed.append(str(error))
        await session.rollback()
        async with session.begin_nested():
            await session.execute(insert(Tag), [{"name": "x"}, {"name": "y"}])
        stream = await session.stream_scalars(select(Tag.name).order_by(Tag.name))
        observed.append([name async for name in stream])
        await session.execute(delete(Tag).where(Tag.name == "x"))
        await session.commit()
    return observed


@pytest.mark.parametrize("fired", [False, True], ids=["statements", "events"])
@pytest.mark.parametrize("name", ["sharded", "engine"])
async def test_the_same_happens_in_the_same_order(
    request: pytest.FixtureRequest,
    plain_blog: Installation,
    settled_order: None,
    name: str,
    fired: bool,
) -> None:
    async def record(installation: Installation) -> list[Any]:
        installation.empty()
        happened: list[Any] = []
        async with async_sessions(installation) as make:
            async with make()() as session:
                await session.execute(text("SELECT 1"))
            with listening(happened, fired=fired):
                happened.append(await _script(make))
        return list(settled(happened))

    expected = await record(plain_blog)
    assert await record(request.getfixturevalue(f"{name}_blog")) == expected
