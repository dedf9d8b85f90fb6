"""A changed shard key moves the row, and what follows it, to the key's own shard."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Computed,
    ForeignKey,
    ForeignKeyConstraint,
    create_engine,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    sessionmaker,
)
from sqlalchemy.orm.exc import StaleDataError

from shardalchemy import Cluster, ShardKeyError, locator_id, sharded_by
from tests.conftest import Servers


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"
    __table_args__ = {"info": sharded_by("name")}
    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    data: Mapped[Any] = mapped_column(pg.JSONB)
    span: Mapped[datetime.timedelta | None] = mapped_column(pg.INTERVAL)
    numbers: Mapped[list[int] | None] = mapped_column(pg.ARRAY(pg.INTEGER))
    length: Mapped[int] = mapped_column(Computed("length(name)", persisted=True))
    touched: Mapped[datetime.datetime | None] = mapped_column(onupdate=func.now())
    things: Mapped[list[Thing]] = relationship(
        back_populates="owner", cascade="all", order_by="Thing.no"
    )
    __mapper_args__ = {"version_id_col": version}


class Thing(Base):
    __tablename__ = "thing"
    __table_args__ = {"info": sharded_by("owner_name")}
    owner_name: Mapped[str] = mapped_column(
        ForeignKey("owner.name", onupdate="CASCADE", ondelete="CASCADE"),
        primary_key=True,
    )
    no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    owner: Mapped[Owner] = relationship(back_populates="things")
    parts: Mapped[list[Part]] = relationship(back_populates="thing")


class Part(Base):
    __tablename__ = "part"
    __table_args__ = (
        ForeignKeyConstraint(
            ["owner_name", "thing_no"],
            ["thing.owner_name", "thing.no"],
            onupdate="CASCADE",
        ),
        ForeignKeyConstraint(["owner_name"], ["owner.name"], onupdate="CASCADE"),
        {"info": sharded_by("owner_name")},
    )
    owner_name: Mapped[str] = mapped_column(primary_key=True)
    thing_no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    part: Mapped[str] = mapped_column(primary_key=True)
    thing: Mapped[Thing] = relationship(back_populates="parts")


class Strict(Base):
    """What refers to an owner and does not follow it."""

    __tablename__ = "strict"
    __table_args__ = {"info": sharded_by("owner_name")}
    owner_name: Mapped[str] = mapped_column(
        ForeignKey("owner.name", ondelete="CASCADE"), primary_key=True
    )


class Letter(Base):
    """What has a locator."""

    __tablename__ = "letter"
    __table_args__ = {"info": sharded_by("owner_name")}
    id: Mapped[uuid.UUID] = locator_id()
    owner_name: Mapped[str] = mapped_column(
        ForeignKey("owner.name", onupdate="CASCADE")
    )


class Both:
    def __init__(self, cluster: Cluster, url: str) -> None:
        self.cluster = cluster
        self.engine = create_engine(url)
        Base.metadata.create_all(self.engine)
        cluster.create_all(Base.metadata)

    def compare(self, work: Callable[[Any], Any]) -> Any:
        """Run *work* on a plain database and on the shards; return what both gave."""
        outcomes = []
        for maker in (sessionmaker(self.engine), self.cluster.sessionmaker()):
            with maker() as session:
                given = work(session)
                session.commit()
                outcomes.append((given, self.everything(session)))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def everything(self, session: Any) -> Any:
        session.expunge_all()
        return {
            table.name: sorted(
                repr(tuple(row))
                for row in session.execute(
                    select(*(c for c in table.c if c.name not in ("touched", "id")))
                )
            )
            for table in Base.metadata.sorted_tables
        }


@pytest.fixture
def both(cluster: Cluster, servers: Servers) -> Iterator[Both]:
    url = make_url(servers.local.urls["s1"])
    name = f"moves_{uuid.uuid4().hex[:8]}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    pair = Both(cluster, url.set(database=name).render_as_string(False))
    yield pair
    pair.engine.dispose()
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


def ada(**more: Any) -> Owner:
    return Owner(name="Ada", data={"a": None}, numbers=[1, 2], **more)


def names_elsewhere(cluster: Cluster) -> tuple[str, str]:
    """Return names on another shard than Ada's, and on the same."""
    here = cluster.shard_for(Owner, "Ada")
    names = [f"name{n}" for n in range(60)]
    other = next(n for n in names if cluster.shard_for(Owner, n) != here)
    same = next(n for n in names if cluster.shard_for(Owner, n) == here)
    return other, same


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_row_moves_with_what_follows_it(
    both: Both, servers: Servers, elsewhere: bool, loaded: bool
) -> None:
    new = names_elsewhere(both.cluster)[0 if elsewhere else 1]

    def work(session: Any) -> Any:
        parts = [Part(part="x", owner_name="Ada"), Part(part="y", owner_name="Ada")]
        owner = ada(things=[Thing(no=1, parts=parts), Thing(no=2)])
        session.add_all([owner, Owner(name="Bob", data=None)])
        session.commit()
        session.execute(text("SELECT 1"))
        if loaded:
            assert [len(thing.parts) for thing in owner.things] == [2, 0]
        owner.name = new
        owner.numbers = [3]
        session.flush()
        assert session.get(Owner, new) is owner
        assert session.get(Owner, "Ada") is None
        assert inspect(owner).identity == (new,)
        session.commit()
        assert [thing.owner_name for thing in owner.things] == [new, new]
        return owner.version, owner.length, owner.touched is not None

    both.compare(work)
    shard = both.cluster.shard_for(Owner, new)
    for sql in (
        "SELECT 1 FROM owner WHERE name = %s",
        "SELECT 1 FROM thing WHERE owner_name = %s",
        "SELECT 1 FROM part WHERE owner_name = %s",
    ):
        assert set(servers.where(sql, new)) == {shard}
        assert servers.where(sql, "Ada") == {}


def test_values_are_moved_as_they_are_stored(both: Both, servers: Servers) -> None:
    new, _ = names_elsewhere(both.cluster)
    with both.cluster.sessionmaker().begin() as session:
        session.add(ada())
    here, there = (both.cluster.shard_for(Owner, name) for name in ("Ada", new))
    stored = "data = 'null', span = '1 month 3 days', numbers = '[2:3]={7,8}'"
    with servers.connect(here) as connection:
        connection.execute(f"UPDATE owner SET {stored}")
    columns = "SELECT data::text, span::text, numbers::text, length FROM owner"
    before = servers.rows(here, columns)[0]
    with both.cluster.sessionmaker().begin() as session:
        session.get_one(Owner, "Ada").name = new
    assert servers.rows(there, columns)[0][:3] == before[:3]
    assert servers.rows(there, columns)[0][3] == len(new)


def test_a_rolled_back_move_leaves_the_row_and_the_object(
    both: Both, servers: Servers
) -> None:
    new, _ = names_elsewhere(both.cluster)

    def work(session: Any) -> Any:
        session.add(owner := ada(things=[Thing(no=1)]))
        session.commit()
        owner.name = new
        session.flush()
        session.rollback()
        assert inspect(owner).identity == ("Ada",)
        assert session.get(Owner, "Ada") is owner
        with session.begin_nested() as nested:
            owner.name = new
            session.flush()
            nested.rollback()
        return owner.name, len(owner.things)

    assert both.compare(work)[0] == ("Ada", 1)
    assert servers.where("SELECT 1 FROM thing WHERE owner_name = %s", new) == {}


def test_a_child_is_given_to_another_parent(both: Both) -> None:
    new, _ = names_elsewhere(both.cluster)

    def work(session: Any) -> Any:
        one = ada(things=[Thing(no=1), Thing(no=2)])
        two = Owner(name=new, data=None)
        session.add_all([one, two])
        session.commit()
        thing = one.things[0]
        two.things.append(thing)
        session.commit()
        assert session.get(Thing, (new, 1)) is thing
        return [t.no for t in one.things], [t.no for t in two.things]

    assert both.compare(work)[0] == ([2], [1])


def test_a_new_child_of_a_moved_parent(both: Both) -> None:
    new, _ = names_elsewhere(both.cluster)

    def work(session: Any) -> Any:
        session.add(owner := ada())
        session.commit()
        owner.name = new
        owner.things.append(Thing(no=7))
        session.commit()
        return [(t.owner_name, t.no) for t in owner.things]

    assert both.compare(work)[0] == [(new, 7)]


def test_a_row_that_is_gone_is_stale(both: Both) -> None:
    new, _ = names_elsewhere(both.cluster)

    def work(session: Any) -> Any:
        session.add(owner := ada())
        session.commit()
        assert owner.name == "Ada"
        session.execute(Owner.__table__.delete().where(Owner.__table__.c.name == "Ada"))
        owner.name = new
        with pytest.raises(StaleDataError):
            session.flush()
        session.rollback()
        return owner.name

    assert both.compare(work)[0] == "Ada"


def test_a_changed_object_is_deleted_where_it_is(both: Both) -> None:
    new, _ = names_elsewhere(both.cluster)

    def work(session: Any) -> Any:
        session.add(owner := ada())
        session.commit()
        owner.name = new
        session.delete(owner)
        session.commit()

    assert both.compare(work)[1]["owner"] == []


@pytest.mark.parametrize(
    "what", ["strict", "locator", "trigger", "undeclared", "taken"]
)
def test_a_move_that_would_lose_something_is_refused(
    both: Both, servers: Servers, what: str
) -> None:
    new, _ = names_elsewhere(both.cluster)
    expected: Any = ShardKeyError
    with both.cluster.sessionmaker()() as session:
        session.add(owner := ada(things=[Thing(no=1)]))
        session.flush()
        if what == "strict":
            session.add(Strict(owner_name="Ada"))
        elif what == "locator":
            session.add(Letter(owner_name="Ada"))
        elif what == "taken":
            session.add(Owner(name=new, data=None))
            expected = sa_exc.IntegrityError
        session.commit()
        if what == "trigger":
            servers.run(
                "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql"
                " AS 'BEGIN RETURN NEW; END'; CREATE TRIGGER nothing BEFORE UPDATE"
                " ON owner FOR EACH ROW EXECUTE FUNCTION nothing()"
            )
        elif what == "undeclared":
            servers.run("CREATE TABLE more (o text REFERENCES owner ON UPDATE CASCADE)")
            with servers.connect(both.cluster.shard_for(Owner, "Ada")) as connection:
                connection.execute("INSERT INTO more VALUES ('Ada')")
        before = both.everything(session)
        owner = session.get_one(Owner, "Ada")
        owner.name = new
        with pytest.raises(expected):
            session.flush()
        session.rollback()
        assert owner.name == "Ada"
        assert both.everything(session) == before


async def test_an_async_session_moves_rows(both: Both) -> None:
    new, _ = names_elsewhere(both.cluster)
    AsyncSession = both.cluster.async_sessionmaker(expire_on_commit=False)
    async with AsyncSession() as session:
        session.add(owner := ada(things=[Thing(no=1)]))
        await session.commit()
        owner.name = new
        await session.commit()
    async with AsyncSession() as session:
        assert (await session.get_one(Thing, (new, 1))).owner_name == new
    await both.cluster.aclose()
