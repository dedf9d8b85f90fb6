"""What the blog writes, one object or many."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from blog_data import fill
from blog_models import (
    Attachment,
    AuditEntry,
    Author,
    Comment,
    Image,
    Moderator,
    Person,
    Post,
    Revision,
    Tag,
    receipt_numbers,
)
from sqlalchemy import (
    Engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import exc as orm_exc
from sqlalchemy.orm import make_transient, make_transient_to_detached, object_session
from sqlalchemy.orm.attributes import flag_modified, get_history, set_committed_value
from sqlalchemy.schema import DDL, CreateTable


def slugs(session: Any) -> list[str]:
    return list(session.scalars(select(Post.slug).order_by(Post.slug)))


def author(**changes: Any) -> Author:
    return Author(**{"name": "Ada", "email": "ada@x.org", **changes})


def test_an_object_goes_through_all_its_states(session: Any) -> None:
    ada = author()
    assert inspect(ada).transient
    session.add(ada)
    assert inspect(ada).pending
    assert ada in session.new
    session.flush()
    assert inspect(ada).persistent
    assert inspect(ada).identity == (ada.id,)
    assert object_session(ada) is session
    session.delete(ada)
    session.flush()
    assert inspect(ada).deleted
    session.commit()
    assert inspect(ada).detached
    make_transient(ada)
    assert inspect(ada).transient
    session.add(ada)
    session.commit()
    assert session.scalar(select(func.count(Author.id))) == 1


def test_children_are_saved_with_their_parent_and_deleted_with_it(session: Any) -> None:
    fill(session)
    session.commit()
    joins = session.scalars(select(Post).where(Post.slug == "joins")).one()
    # Threaded comments go parent first in and child first out.
    session.delete(joins)
    session.commit()
    assert slugs(session) == ["compilers", "windows"]
    for entity in (Comment, Attachment):
        assert session.scalar(select(func.count()).select_from(entity)) == 0
    assert session.scalar(text("SELECT count(*) FROM post_tag")) == 1
    assert session.scalar(select(func.count(Tag.id))) == 2


def test_an_orphan_is_deleted_and_a_moved_post_is_not(session: Any) -> None:
    fill(session)
    ada = session.scalars(select(Author).where(Author.name == "Ada")).one()
    grace = session.scalars(select(Author).where(Author.name == "Grace")).one()
    joins, windows = ada.posts
    grace.posts.append(joins)
    ada.posts.remove(windows)
    session.commit()
    assert [p.slug for p in grace.posts] == ["joins", "compilers"]
    assert slugs(session) == ["compilers", "joins"]


def test_tags_are_exchanged_through_the_secondary_table(session: Any) -> None:
    fill(session)
    joins = session.scalars(select(Post).where(Post.slug == "joins")).one()
    joins.tags = [Tag(name="algebra"), joins.tags[1]]
    session.commit()
    assert [t.name for t in joins.tags] == ["algebra", "sql"]
    python = session.scalars(select(Tag).where(Tag.name == "python")).one()
    assert python.posts == []


def test_backrefs_agree_before_the_flush(session: Any) -> None:
    ada, post = author(), Post(slug="a", title="A")
    post.author = ada
    assert ada.posts == [post]
    session.add(ada)
    assert post in session
    ada.posts.remove(post)
    assert post.author is None


def test_server_and_sequence_defaults_are_there_after_the_flush(session: Any) -> None:
    ada = author(posts=[Post(slug="a", title="A"), Post(slug="b", title="B")])
    session.add(ada)
    session.flush()
    assert [p.number for p in ada.posts] == [100, 101]
    assert ada.posts[0].created_at == ada.posts[1].created_at is not None
    assert [p.version for p in ada.posts] == [1, 1]
    assert session.scalar(receipt_numbers) == 1000
    assert session.scalar(receipt_numbers.next_value()) == 1001
    assert session.scalar(select(receipt_numbers.next_value())) == 1002


def test_sql_expressions_are_assigned_and_read_back(session: Any) -> None:
    ada = author(posts=[Post(slug="a", title="A", stars=1)])
    session.add(ada)
    session.commit()
    (post,) = ada.posts
    post.stars = Post.stars + 41
    post.title = func.upper("shouted")
    session.commit()
    assert (post.stars, post.title) == (42, "SHOUTED")


def test_a_stale_version_is_refused(Session: Any) -> None:
    with Session.begin() as session:
        session.add(author(posts=[Post(slug="a", title="A")]))
    with Session() as mine, Session() as theirs:
        here, there = (
            mine.scalars(select(Post)).one(),
            theirs.scalars(select(Post)).one(),
        )
        there.title = "Theirs"
        theirs.commit()
        here.title = "Mine"
        with pytest.raises(orm_exc.StaleDataError, match="expected to update 1 row"):
            mine.commit()
        mine.rollback()
        assert (here.title, here.version) == ("Theirs", 2)


def test_a_validator_refuses_before_anything_is_sent(session: Any) -> None:
    with pytest.raises(ValueError, match="no address"):
        author(email="nowhere")
    assert author(email="ADA@X.org").email == "ada@x.org"


def test_the_audit_log_is_written_in_the_same_transaction(session: Any) -> None:
    session.add(author(posts=[Post(slug="a", title="A"), Post(slug="b", title="B")]))
    session.commit()
    post = session.scalars(select(Post).where(Post.slug == "a")).one()
    post.title = "New"
    session.flush()
    session.delete(post)
    session.commit()
    entries = session.execute(
        select(AuditEntry.action, AuditEntry.subject).order_by(AuditEntry.id)
    )
    assert [tuple(e) for e in entries] == [
        ("add", "a"),
        ("add", "b"),
        ("change", "a"),
        ("delete", "a"),
    ]
    session.add(author(name="Eve", email="e@x.org", posts=[Post(slug="c", title="C")]))
    session.flush()
    session.rollback()
    assert session.scalar(select(func.count(AuditEntry.id))) == 4


def test_a_flush_listener_may_use_the_orms_bulk_insert(
    make_session: Callable[..., Any],
) -> None:
    Session = make_session(listeners=False)

    @event.listens_for(Session, "after_flush")
    def log(session: Any, *_: object) -> None:
        rows = [{"action": "add", "subject": p.name} for p in session.new]
        if rows:
            session.execute(insert(AuditEntry), rows)

    with Session.begin() as session:
        session.add_all([author(), author(name="Eve", email="eve@x.org")])
    with Session() as session:
        assert sorted(session.scalars(select(AuditEntry.subject))) == ["Ada", "Eve"]


def test_a_flush_listener_may_use_legacy_bulk_methods(
    make_session: Callable[..., Any],
) -> None:
    Session = make_session(listeners=False)

    @event.listens_for(Session, "before_flush")
    def log(session: Any, *_: object) -> None:
        rows = [{"action": "add", "subject": p.name} for p in session.new]
        session.bulk_insert_mappings(AuditEntry, rows)

    with Session.begin() as session:
        session.add(author())
    with Session() as session:
        assert session.scalars(select(AuditEntry.subject)).all() == ["Ada"]


def test_a_mapper_listener_may_use_the_orms_bulk_insert(session: Any) -> None:
    def log(_: object, __: object, target: Author) -> None:
        object_session(target).execute(  # type: ignore[union-attr]
            insert(AuditEntry), [{"action": "insert", "subject": target.name}]
        )

    event.listen(Author, "after_insert", log)
    try:
        session.add(author())
        session.commit()
    finally:
        event.remove(Author, "after_insert", log)
    assert session.scalars(select(AuditEntry.subject)).all() == ["Ada"]


def test_a_mapper_listener_writes_on_the_connection_it_is_given(session: Any) -> None:
    def log(_: object, connection: Any, target: Author) -> None:
        connection.execute(
            AuditEntry.__table__.insert(),
            {"action": "insert", "subject": f"{target.name} {target.id}"},
        )

    event.listen(Author, "after_insert", log)
    try:
        ada = author()
        session.add(ada)
        session.commit()
    finally:
        event.remove(Author, "after_insert", log)
    assert session.scalars(select(AuditEntry.subject)).all() == [f"Ada {ada.id}"]


# -- many rows at once -----------------------------------------------------------------


def test_legacy_bulk_methods_write_without_the_unit_of_work(session: Any) -> None:
    session.bulk_insert_mappings(
        Person,
        [{"name": f"P{n}", "email": f"p{n}@x.org", "kind": "person"} for n in range(3)],
    )
    session.bulk_save_objects(
        [
            Moderator(name="M1", email="m1@x.org", since=1),
            Moderator(name="M2", email="m2@x.org", since=2),
            Tag(name="bulk"),
        ],
        return_defaults=True,
    )
    rows = session.execute(select(Person.id, Person.name).order_by(Person.name)).all()
    assert [row.name for row in rows] == ["M1", "M2", "P0", "P1", "P2"]
    session.bulk_update_mappings(
        Person, [{"id": row.id, "name": row.name.lower()} for row in rows]
    )
    session.commit()
    assert session.scalar(select(func.count()).where(Person.name.like("p%"))) == 3
    assert session.scalars(select(Moderator.since).order_by(Moderator.id)).all() == [
        1,
        2,
    ]


def test_orm_bulk_insert_update_and_delete(session: Any) -> None:
    ids = session.scalars(
        insert(Tag).returning(Tag.id, sort_by_parameter_order=True),
        [{"name": f"tag {n}"} for n in range(20)],
    ).all()
    assert ids == sorted(ids)
    assert len(ids) == 20
    session.execute(update(Tag), [{"id": ids[0], "name": "first"}])
    changed = session.execute(
        update(Tag).where(Tag.name.like("tag 1%")).values(name=Tag.name + "!")
    )
    assert changed.rowcount == 11
    gone = session.scalars(
        delete(Tag).where(Tag.name.endswith("!")).returning(Tag.name)
    ).all()
    assert len(gone) == 11
    assert session.get(Tag, ids[0]).name == "first"
    session.commit()
    assert session.scalar(select(func.count(Tag.id))) == 9


def test_orm_bulk_insert_of_joined_inheritance_returns_objects(session: Any) -> None:
    made = session.scalars(
        insert(Author).returning(Author),
        [{"name": f"A{n}", "email": f"a{n}@x.org", "bio": str(n)} for n in range(3)],
    ).all()
    assert sorted(a.bio for a in made) == ["0", "1", "2"]
    assert all(a in session for a in made)


@pytest.mark.parametrize("strategy", ["evaluate", "fetch", "auto", False])
def test_a_bulk_update_synchronizes_what_is_loaded(session: Any, strategy: Any) -> None:
    session.add(author(posts=[Post(slug="a", title="A"), Post(slug="b", title="B")]))
    session.commit()
    post = session.scalars(select(Post).where(Post.slug == "a")).one()
    session.execute(
        update(Post).where(Post.slug == "a").values(title="Z"),
        execution_options={"synchronize_session": strategy},
    )
    assert post.title == ("A" if strategy is False else "Z")
    session.execute(
        delete(Post).where(Post.slug == "a"),
        execution_options={"synchronize_session": strategy},
    )
    assert (post in session) is (strategy is False)


def test_an_upsert_returns_the_objects(session: Any) -> None:
    session.add(Tag(name="sql"))
    session.flush()
    statement = pg_insert(Tag).values([{"name": "sql"}, {"name": "new"}])
    statement = statement.on_conflict_do_update(
        index_elements=[Tag.name], set_={"name": statement.excluded.name}
    )
    tags = session.scalars(
        statement.returning(Tag), execution_options={"populate_existing": True}
    ).all()
    assert sorted(t.name for t in tags) == ["new", "sql"]
    assert all(t in session for t in tags)


def test_insert_from_select_and_update_from(session: Any) -> None:
    fill(session)
    session.execute(
        insert(Revision).from_select(
            ["post_id", "body"], select(Post.id, Post.title).where(Post.stars > 5)
        )
    )
    assert session.scalar(select(func.count(Revision.id))) == 2
    session.execute(
        update(Post)
        .where(Post.author_id == Person.id, Person.name == "Grace")
        .values(stars=0)
        .execution_options(synchronize_session=False)
    )
    session.expire_all()
    assert session.scalars(select(Post.slug).where(Post.stars == 0)).all() == [
        "compilers"
    ]


def test_a_write_only_collection_takes_bulk_statements(session: Any) -> None:
    fill(session)
    post = session.scalars(select(Post).where(Post.slug == "joins")).one()
    post.revisions.add_all([Revision(body="1"), Revision(body="2")])
    session.flush()
    session.execute(post.revisions.insert(), [{"body": "3"}, {"body": "4"}])
    session.execute(
        post.revisions.update().where(Revision.body == "3").values(body="three")
    )
    session.execute(post.revisions.delete().where(Revision.body == "4"))
    session.commit()
    bodies = session.scalars(post.revisions.select().with_only_columns(Revision.body))
    assert bodies.all() == ["1", "2", "three"]
    session.delete(post)
    session.commit()
    assert session.scalar(select(func.count(Revision.id))) == 0


def test_legacy_query_updates_and_deletes(session: Any) -> None:
    fill(session)
    query = session.query(Post).filter(Post.stars < 20)
    assert query.update({Post.stars: Post.stars + 1}) == 2
    assert session.query(Comment).filter_by(writer="Dan").delete() == 1
    session.commit()
    assert sorted(session.scalars(select(Post.stars))) == [4, 13, 40]


def test_data_definition_runs_in_the_sessions_transaction(session: Any) -> None:
    from sqlalchemy import Column, Integer, MetaData, Table

    notes = Table("note", MetaData(), Column("id", Integer, primary_key=True))
    session.execute(CreateTable(notes))
    session.execute(notes.insert(), [{"id": 1}, {"id": 2}])
    assert session.scalar(select(func.count()).select_from(notes)) == 2
    session.execute(DDL("DROP TABLE note"))
    session.rollback()
    with pytest.raises(sa_exc.ProgrammingError, match="note"):
        session.execute(select(notes))


# -- copies of objects -----------------------------------------------------------------


def test_merge_updates_the_stored_object_and_its_children(Session: Any) -> None:
    with Session.begin() as session:
        fill(session)
    with Session() as session:
        joins = session.scalars(select(Post).where(Post.slug == "joins")).one()
        assert len(joins.tags) == 2
        assert len(joins.comments) == 3
        session.expunge_all()
    joins.title = "Joins, again"
    joins.tags.pop()
    with Session.begin() as session:
        merged = session.merge(joins)
        assert merged is not joins
    with Session() as session:
        stored = session.get(Post, joins.id)
        assert (stored.title, [t.name for t in stored.tags]) == (
            "Joins, again",
            ["python"],
        )


def test_merge_without_load_sends_nothing(Session: Any, engine: Engine) -> None:
    with Session(expire_on_commit=False) as session, session.begin():
        session.add(tag := Tag(name="sql"))
    sent: list[str] = []

    def note(_c: Any, _cu: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        with Session() as session:
            merged = session.merge(tag, load=False)
            assert merged.name == "sql"
            assert merged in session
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert sent == []


def test_a_pickled_post_is_merged_back(Session: Any) -> None:
    with Session.begin() as session:
        fill(session)
    with Session() as session:
        post = session.scalars(select(Post).where(Post.slug == "joins")).one()
        assert [c.writer for c in post.comments] == ["Bea", "Cal", "Dan"]
        frozen = pickle.dumps(post)
    thawed = pickle.loads(frozen)
    assert [c.writer for c in thawed.comments] == ["Bea", "Cal", "Dan"]
    with Session() as session:
        session.add(thawed)
        assert thawed.author.name == "Ada"


def test_a_detached_copy_is_made_persistent_by_its_key(session: Any) -> None:
    session.add(Tag(name="sql"))
    session.commit()
    ident = session.scalar(select(Tag.id))
    session.expunge_all()
    copy = Tag(id=ident)
    make_transient_to_detached(copy)
    session.add(copy)
    assert copy.name == "sql"
    set_committed_value(copy, "name", "committed")
    assert not session.is_modified(copy)
    flag_modified(copy, "name")
    session.commit()
    assert session.scalar(select(Tag.name)) == "committed"


def test_history_says_what_changed(session: Any) -> None:
    session.add(tag := Tag(name="old"))
    session.commit()
    assert tag.name == "old"
    tag.name = "new"
    assert get_history(tag, "name").deleted == ["old"]
    assert tag in session.dirty
    session.refresh(tag)
    assert tag.name == "old"


def test_refresh_and_expire_read_again(session: Any) -> None:
    session.add(ada := author(posts=[Post(slug="a", title="A")]))
    session.commit()
    session.execute(text("UPDATE person SET name = 'Countess'"))
    assert ada.name == "Countess"  # expired by the commit
    session.execute(text("UPDATE person SET name = 'Ada'"))
    session.refresh(ada, ["name"])
    assert ada.name == "Ada"
    session.expire(ada, ["posts"])
    assert [p.slug for p in ada.posts] == ["a"]
    session.refresh(ada, with_for_update={"of": Person})
    session.execute(text("DELETE FROM post"))
    session.execute(text("DELETE FROM author"))
    with pytest.raises(sa_exc.InvalidRequestError, match="Could not refresh"):
        session.refresh(ada)


def test_an_object_deleted_elsewhere_is_gone(Session: Any) -> None:
    with Session.begin() as session:
        session.add(Tag(name="sql"))
    with Session() as session:
        tag = session.scalars(select(Tag)).one()
        session.commit()
        with Session.begin() as other:
            other.execute(delete(Tag))
        with pytest.raises(orm_exc.ObjectDeletedError):
            _ = tag.name


def test_image_and_attachment_share_a_table(session: Any) -> None:
    session.add_all([Image(url="/i", width=1), Attachment(url="/a")])
    session.commit()
    kinds = session.execute(text("SELECT kind FROM attachment ORDER BY kind")).scalars()
    assert kinds.all() == ["file", "image"]
