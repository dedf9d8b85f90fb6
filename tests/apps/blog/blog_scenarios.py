"""Short scripts of an application's work; each yields what it observes.

A script is run on plain SQLAlchemy and on a cluster, and all that either sends, fires,
warns of or raises is compared. So a script uses no time and no randomness of its own.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from blog_data import fill
from blog_models import (
    Attachment,
    AuditEntry,
    Author,
    Comment,
    Moderator,
    Person,
    Post,
    Revision,
    Tag,
    receipt_numbers,
)
from sqlalchemy import delete, func, insert, lambda_stmt, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import (
    aliased,
    joinedload,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_polymorphic,
)

Script = Callable[[Any], Iterator[Any]]


def filling(Session: Any) -> Iterator[Any]:
    with Session.begin() as session:
        fill(session)
        yield sorted(type(o).__name__ for o in session)


def reading(Session: Any) -> Iterator[Any]:
    with Session.begin() as session:
        fill(session)
    with Session() as session:
        for load in (joinedload, selectinload, subqueryload):
            posts = session.scalars(
                select(Post).options(load(Post.comments)).order_by(Post.id)
            ).unique()
            yield [(p.slug, len(p.comments), p.author.name) for p in posts]
            session.expire_all()
        yield session.query(Post).order_by(Post.slug).limit(1).offset(1).one().title
        yield session.query(Comment).count()
        ranked = func.row_number().over(order_by=Post.stars)
        yield [tuple(r) for r in session.execute(select(Post.slug, ranked))]
        yield session.scalars(text("SELECT slug FROM post ORDER BY 1")).all()
        statement = lambda_stmt(lambda: select(Tag.name).order_by(Tag.name))
        yield session.scalars(statement).all()
        streamed = session.scalars(
            select(Comment.writer).order_by(Comment.id),
            execution_options={"yield_per": 2},
        )
        yield [list(part) for part in streamed.partitions()]
        yield session.get(Post, 1).slug, session.get(Post, 99)
        yield session.scalars(session.get(Author, 1).all_posts.statement).all() != []


def inheriting(Session: Any) -> Iterator[Any]:
    with Session.begin() as session:
        fill(session)
        session.flush()
        session.expunge_all()
        people = session.scalars(select(Person).order_by(Person.id)).all()
        yield [(type(p).__name__, getattr(p, "since", None)) for p in people]
        session.expunge_all()
        entity = with_polymorphic(Person, "*")
        yield [p.name for p in session.scalars(select(entity).order_by(entity.id))]
        session.expunge_all()
        options = selectin_polymorphic(Person, [Author, Moderator])
        yield len(session.scalars(select(Person).options(options)).all())
        yield [type(a).__name__ for a in session.scalars(select(Attachment))]


def changing(Session: Any) -> Iterator[Any]:
    with Session() as session:
        fill(session)
        session.commit()
        joins = session.scalars(select(Post).where(Post.slug == "joins")).one()
        joins.stars = Post.stars + 1
        joins.tags.pop()
        joins.comments.append(Comment(writer="Eve", body="Late."))
        session.commit()
        yield joins.stars, joins.version, [t.name for t in joins.tags]
        session.refresh(joins, ["title"])
        windows = joins.author.posts[1]
        yield windows.tags, windows.comments, windows.attachments
        joins.author.posts.remove(windows)
        session.flush()
        session.delete(
            session.scalars(select(Person).where(Person.name == "Max")).one()
        )
        session.commit()
        yield session.scalars(select(Person.name).order_by(Person.name)).all()


def bulk(Session: Any) -> Iterator[Any]:
    with Session.begin() as session:
        ids = session.scalars(
            insert(Tag).returning(Tag.id), [{"name": f"t{n}"} for n in range(5)]
        ).all()
        yield ids
        session.execute(update(Tag), [{"id": i, "name": f"u{i}"} for i in ids])
        yield session.execute(
            update(Tag).where(Tag.id > ids[2]).values(name=Tag.name + "!")
        ).rowcount
        yield session.scalars(delete(Tag).where(Tag.id == 1).returning(Tag.name)).all()
        session.bulk_insert_mappings(Tag, [{"name": "m"}], return_defaults=True)
        session.bulk_save_objects([Tag(name="s"), AuditEntry(action="a", subject="b")])
        session.bulk_update_mappings(Tag, [{"id": 2, "name": "two"}])
        upsert = pg_insert(Tag).values(name="s").on_conflict_do_nothing()
        session.execute(upsert)
        session.execute(
            insert(AuditEntry).from_select(
                ["action", "subject"], select(Tag.name, Tag.name)
            )
        )
        session.execute(Tag.__table__.insert(), [{"name": "x"}, {"name": "y"}])
        yield (
            session.scalar(receipt_numbers),
            session.scalar(select(func.count(AuditEntry.id))),
        )
        yield session.query(Tag).filter(Tag.name == "x").update({"name": "xx"})
        yield session.query(Tag).filter(Tag.name == "xx").delete()


def nesting(Session: Any) -> Iterator[Any]:
    with Session() as session:
        session.add(Tag(name="a"))
        for name in ("b", "a", "c"):
            try:
                with session.begin_nested():
                    session.add(Tag(name=name))
            except sa_exc.IntegrityError as error:
                yield error.orig.sqlstate
        session.commit()
        yield session.scalars(select(Tag.name).order_by(Tag.name)).all()
        nested = session.begin_nested()
        session.execute(delete(Tag))
        nested.rollback()
        yield session.scalar(select(func.count(Tag.id)))


def failing(Session: Any) -> Iterator[Any]:
    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return type(error), str(error), getattr(error, "code", None)

    with Session() as session:
        session.add_all([Tag(name="a"), Tag(name="a")])
        yield outcome(session.commit)
        yield outcome(lambda: session.execute(select(Tag)))
        session.rollback()
        for what in ("SELECT 1", None, 1, Tag, [select(Tag)]):
            yield outcome(lambda what=what: session.execute(what))
        yield outcome(lambda: session.execute(text("SELECT 1/0")))
        yield outcome(lambda: session.execute(text("SELECT :x")))
        session.rollback()
        yield outcome(lambda: session.execute(select(text("nothing"))))
        session.rollback()
        yield outcome(lambda: session.get(Tag, (1, 2)))
        yield outcome(lambda: session.get(Tag, {"name": "a"}))
        yield outcome(lambda: session.get(int, 1))
        yield outcome(lambda: session.get_one(Tag, 77))
        yield outcome(lambda: session.add("nothing"))
        yield outcome(lambda: session.refresh(Tag(name="x")))
        yield outcome(lambda: session.query(Tag).one())
        yield outcome(lambda: session.execute(select(Tag), {"bad": object()}).all())
        yield outcome(lambda: session.execute(insert(Tag), [{"nothing": 1}]))
        session.rollback()
        yield outcome(lambda: session.execute(update(Tag), [{"name": "no key"}]))
        yield outcome(lambda: session.execute(update(Tag).values(nothing=1)))
        yield outcome(lambda: session.execute(select(Tag), bind_arguments={"x": 1}))
        yield outcome(lambda: session.connection(nothing=1))
        yield outcome(lambda: session.begin())
        yield outcome(session.prepare)
        yield outcome(lambda: session.bulk_insert_mappings(int, []))
        yield outcome(lambda: session.flush([Tag(name="x")]))
        session.rollback()
        yield outcome(lambda: session.scalar(select(Tag.name).where(Tag.id == "x")))
        session.rollback()
        yield outcome(lambda: session.merge(5))
        yield outcome(lambda: session.expunge(Tag(name="y")))


def warning(Session: Any) -> Iterator[Any]:
    with Session() as session:
        session.add(Tag(name="a"))
        session.commit()
        other = aliased(Tag)
        yield session.execute(select(Tag.id, other.id).where(Tag.name == "a")).all()
        yield session.query(Tag).get(1).name
        session.add(Tag(id=1, name="twice"))
        with contextlib.suppress(sa_exc.IntegrityError):
            session.flush()
        session.rollback()
        yield session.scalars(
            select(Person).where(Person.id.in_(select(Author.id).subquery()))
        ).all()
        session.add(author := Author(name="A", email="a@x.org"))
        post = Post(slug="p", title="P")
        post.author = author
        session.commit()
        yield len(author.posts)


def copying(Session: Any) -> Iterator[Any]:
    with Session(expire_on_commit=False) as session:
        fill(session)
        session.commit()
        post = session.scalars(select(Post).where(Post.slug == "joins")).one()
        yield [t.name for t in post.tags]
    thawed, untouched = pickle.loads(pickle.dumps(post)), pickle.dumps(post)
    thawed.title = "Thawed"
    thawed.tags.pop()
    with Session.begin() as session:
        merged = session.merge(thawed)
        yield merged.title, [t.name for t in merged.tags], session.is_modified(merged)
    with Session() as session:
        yield session.merge(pickle.loads(untouched), load=False).title
        yield session.scalars(post.revisions.select()).all()


def collecting(Session: Any) -> Iterator[Any]:
    with Session.begin() as session:
        fill(session)
        post = session.scalars(select(Post).where(Post.slug == "windows")).one()
        post.revisions.add_all([Revision(body="1"), Revision(body="2")])
        session.flush()
        session.execute(post.revisions.insert(), [{"body": "3"}])
        session.execute(post.revisions.update().values(body=Revision.body + "!"))
        yield session.scalars(
            post.revisions.select().with_only_columns(Revision.body)
        ).all()
        yield post.author.all_posts.filter(Post.stars > 3).count()
        post.tags.clear()
        session.flush()
        session.delete(post)
        session.flush()
        yield session.scalar(select(func.count(Revision.id)))


def connecting(Session: Any) -> Iterator[Any]:
    with Session() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        yield session.scalar(text("SHOW transaction_isolation"))
        session.rollback()
        session.connection().execute(Tag.__table__.insert(), [{"name": "a"}])
        yield session.scalars(select(Tag).with_for_update(skip_locked=True)).one().name
        session.commit()
        session.begin()
        session.flush()
        session.commit()
        session.close()
        yield session.in_transaction()
        session.reset()


SCRIPTS: list[Script] = [
    filling,
    reading,
    inheriting,
    changing,
    bulk,
    nesting,
    failing,
    warning,
    copying,
    collecting,
    connecting,
]
