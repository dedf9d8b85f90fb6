"""The blog's schema: what is created, by which events, and what reflection finds."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import pytest
from blog_models import Base
from blog_stage import Installation
from sqlalchemy import (
    DDL,
    Column,
    Computed,
    Engine,
    Enum,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.orm import registry


class Mood(enum.Enum):
    HAPPY = "happy"
    TIRED = "tired"


@pytest.fixture
def metadata(blog: Installation) -> Iterator[MetaData]:
    """More tables for one test, in a schema of their own."""
    metadata = MetaData()
    with blog.engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA extra"))
    yield metadata
    with blog.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA extra CASCADE"))


def test_computed_identity_and_enum_columns_are_made_and_read(
    blog: Installation, metadata: MetaData, session: Any
) -> None:
    diary = Table(
        "diary",
        metadata,
        Column("id", Integer, Identity(start=10), primary_key=True),
        Column("words", Integer, nullable=False),
        Column("pages", Integer, Computed("words / 100", persisted=True)),
        Column("mood", Enum(Mood, schema="extra"), index=True, comment="how it was"),
        Column("title", String, unique=True),
        schema="extra",
    )
    Index("diary_words", diary.c.words.desc(), postgresql_where=diary.c.words > 0)

    class Entry:
        pass

    registry().map_imperatively(Entry, diary)
    blog.create(metadata)
    blog.create(metadata)
    entry: Any = Entry()
    entry.words, entry.mood, entry.title = 250, Mood.HAPPY, "x"
    session.add(entry)
    session.commit()
    assert (entry.id, entry.pages, entry.mood) == (10, 2, Mood.HAPPY)


def test_a_class_is_mapped_to_a_join_and_to_a_select(
    blog: Installation, metadata: MetaData, session: Any
) -> None:
    one = Table(
        "one", metadata, Column("id", Integer, primary_key=True), schema="extra"
    )
    two = Table(
        "two",
        metadata,
        Column("id", ForeignKey(one.c.id), primary_key=True),
        Column("name", String),
        schema="extra",
    )
    mapping = registry()

    class Both:
        pass

    class Named:
        pass

    mapping.map_imperatively(
        Both, one.join(two), properties={"id": [one.c.id, two.c.id]}
    )
    named = select(two.c.id, two.c.name).where(two.c.name.is_not(None)).subquery()
    mapping.map_imperatively(Named, named, primary_key=[named.c.id])
    blog.create(metadata)
    both: Any = Both()
    both.name = "a"
    session.add(both)
    session.commit()
    assert [n.name for n in session.scalars(select(Named))] == ["a"]
    session.delete(both)
    session.commit()
    assert session.scalars(select(Named)).all() == []


def test_tables_whose_primary_keys_refer_to_each_other(
    blog: Installation, metadata: MetaData, session: Any
) -> None:
    deferred = {"deferrable": True, "initially": "DEFERRED"}
    left = Table(
        "left",
        metadata,
        Column(
            "id",
            Integer,
            ForeignKey("extra.right.id", use_alter=True, name="left_right", **deferred),
            primary_key=True,
        ),
        schema="extra",
    )
    Table(
        "right",
        metadata,
        Column("id", ForeignKey("extra.left.id", **deferred), primary_key=True),
        schema="extra",
    )
    blog.create(metadata)
    assert session.execute(select(left)).all() == []


def test_a_listener_for_the_creation_of_a_table_runs_where_the_table_is(
    blog: Installation, metadata: MetaData, session: Any
) -> None:
    table = Table(
        "t", metadata, Column("id", Integer, primary_key=True), schema="extra"
    )
    event.listen(table, "after_create", DDL("INSERT INTO extra.t VALUES (7)"))
    blog.create(metadata)
    assert session.scalars(select(table.c.id)).all() == [7]


def test_a_listener_for_the_creation_of_all_tables_finds_them(
    blog: Installation, metadata: MetaData, session: Any
) -> None:
    Table("t", metadata, Column("id", Integer, primary_key=True), schema="extra")
    event.listen(
        metadata, "after_create", DDL("CREATE VIEW extra.v AS SELECT id FROM extra.t")
    )
    blog.create(metadata)
    assert session.execute(text("SELECT * FROM extra.v")).all() == []


def test_reflection_over_the_sessions_connection_finds_the_blog_alone(
    session: Any, engine: Engine
) -> None:
    connection = session.connection()
    assert sorted(inspect(connection).get_table_names()) == sorted(Base.metadata.tables)
    reflected = MetaData()
    reflected.reflect(connection)
    post = reflected.tables["post"]
    assert {c.name for c in post.c} == {c.name for c in Base.metadata.tables["post"].c}
    assert [str(c.sqltext) for c in post.constraints if hasattr(c, "sqltext")] == []
    assert inspect(engine).has_table("post")
