"""The blog's transactions: savepoints, failures, events, two sessions at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from blog_models import AuditEntry, Author, Comment, Person, Post, Tag
from blog_stage import Installation
from sqlalchemy import Engine, create_engine, event, func, insert, inspect, select, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import object_session, scoped_session


def names(session: Any) -> list[str]:
    return list(session.scalars(select(Tag.name).order_by(Tag.name)))


def test_begin_commits_at_the_end_and_rolls_back_on_an_error(Session: Any) -> None:
    with Session() as session, session.begin():
        session.add(Tag(name="kept"))
    with pytest.raises(ZeroDivisionError), Session.begin() as session:
        session.add(Tag(name=str(session.scalar(select(func.count(Tag.id))) / 0)))
    with Session() as session:
        assert names(session) == ["kept"]


def test_a_savepoint_undoes_the_inner_failure_alone(session: Any) -> None:
    session.add(Tag(name="sql"))
    with session.begin_nested():
        session.add(Tag(name="python"))
    with pytest.raises(sa_exc.IntegrityError), session.begin_nested():
        session.add(Tag(name="sql"))
    assert session.is_active
    inner = session.begin_nested()
    session.add(lost := Tag(name="lost"))
    session.flush()
    inner.rollback()
    assert inspect(lost).transient
    session.commit()
    assert names(session) == ["python", "sql"]


def test_savepoints_nest(session: Any) -> None:
    with session.begin_nested() as outer:
        session.add(Tag(name="outer"))
        assert session.in_nested_transaction()
        assert session.get_nested_transaction() is outer
        with session.begin_nested() as inner:
            session.add(Tag(name="inner"))
            session.flush()
            inner.rollback()
    session.commit()
    assert names(session) == ["outer"]


def test_a_rolled_back_savepoint_restores_what_was_loaded(session: Any) -> None:
    session.add(tag := Tag(name="before"))
    session.commit()
    nested = session.begin_nested()
    tag.name = "inside"
    session.flush()
    nested.rollback()
    assert tag.name == "before"


def test_an_integrity_error_wants_a_rollback_first(session: Any) -> None:
    session.add_all([Tag(name="sql"), Tag(name="sql")])
    with pytest.raises(sa_exc.IntegrityError, match="tag_name_key") as caught:
        session.commit()
    assert caught.value.orig.sqlstate == "23505"
    session.rollback()
    session.add(Tag(name="sql"))
    session.flush()
    with pytest.raises(sa_exc.IntegrityError):
        session.execute(insert(Tag), [{"name": "sql"}])
    session.rollback()
    assert names(session) == []


def test_a_failed_flush_leaves_an_inactive_transaction(session: Any) -> None:
    session.begin()
    session.add_all([Tag(name="sql"), Tag(name="sql")])
    with pytest.raises(sa_exc.IntegrityError):
        session.flush()
    assert not session.is_active
    with pytest.raises(sa_exc.PendingRollbackError, match="rolled back"):
        session.execute(select(Tag))
    session.rollback()
    assert session.is_active


def test_a_check_and_a_foreign_key_refuse(session: Any) -> None:
    ada = Author(name="Ada", email="a@x.org", posts=[Post(slug="a", title="A")])
    session.add(ada)
    session.commit()
    ada.posts[0].comments.append(Comment(writer="Bea", body=""))
    with pytest.raises(sa_exc.IntegrityError, match="comment_body"):
        session.flush()
    session.rollback()
    session.add(Comment(writer="Bea", body="x", post_id=-1))
    with pytest.raises(sa_exc.IntegrityError, match="foreign key"):
        session.flush()
    session.rollback()


def test_events_are_counted(make_session: Callable[..., Any]) -> None:
    Session = make_session(listeners=False)
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        def listener(*_: object, **__: object) -> None:
            counts[name] = counts.get(name, 0) + 1

        event.listen(Session, name, listener)

    for name in (
        "before_flush",
        "after_flush",
        "after_flush_postexec",
        "before_commit",
        "after_commit",
        "after_rollback",
        "after_soft_rollback",
        "after_begin",
        "after_transaction_create",
        "after_transaction_end",
        "do_orm_execute",
    ):
        count(name)
    with Session() as session:
        session.add(Tag(name="one"))
        session.commit()
        names(session)
        session.execute(text("SELECT 1"))
        session.rollback()
        with session.begin_nested():
            session.add(Tag(name="two"))
        session.rollback()
    assert counts == {
        "after_transaction_create": 6,
        "before_commit": 2,  # the savepoint's as well
        "before_flush": 2,
        "after_begin": 4,
        "after_flush": 2,
        "after_flush_postexec": 2,
        "after_commit": 2,
        "after_transaction_end": 6,
        "do_orm_execute": 2,
        "after_soft_rollback": 2,
        "after_rollback": 2,
    }


def test_after_begin_sees_the_connection_of_the_transaction(
    make_session: Callable[..., Any],
) -> None:
    Session = make_session()

    @event.listens_for(Session, "after_begin")
    def settle(_: Any, __: Any, connection: Any) -> None:
        connection.execute(text("SET LOCAL lock_timeout = '777ms'"))

    with Session() as session:
        assert session.scalar(text("SHOW lock_timeout")) == "777ms"


@pytest.mark.parametrize("expire", [True, False])
def test_expire_on_commit_decides_what_is_read_again(
    make_session: Callable[..., Any], expire: bool
) -> None:
    Session = make_session(expire_on_commit=expire)
    with Session() as session:
        session.add(tag := Tag(name="sql"))
        session.commit()
        assert ("name" in tag.__dict__) is not expire
        session.execute(text("UPDATE tag SET name = 'changed'"))
        assert tag.name == ("changed" if expire else "sql")


def test_autoflush_and_no_autoflush(session: Any, make_session: Any) -> None:
    session.add(Tag(name="sql"))
    with session.no_autoflush:
        assert names(session) == []
    assert names(session) == ["sql"]
    with make_session(autoflush=False)() as other:
        other.add(Tag(name="python"))
        assert names(other) == []
        other.flush()
        assert names(other) == ["python"]


def test_autobegin_off_wants_begin(make_session: Callable[..., Any]) -> None:
    with make_session(autobegin=False)() as session:
        with pytest.raises(sa_exc.InvalidRequestError, match="Autobegin is disabled"):
            session.execute(text("SELECT 1"))
        with session.begin():
            assert session.scalar(text("SELECT 1")) == 1
    with make_session()() as session:
        assert not session.in_transaction()
        session.begin()
        with pytest.raises(sa_exc.InvalidRequestError, match="already begun"):
            session.begin()


def test_close_resets_only_off_ends_the_session(
    make_session: Callable[..., Any],
) -> None:
    session = make_session(close_resets_only=False)()
    session.execute(text("SELECT 1"))
    session.close()
    with pytest.raises(sa_exc.InvalidRequestError, match="permanently closed"):
        session.execute(text("SELECT 1"))


def test_the_connection_of_the_session_is_its_transactions(
    session: Any, engine: Engine
) -> None:
    connection = session.connection()
    assert connection.engine is engine
    assert connection is session.connection(bind_arguments={"mapper": inspect(Tag)})
    connection.execute(insert(Tag), [{"name": "sql"}])
    assert names(session) == ["sql"]
    with connection.connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tag")
        assert cursor.fetchone() == (1,)
    session.rollback()
    assert names(session) == []


def test_an_isolation_level_is_set_for_one_transaction(session: Any) -> None:
    session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    assert session.scalar(text("SHOW transaction_isolation")) == "serializable"
    session.commit()
    assert session.scalar(text("SHOW transaction_isolation")) == "read committed"


def test_get_bind_names_the_engine(session: Any, engine: Engine) -> None:
    assert session.get_bind() is engine
    assert session.get_bind(Post) is engine
    assert session.get_bind(inspect(Post)) is engine
    assert session.get_bind(mapper=Post, clause=select(Tag)) is engine
    assert session.get_bind(clause=select(Tag)) is engine
    assert session.get_bind(clause=Tag.__table__) is engine
    assert session.bind is engine
    with engine.connect() as other:
        assert session.get_bind(bind=other) is other


def test_get_bind_asks_nothing_of_what_is_not_mapped(
    session: Any, engine: Engine
) -> None:
    assert session.get_bind(int) is engine


def test_bind_arguments_send_one_statement_elsewhere(
    session: Any, blog: Installation
) -> None:
    session.add(Tag(name="mine"))
    session.flush()
    here = session.scalar(text("SELECT pg_backend_pid()"))
    other = create_engine(blog.home_url)
    elsewhere = {"bind": other}
    there = session.scalar(text("SELECT pg_backend_pid()"), bind_arguments=elsewhere)
    assert here != there
    found = session.scalars(select(Tag.name), bind_arguments=elsewhere)
    assert found.all() == []
    assert session.connection(bind_arguments=elsewhere).engine is other
    session.rollback()
    other.dispose()


def test_binds_give_a_table_an_engine_of_its_own(
    make_session: Callable[..., Any], engine: Engine
) -> None:
    audit_engine = engine.execution_options(logging_token="audit")
    Session = make_session(binds={AuditEntry: audit_engine})
    used: list[Engine] = []
    event.listen(Session, "after_begin", lambda _, __, c: used.append(c.engine))
    with Session() as session:
        assert session.get_bind(AuditEntry) is audit_engine
        assert session.get_bind(Post) is engine
        session.add(AuditEntry(action="add", subject="by the unit of work"))
        session.add(Tag(name="sql"))
        session.flush()
        assert used == [audit_engine, engine]
        session.commit()
        assert session.scalars(select(AuditEntry.subject)).all() == [
            "by the unit of work"
        ]


def test_a_subclass_may_choose_binds_itself(blog: Installation, engine: Engine) -> None:
    audit_engine = engine.execution_options(logging_token="audit")
    used: list[Engine] = []

    class Chosen(blog.base):  # type: ignore[name-defined, misc]
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            if mapper is not None and inspect(mapper).class_ is AuditEntry:
                return audit_engine
            return super().get_bind(mapper, **options)

    Session = blog.factory(class_=Chosen)

    @event.listens_for(Session, "after_begin")
    def note(_: Any, __: Any, connection: Any) -> None:
        used.append(connection.engine)

    with Session.begin() as session:
        session.add(AuditEntry(action="add", subject="by the unit of work"))
    assert used == [audit_engine]


def test_an_outer_transaction_rolls_everything_back(
    blog: Installation, engine: Engine
) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with (
            blog.join(connection, join_transaction_mode="create_savepoint") as Session,
            Session() as session,
        ):
            session.add(Tag(name="sql"))
            session.commit()
            session.add(Tag(name="sql"))
            with pytest.raises(sa_exc.IntegrityError):
                session.commit()
            session.rollback()
            assert names(session) == ["sql"]
        outer.rollback()
    with blog.factory()() as session:
        assert names(session) == []


def test_a_scoped_session_is_one_per_thread(Session: Any) -> None:
    registry = scoped_session(Session)
    registry.add(Tag(name="sql"))
    registry.commit()
    assert names(registry) == ["sql"]
    mine, theirs = registry(), []
    thread = threading.Thread(target=lambda: theirs.append(registry()))
    thread.start()
    thread.join()
    assert registry() is mine is not theirs[0]
    registry.remove()
    assert registry() is not mine
    registry.remove()
    theirs[0].close()


def test_sessionmaker_is_configured_and_called(make_session: Any) -> None:
    Session = make_session(info={"app": "blog"})
    Session.configure(expire_on_commit=False)
    with Session(info={"request": 7}) as session:
        assert session.info == {"app": "blog", "request": 7}
        assert isinstance(session, PlainSession)
        session.add(tag := Tag(name="sql"))
        session.commit()
        assert tag.__dict__["name"] == "sql"


def test_a_subclass_of_the_session_keeps_its_own_methods(blog: Installation) -> None:
    class BlogSession(blog.base):  # type: ignore[name-defined, misc]
        def publish(self, name: str) -> Tag:
            tag = Tag(name=name)
            self.add(tag)
            self.flush()
            return tag

    with blog.factory(class_=BlogSession)() as session:
        assert session.publish("sql").id is not None


def test_the_session_contains_iterates_and_forgets(session: Any) -> None:
    session.add_all(tags := [Tag(name="a"), Tag(name="b")])
    assert len(session.new) == 2
    session.flush()
    assert sorted(t.name for t in session) == ["a", "b"]
    assert len(session.identity_map) == 2
    tag, other = tags
    session.expunge(tag)
    assert tag not in session
    assert object_session(tag) is None
    session.expunge_all()
    assert list(session) == []
    with pytest.raises(sa_exc.InvalidRequestError, match="is not present"):
        session.expunge(other)


def test_an_object_of_another_session_is_refused(Session: Any) -> None:
    with Session() as one, Session() as two:
        one.add(tag := Tag(name="sql"))
        with pytest.raises(sa_exc.InvalidRequestError, match="already attached"):
            two.add(tag)
        with pytest.raises(sa_exc.InvalidRequestError, match="not persisted"):
            one.delete(tag)


@pytest.mark.parametrize("statement", ["SELECT 1", None, 5, Tag])
def test_what_is_no_statement_is_refused(session: Any, statement: Any) -> None:
    with pytest.raises(sa_exc.ArgumentError):
        session.execute(statement)


def test_workers_skip_locked_posts(Session: Any) -> None:
    with Session.begin() as session:
        session.add_all([Tag(name=f"job {n}") for n in range(3)])
    job = select(Tag).order_by(Tag.id).limit(1)
    with Session() as one, Session() as two:
        first = one.scalars(job.with_for_update(skip_locked=True)).one()
        second = two.scalars(job.with_for_update(skip_locked=True)).one()
        assert (first.name, second.name) == ("job 0", "job 1")
        with pytest.raises(sa_exc.OperationalError) as caught:
            two.scalars(
                select(Tag).where(Tag.id == first.id).with_for_update(nowait=True)
            ).one()
        assert caught.value.orig.sqlstate == "55P03"
        two.rollback()
        one.delete(first)
        one.commit()
        assert two.scalars(job.with_for_update(nowait=True)).one().name == "job 1"


def test_two_sessions_wait_for_each_other(Session: Any) -> None:
    with Session.begin() as session:
        session.add(Tag(name="0"))

    def count_up() -> None:
        for _ in range(10):
            with Session.begin() as session:
                tag = session.scalars(select(Tag).with_for_update()).one()
                tag.name = str(int(tag.name) + 1)

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Session() as session:
        assert names(session) == ["40"]


def test_uncommitted_rows_are_seen_by_their_own_session_alone(Session: Any) -> None:
    with Session() as one, Session() as two:
        one.add(Tag(name="sql"))
        one.flush()
        assert names(one) == ["sql"]
        assert names(two) == []
        one.commit()
        assert names(two) == ["sql"]


def test_invalidate_throws_the_connection_away(session: Any) -> None:
    before = session.scalar(text("SELECT pg_backend_pid()"))
    session.add(Tag(name="lost"))
    session.flush()
    session.invalidate()
    assert session.scalar(text("SELECT pg_backend_pid()")) != before
    assert names(session) == []


def test_a_dead_connection_is_reported_and_replaced(session: Any, Session: Any) -> None:
    pid = session.scalar(text("SELECT pg_backend_pid()"))
    with Session.begin() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    with pytest.raises(sa_exc.OperationalError) as caught:
        session.execute(text("SELECT 1"))
    assert caught.value.connection_invalidated
    session.rollback()
    assert session.scalar(text("SELECT 1")) == 1


def test_do_orm_execute_may_answer_itself_or_rewrite(
    make_session: Callable[..., Any],
) -> None:
    Session = make_session(listeners=False)

    @event.listens_for(Session, "do_orm_execute")
    def rewrite(state: Any) -> Any:
        if state.execution_options.get("cached"):
            frozen = state.invoke_statement().freeze()
            return frozen()
        if state.is_select and "tag" in str(state.statement):
            return state.invoke_statement(statement=select(Person.name))
        return None

    with Session() as session:
        session.add_all([Tag(name="sql"), Person(name="Ada", email="a@x.org")])
        session.flush()
        assert session.scalars(select(Tag.name)).all() == ["Ada"]
        cached = session.scalars(select(Tag.name), execution_options={"cached": True})
        assert cached.all() == ["sql"]
        assert (
            session.scalar(select(func.count(Tag.id)), execution_options={"cached": 1})
            == 1
        )


def test_do_orm_execute_adds_parameters_and_options(
    make_session: Callable[..., Any],
) -> None:
    Session = make_session(listeners=False)
    seen: list[dict[str, Any]] = []

    @event.listens_for(Session, "do_orm_execute")
    def look(state: Any) -> None:
        state.update_execution_options(tenant=7)
        seen.append(
            {
                "select": state.is_select,
                "orm": state.is_orm_statement,
                "mapper": state.bind_mapper and state.bind_mapper.class_.__name__,
                "bind": dict(state.bind_arguments),
                "parameters": state.parameters,
            }
        )

    with Session() as session:
        session.execute(select(Tag).where(text("name = :n")), {"n": "sql"})
        session.execute(text("SELECT 1"))
        session.execute(insert(Tag), [{"name": "a"}])
    assert [
        (s["select"], s["orm"], s["mapper"], set(s["bind"]), s["parameters"])
        for s in seen
    ] == [
        (True, True, "Tag", {"clause", "mapper"}, {"n": "sql"}),
        (False, False, None, {"clause"}, None),
        (False, True, "Tag", {"clause", "mapper"}, [{"name": "a"}]),
    ]
