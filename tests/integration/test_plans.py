"""What a plan says, what each shard is sent for it, and what may stand around it.

The same rows are kept in one plain database and in a cluster of four shards whose
engines are the tests' own, so that they see every statement that a shard is sent.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import BigInteger, create_engine, event, func, make_url, select
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
)

from shardalchemy import Cluster, ShardedSession, reference_table, sharded_by
from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.local import LocalCluster
from shardalchemy.planner import Plan, PlanKind


class Colour(enum.Enum):
    red = 1
    blue = 2


class Kelvin(sa.TypeDecorator[float]):
    """Degrees that are kept in another unit; SQLAlchemy is not to cache it."""

    impl = sa.Float
    cache_ok = False

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value + 273.0

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value - 273.0


class Named(sa.types.UserDefinedType[Any]):
    """A type of the application; a value is what the driver makes of it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.cast(bindvalue, self)


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "pl_countries"
    __table_args__ = {"info": reference_table()}
    code: Mapped[str] = mapped_column(primary_key=True)


class Owner(Base):
    __tablename__ = "pl_owners"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    rank: Mapped[int]
    country_code: Mapped[str | None] = mapped_column(sa.ForeignKey(Country.code))
    country: Mapped[Country | None] = relationship()
    pets: Mapped[list[Pet]] = relationship(
        back_populates="owner", order_by=lambda: Pet.id
    )


class Pet(Base):
    __tablename__ = "pl_pets"
    __table_args__ = {"info": sharded_by("owner_id")}
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(Owner.id), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    born: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True))
    owner: Mapped[Owner] = relationship(back_populates="pets")


class Thing(Base):
    """One column of each type; what a shard tells of them is what another reads."""

    __tablename__ = "pl_things"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    five: Mapped[str | None] = mapped_column(sa.CHAR(5))
    one: Mapped[str | None] = mapped_column(sa.CHAR())
    bits: Mapped[str | None] = mapped_column(pg.BIT(3))
    varbits: Mapped[str | None] = mapped_column(pg.BIT(varying=True))
    numbers: Mapped[list[int | None] | None] = mapped_column(pg.ARRAY(sa.Integer))
    texts: Mapped[list[str | None] | None] = mapped_column(pg.ARRAY(sa.Text))
    square: Mapped[list[list[int]] | None] = mapped_column(
        pg.ARRAY(sa.Integer, dimensions=2)
    )
    fives: Mapped[list[str] | None] = mapped_column(pg.ARRAY(sa.CHAR(5)))
    colour: Mapped[Colour | None] = mapped_column(sa.Enum(Colour, name="pl_colour"))
    colours: Mapped[list[Colour] | None] = mapped_column(
        pg.ARRAY(sa.Enum(Colour, name="pl_colour"))
    )
    share: Mapped[int | None] = mapped_column(Named("pl_share"))
    span: Mapped[Any | None] = mapped_column(pg.INT4RANGE)
    spans: Mapped[Any | None] = mapped_column(pg.INT8MULTIRANGE)
    period: Mapped[Any | None] = mapped_column(pg.TSTZRANGE)
    document: Mapped[Any | None] = mapped_column(pg.JSONB)
    written: Mapped[Any | None] = mapped_column(sa.JSON)
    price: Mapped[decimal.Decimal | None] = mapped_column(sa.Numeric)
    exact: Mapped[decimal.Decimal | None] = mapped_column(sa.Numeric(10, 3))
    real: Mapped[float | None] = mapped_column(sa.REAL)
    double: Mapped[float | None] = mapped_column(sa.Double)
    moment: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    local: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime())
    day: Mapped[datetime.date | None]
    hour: Mapped[datetime.time | None] = mapped_column(sa.Time(timezone=True))
    took: Mapped[datetime.timedelta | None] = mapped_column(sa.Interval)
    raw: Mapped[bytes | None]
    key: Mapped[uuid.UUID | None]
    address: Mapped[Any | None] = mapped_column(pg.INET)
    vector: Mapped[Any | None] = mapped_column(pg.TSVECTOR)
    yes: Mapped[bool | None]
    in_c: Mapped[str | None] = mapped_column(sa.Text(collation="C"))
    heat: Mapped[float | None] = mapped_column(Kelvin())


class Paired(Base):
    """A column of a composite type, before another one."""

    __tablename__ = "pl_paired"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    pair: Mapped[str | None] = mapped_column(Named("pl_pair"))
    name: Mapped[str]


class Odd(Base):
    """Names of columns that have to be quoted, or that a driver would read."""

    __tablename__ = "pl_Odd table"
    __table_args__ = {"info": sharded_by("Id")}
    id: Mapped[int] = mapped_column(
        "Id", BigInteger, primary_key=True, autoincrement=False
    )
    keyword: Mapped[int] = mapped_column("select")
    mixed: Mapped[int] = mapped_column("mixedCase")
    percent: Mapped[int] = mapped_column("100% (s)")
    placeholder: Mapped[int] = mapped_column("%(x)s")
    quoted: Mapped[int] = mapped_column('the "best"')
    apostrophe: Mapped[int] = mapped_column("it's")
    spaced: Mapped[int] = mapped_column("a b:c")


class Empty(Base):
    __tablename__ = "pl_empties"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    v: Mapped[int | None]


class OtherBase(DeclarativeBase):
    metadata = sa.MetaData(schema="other")


class Elsewhere(OtherBase):
    __tablename__ = "pl_owners"  # the name of a table of the first schema too
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    v: Mapped[int]


ODD = [
    Odd.keyword,
    Odd.mixed,
    Odd.percent,
    Odd.placeholder,
    Odd.quoted,
    Odd.apostrophe,
    Odd.spaced,
]
PREPARE = """
    CREATE SCHEMA IF NOT EXISTS other;
    CREATE TYPE pl_pair AS (a integer, b text);
    CREATE DOMAIN pl_share AS integer CHECK (VALUE BETWEEN 0 AND 100);
"""
NOON = datetime.datetime(2024, 3, 10, 12, tzinfo=datetime.UTC)
THINGS: list[dict[str, Any]] = [
    {},
    {
        "five": "ab",
        "one": "x",
        "bits": "101",
        "varbits": "1",
        "numbers": [1, None, 3],
        "texts": ["a,b", 'q"u', "{}", "", None, "NULL", "back\\slash"],
        "square": [[1, 2], [3, 4]],
        "fives": ["a", "abcde"],
        "colour": Colour.red,
        "colours": [Colour.blue, Colour.red],
        "share": 50,
        "span": pg.Range(1, 5),
        "spans": [pg.Range(1, 5), pg.Range(7, 9)],
        "period": pg.Range(NOON, None),
        "document": {"a": [1, None, 'x"y'], "b": {"c": 1.50}},
        "written": {"z": 1, "a": [True]},
        "price": decimal.Decimal("1.500"),
        "exact": decimal.Decimal("7"),
        "real": 0.1,
        "double": 0.1,
        "moment": NOON,
        "local": datetime.datetime(2024, 3, 10, 2, 30, 0, 123456),
        "day": datetime.date(1, 1, 1),
        "hour": datetime.time(1, 2, 3, tzinfo=datetime.UTC),
        "took": datetime.timedelta(days=40, seconds=1, microseconds=1),
        "raw": b"\x00\\'\"\xff",
        "key": uuid.UUID(int=7),
        "address": "10.0.0.1",
        "vector": "'cat':1 'dog':2",
        "yes": True,
        "in_c": "B",
        "heat": 20.5,
    },
    {
        "five": "     ",
        "one": " ",
        "bits": "000",
        "varbits": "",
        "numbers": [],
        "texts": [],
        "square": [],
        "fives": [],
        "colour": Colour.blue,
        "colours": [],
        "share": 0,
        "span": pg.Range(empty=True),
        "spans": [],
        "period": pg.Range(empty=True),
        "document": [],
        "written": [],
        "price": decimal.Decimal("NaN"),
        "exact": decimal.Decimal("-0.001"),
        "real": float("inf"),
        "double": -0.0,
        "moment": NOON - datetime.timedelta(days=9),
        "took": datetime.timedelta(days=-1, seconds=1),
        "raw": b"",
        "address": "::1",
        "yes": False,
        "in_c": "a",
        "heat": -3.5,
    },
    {"numbers": [1, 2, 3, 4, 5, 6], "in_c": "", "document": "text", "five": ""},
]


class Sent(NamedTuple):
    """A statement that a server was sent."""

    shard: str
    sql: str
    params: Any


class Twins:
    """One plain database and a cluster with the same rows."""

    def __init__(self, servers: LocalCluster) -> None:
        name = f"plans_{uuid.uuid4().hex[:8]}"
        self.urls = {
            shard: make_url(url).set(database=name)
            for shard, url in servers.urls.items()
        }
        one_url = make_url(servers.urls["s1"]).set(database=f"{name}_one")
        for url in [*self.urls.values(), one_url]:
            with connected(url.set(database="postgres")) as connection:
                connection.execute(f'CREATE DATABASE "{url.database}"')
            with connected(url) as connection:
                connection.execute(PREPARE)
        self.engines = {
            s: create_engine(url, json_serializer=sorted_json)
            for s, url in self.urls.items()
        }
        self.one_engine = create_engine(one_url, json_serializer=sorted_json)
        self.cluster = Cluster(self.engines)
        self.one = sessionmaker(self.one_engine)
        self.four = self.cluster.sessionmaker()
        for metadata in (Base.metadata, OtherBase.metadata):
            self.cluster.create_all(metadata)
            metadata.create_all(self.one_engine)
        for maker in (self.one, self.four):
            with maker.begin() as session:
                session.add_all(rows())

    def close(self) -> None:
        self.cluster.close()
        for engine in [*self.engines.values(), self.one_engine]:
            engine.dispose()

    def compare(self, work: Callable[[Any], Any]) -> Any:
        """Assert that *work* gives the same over both; return it."""
        with self.one() as session:
            expected = work(session)
        with self.four() as session:
            found = work(session)
        assert found == expected
        return found

    def same(self, statement: Any, kind: PlanKind) -> list[Any]:
        """Assert that *statement* is of *kind*, and gives the same rows over both."""
        with self.four() as session:
            assert session.explain(statement).kind is kind
        found: list[Any] = self.compare(lambda s: typed(s.execute(statement)))
        return found

    @contextmanager
    def listening(self) -> Iterator[list[Sent]]:
        """Note what each shard is sent."""
        sent: list[Sent] = []
        listeners = []
        for shard, engine in self.engines.items():

            def note(
                conn: Any, cursor: Any, sql: str, params: Any, *_: Any, at: str = shard
            ) -> None:
                sent.append(Sent(at, sql, params))

            event.listen(engine, "before_cursor_execute", note)
            listeners.append((engine, note))
        try:
            yield sent
        finally:
            for engine, note in listeners:
                event.remove(engine, "before_cursor_execute", note)


def connected(url: sa.URL) -> psycopg.Connection[Any]:
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


def sorted_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def rows() -> list[Any]:
    return [
        Country(code="at"),
        Country(code="pe"),
        *(
            Owner(
                id=n,
                name="nopq"[n % 4] * (n % 3),
                rank=n * 7 % 40,
                country_code=(None, "at", "pe")[n % 3],
                pets=[
                    Pet(id=m, born=NOON + datetime.timedelta(days=m))
                    for m in range(n % 4)
                ],
            )
            for n in range(40)
        ),
        *(Thing(id=n, **given) for n, given in enumerate(THINGS * 3)),
        *(
            Odd(id=n, **{c.key: n * k % 7 for k, c in enumerate(ODD, 1)})
            for n in range(30)
        ),
        *(
            Paired(id=n, name=f"n{n}", pair=pair)
            for n, pair in enumerate([None, '(1,"a ""b"",c")', "(,)", "(2,)"] * 3)
        ),
        *(Elsewhere(id=n, v=n % 5) for n in range(20)),
    ]


def typed(result: Any) -> list[Any]:
    """Return rows with the types of their values, and what NaN is equal to."""
    return [tuple((type(v), repr(v)) for v in row) for row in result]


@pytest.fixture(scope="module")
def twins(shard_servers: LocalCluster) -> Iterator[Twins]:
    made = Twins(shard_servers)
    yield made
    made.close()


@pytest.fixture
def session(twins: Twins) -> Iterator[ShardedSession]:
    with twins.four() as session:
        yield session


# -- one statement of each kind --------------------------------------------------------


def routed() -> Any:
    return select(Owner.name).where(Owner.id == 7)


def scattered() -> Any:
    return select(Owner.id).where(Owner.rank > 10)


def combined() -> Any:
    return select(Owner.id, Owner.rank).order_by(Owner.rank, Owner.id).limit(5)


def gathered() -> Any:
    other = sa.orm.aliased(Owner, name="other")
    return (
        select(Owner.id, func.count(), func.max(Pet.born))
        .join(other, other.rank == Owner.id)
        .join(Pet, Pet.owner_id == Owner.id)
        .group_by(Owner.id)
        .order_by(func.count().desc(), Owner.id)
    )


def test_a_route_names_its_shard_and_why(session: ShardedSession, twins: Twins) -> None:
    plan = session.explain(routed())
    owner = twins.cluster.shard_for(Owner, 7)
    assert (plan.kind, plan.shards, plan.pieces) == (PlanKind.ROUTE, (owner,), ())
    assert str(plan) == f"Route to {owner}: owns every key that the statement pins"


def test_a_scatter_names_its_shards_and_why(
    session: ShardedSession, twins: Twins
) -> None:
    plan = session.explain(scattered())
    shards = twins.cluster.topology.shards
    assert (plan.kind, plan.shards, plan.pieces) == (PlanKind.SCATTER, shards, ())
    assert str(plan).splitlines() == [
        f"Scatter to {len(shards)} shards, rows concatenated",
        *(f"  -> {shard}: nothing pins the shard key" for shard in shards),
    ]


def test_a_combined_plan_has_a_piece_and_what_is_done_with_its_rows(
    session: ShardedSession, twins: Twins
) -> None:
    plan = session.explain(combined())
    assert plan.kind is PlanKind.COMBINE
    (piece,) = plan.pieces
    assert piece.shards == twins.cluster.topology.shards
    assert plan.shards[0] in piece.shards
    assert "ORDER BY pl_owners.rank, pl_owners.id" in piece.sql
    assert "LIMIT" in piece.sql
    assert str(plan).splitlines() == [
        f"Combine on {plan.shards[0]}: ORDER BY, LIMIT",
        f"  -> {piece.name}: {piece.title}, on {', '.join(piece.shards)}"
        " (nothing pins the shard key)",
        *(f"       {line}" for line in piece.sql.splitlines()),
    ]


def test_a_piece_of_pinned_rows_is_for_their_shards_alone(
    session: ShardedSession, twins: Twins
) -> None:
    keys = [3, 4]
    shards = {twins.cluster.shard_for(Owner, key) for key in keys}
    plan = session.explain(combined().where(Owner.id.in_(keys)))
    if len(shards) > 1:
        assert plan.kind is PlanKind.COMBINE
        assert set(plan.pieces[0].shards) == shards
        assert set(plan.shards) <= shards


def test_a_gathered_plan_has_a_piece_for_each_table(session: ShardedSession) -> None:
    plan = session.explain(gathered())
    assert plan.kind is PlanKind.GATHER
    assert len(plan.pieces) > 1
    assert len({piece.name for piece in plan.pieces}) == len(plan.pieces)
    assert all(piece.title.startswith("rows of pl_") for piece in plan.pieces)
    assert all(piece.sql.startswith("SELECT") for piece in plan.pieces)
    first, *lines = str(plan).splitlines()
    assert first.startswith(f"Gather on {plan.shards[0]}: ")
    assert first.endswith(" over the rows of all shards")
    heads = [line for line in lines if line.startswith("  -> ")]
    assert [h.split(":")[0] for h in heads] == [f"  -> {p.name}" for p in plan.pieces]


MADE = [routed, scattered, combined, gathered]


@pytest.mark.parametrize("make", MADE)
async def test_an_async_session_explains_and_answers_alike(
    twins: Twins, make: Callable[[], Any]
) -> None:
    with twins.four() as session:
        expected = session.explain(make())
        rows = sorted(session.execute(make()).all())
    urls = {s: u.render_as_string(hide_password=False) for s, u in twins.urls.items()}
    async with Cluster(urls) as cluster, cluster.async_sessionmaker()() as session:
        plan: Plan = await session.explain(make())
        assert str(plan) == str(expected)
        assert plan == expected
        assert sorted((await session.execute(make())).all()) == rows
        assert sorted(await (await session.stream(make())).all()) == rows


@pytest.mark.parametrize("make", MADE)
def test_explaining_runs_nothing(twins: Twins, make: Callable[[], Any]) -> None:
    with twins.four() as session:
        session.explain(scattered())  # the topology is known from here on
        with twins.listening() as sent:
            session.explain(make())
        assert [s for s in sent if "pl_" in s.sql] == []


@pytest.mark.parametrize("make", [combined, gathered])
def test_the_answer_is_that_of_one_server(
    twins: Twins, make: Callable[[], Any]
) -> None:
    for _ in range(2):
        assert twins.compare(lambda s: s.execute(make()).all())


# -- what a shard is sent --------------------------------------------------------------


def keys_sent(sent: list[Sent], wanted: range) -> Mapping[str, set[int]]:
    """Return the keys among all parameters of the statements that read owners."""
    found: dict[str, set[int]] = {}
    for shard, sql, params in sent:
        if "FROM pl_owners" in sql and "probed" not in sql:
            values = params.values() if isinstance(params, Mapping) else params
            flat = [v for p in values for v in (p if isinstance(p, list) else [p])]
            keys = {v for v in flat if isinstance(v, int) and v in wanted}
            found.setdefault(shard, set()).update(keys)
    return found


@pytest.mark.parametrize("kind", [PlanKind.SCATTER, PlanKind.COMBINE, PlanKind.GATHER])
@pytest.mark.parametrize("again", [False, True])
def test_of_a_thousand_keys_a_shard_is_sent_its_own(
    twins: Twins, session: ShardedSession, kind: PlanKind, again: bool
) -> None:
    wanted = range(200_000, 201_000)
    statement = {
        PlanKind.SCATTER: select(Owner.id).where(Owner.id.in_(wanted)),
        PlanKind.COMBINE: select(func.count(Owner.name)).where(Owner.id.in_(wanted)),
        PlanKind.GATHER: select(Owner.id)
        .where(Owner.id.in_(wanted))
        .where(Owner.rank.in_(select(Pet.id).where(Pet.id > 2))),
    }[kind]
    assert session.explain(statement).kind is kind
    if again:
        session.execute(statement).all()
    with twins.listening() as sent:
        session.execute(statement).all()
    found = keys_sent(sent, wanted)
    assert found.keys() == set(twins.cluster.topology.shards)
    for shard, keys in found.items():
        assert {twins.cluster.shard_for(Owner, key) for key in keys} == {shard}
    assert set().union(*found.values()) == set(wanted)


def test_lists_of_any_length_find_their_rows(twins: Twins) -> None:
    for keys in ([], [1], [1, 2], list(range(30)), [3], [5, 5, None, 5000], [38, 39]):
        chosen = Owner.id.in_(keys)
        for statement in (
            select(Owner.id).where(chosen).order_by(Owner.rank),
            select(func.count(), func.sum(Owner.rank)).where(chosen),
            select(Owner.id)
            .where(chosen, Owner.rank.in_(select(Pet.id)))
            .order_by(Owner.id),
        ):
            twins.compare(lambda s, q=statement: s.execute(q).all())


def test_what_is_not_asked_for_is_not_fetched(
    twins: Twins, session: ShardedSession
) -> None:
    session.execute(combined()).all()
    with twins.listening() as sent:
        assert len(session.execute(combined()).all()) == 5
    fetched = [s for s in sent if "FROM pl_owners" in s.sql]
    assert len(fetched) == len(twins.cluster.topology.shards)
    assert all("name" not in s.sql and "LIMIT" in s.sql for s in fetched)
    assert len(sent) == len(fetched) + 1


def test_a_gather_of_too_many_rows_is_refused_and_the_transaction_goes_on(
    twins: Twins, session: ShardedSession
) -> None:
    session.add(Owner(id=1000, name="new", rank=1))
    session.flush()
    with pytest.raises(UnsupportedQueryError) as caught:
        session.execute(gathered(), execution_options={"gather_max_rows": 10})
    message = str(caught.value)
    assert "more than 10 rows on one shard" in message
    assert "rows of pl_" in message
    assert "execution_options(gather_max_rows=…)" in message
    assert "Cluster(gather_max_rows=…)" in message
    assert session.get_one(Owner, 1000).name == "new"
    assert session.scalar(select(func.count(Owner.id))) == 41
    assert session.execute(gathered()).all()
    own = gathered().execution_options(gather_max_rows=10)
    with pytest.raises(UnsupportedQueryError, match="more than 10 rows"):
        session.execute(own)
    session.rollback()
    few = Cluster(twins.engines, gather_max_rows=10)
    with few.sessionmaker()() as other:
        with pytest.raises(UnsupportedQueryError, match="more than 10 rows"):
            other.execute(gathered())
        assert other.execute(
            gathered(), execution_options={"gather_max_rows": 1000}
        ).all()


# -- one transaction -------------------------------------------------------------------


def test_now_is_one_moment_on_every_shard_and_throughout_a_transaction(
    twins: Twins, session: ShardedSession
) -> None:
    def moments() -> list[Any]:
        statements = (
            select(func.count()).where(Pet.born < func.now()),
            select(func.max(func.now())).where(Pet.owner_id > 0),
            select(func.now(), Pet.owner_id).order_by(Pet.id, Pet.owner_id).limit(50),
            select(func.now())
            .select_from(Owner)
            .where(Owner.rank.in_(select(Pet.id).where(Pet.born < func.now()))),
        )
        return [session.execute(s).all() for s in statements]

    def of(found: list[Any]) -> set[Any]:
        times = [row[0] for rows in found[1:] for row in rows]
        assert len(times) > 10
        return set(times)

    first = moments()
    for shard in twins.cluster.topology.shards:
        options = {"shard": shard}
        session.execute(sa.text("SELECT pg_sleep(0.01)"), execution_options=options)
    assert len(of(first) | of(moments())) == 1
    assert first[0][0][0] > 0
    session.rollback()
    assert len(of(first) | of(moments())) == 2


def test_a_row_of_this_moment_is_before_the_next_and_not_before_it(
    session: ShardedSession,
) -> None:
    """Each shard compares with one moment, not with when it was reached."""
    soon = func.now() + datetime.timedelta(milliseconds=1)
    born = session.execute(select(func.now())).scalar_one()
    owners = session.scalars(select(Owner).order_by(Owner.id)).all()
    for owner in owners:
        owner.pets.append(Pet(id=99, born=born + datetime.timedelta(microseconds=500)))
    new = select(func.count()).where(Pet.id == 99)
    moment = session.scalar(select(func.max(func.now())).where(Pet.id == 99))
    assert moment is not None
    for owner in owners:
        owner.pets[-1].born = moment
    assert session.scalar(new.where(Pet.born == func.now())) == 40
    assert session.scalar(new.where(Pet.born < func.now())) == 0
    assert session.scalar(new.where(Pet.born < soon)) == 40
    session.rollback()


@pytest.mark.parametrize("listened", [False, True])
def test_a_statement_sees_what_its_own_transaction_wrote(
    twins: Twins, listened: bool
) -> None:
    maker = twins.cluster.sessionmaker()
    plain = sessionmaker(twins.one_engine)
    seen: list[bool] = []
    if listened:
        for one in (maker, plain):
            event.listen(one, "do_orm_execute", lambda s: seen.append(s.is_select))

    def work(session: Any) -> list[Any]:
        found = []
        for write in (None, "pending", "core", "deleted"):
            if write == "pending":  # by autoflush, before each of the statements
                session.add_all(Owner(id=n, name="z", rank=0) for n in range(50, 60))
            elif write == "core":
                low = sa.update(Owner).where(Owner.id < 20).values(rank=Owner.rank + 1)
                session.execute(low, execution_options={"synchronize_session": False})
            elif write == "deleted":
                for owner in session.scalars(select(Owner).where(Owner.id >= 55)):
                    session.delete(owner)
            found += [
                session.execute(combined()).all(),
                session.execute(gathered()).all(),
                session.scalar(select(func.count(Owner.id))),
            ]
        session.rollback()
        return [*found, session.execute(combined()).all()]

    with plain() as session:
        expected = work(session)
    before, seen[:] = seen[:], []
    with maker() as session:
        assert work(session) == expected
    assert expected[0] == expected[-1] != expected[3]
    assert seen == before


def test_a_statement_may_be_told_not_to_flush(session: ShardedSession) -> None:
    session.add(Owner(id=2000, name="z", rank=0))
    for statement in (select(func.count(Owner.id)), gathered()):
        session.execute(statement, execution_options={"autoflush": False})
    with session.no_autoflush:
        assert session.scalar(select(func.count(Owner.id))) == 40
    assert session.scalar(select(func.count(Owner.id))) == 41


# -- the ORM around a statement --------------------------------------------------------


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("option", [selectinload, subqueryload, joinedload])
def test_what_an_ordered_page_loads_with_it(
    twins: Twins, option: Any, listened: bool
) -> None:
    maker = twins.cluster.sessionmaker()
    if listened:
        event.listen(maker, "do_orm_execute", lambda _: None)
    page = select(Owner).order_by(Owner.rank.desc(), Owner.id).limit(9).offset(3)
    page = page.options(option(Owner.pets), option(Owner.country))

    def work(session: Any) -> list[Any]:
        found = session.scalars(page).unique().all()
        assert not any({"pets", "country"} & sa.inspect(o).unloaded for o in found)
        return [
            (o.id, o.country and o.country.code, [p.id for p in o.pets]) for o in found
        ]

    with twins.one() as session:
        expected = work(session)
    with maker() as session:
        for _ in range(2):
            assert work(session) == expected
            session.expunge_all()
    assert any(pets for _, _, pets in expected)


@pytest.mark.parametrize("kind", [PlanKind.SCATTER, PlanKind.GATHER])
@pytest.mark.parametrize("option", [selectinload, subqueryload, joinedload])
def test_what_another_statement_loads_with_it(
    twins: Twins, session: ShardedSession, option: Any, kind: PlanKind
) -> None:
    statement = {
        PlanKind.SCATTER: select(Owner).where(Owner.rank < 20),
        PlanKind.GATHER: select(Owner).where(Owner.rank.in_(select(Pet.id))),
    }[kind].options(option(Owner.pets), option(Owner.country))
    if option is not joinedload:  # which orders by the pets
        assert session.explain(statement).kind is kind

    def work(session: Any) -> list[Any]:
        return [
            (o.id, o.country and o.country.code, [p.id for p in o.pets])
            for o in sorted(session.scalars(statement).unique(), key=lambda o: o.id)
        ]

    assert twins.compare(work)


def test_a_listener_may_rewrite_what_is_combined(twins: Twins) -> None:
    maker = twins.cluster.sessionmaker()

    @event.listens_for(maker, "do_orm_execute")
    def only_low(state: Any) -> None:
        if state.is_select and not state.is_relationship_load:
            state.statement = state.statement.options(
                sa.orm.with_loader_criteria(Owner, Owner.id < 10)
            )

    with maker() as session:
        assert session.scalar(select(func.count(Owner.id))) == 10
        found = session.scalars(select(Owner).order_by(Owner.id.desc())).all()
        assert [o.id for o in found] == list(range(9, -1, -1))
        assert all(row[0] < 10 for row in session.execute(gathered()))


def test_a_result_is_read_in_every_shape(twins: Twins) -> None:
    def work(session: Any) -> list[Any]:
        shapes: list[Any] = []
        for make in (combined, gathered):
            statement = make()
            shapes += [
                list(session.execute(statement).keys()),
                [dict(m) for m in session.execute(statement).mappings()],
                session.execute(statement).first(),
                session.scalars(statement).all(),
                session.scalar(statement),
                session.execute(statement).fetchmany(2),
                [
                    list(p)
                    for p in session.execute(
                        statement, execution_options={"yield_per": 2}
                    ).partitions()
                ],
            ]
        return shapes

    twins.compare(work)


# -- values on their way ---------------------------------------------------------------

COLUMNS = [c for c in sa.inspect(Thing).column_attrs if c.key != "id"]


@pytest.mark.parametrize("column", [c.key for c in COLUMNS])
def test_values_of_every_type_come_back_as_they_were(twins: Twins, column: str) -> None:
    value = getattr(Thing, column)
    low = select(Owner.rank).where(Owner.id < 39)
    page = select(Thing.id, value).order_by(Thing.id).limit(11)
    kept = select(Thing.id, value).where(Thing.id.in_(low)).order_by(Thing.id)
    entities = select(Thing).where(Thing.id.in_(low)).order_by(Thing.id)
    assert len(twins.same(page, PlanKind.COMBINE)) == 11
    assert len(twins.same(kept, PlanKind.GATHER)) > 5
    twins.compare(
        lambda s: [repr(getattr(thing, column)) for thing in s.scalars(entities)]
    )


COMPARED = [c.key for c in COLUMNS if c.key not in ("written", "spans", "colours")]


@pytest.mark.parametrize("column", COMPARED)
def test_values_are_compared_as_their_type_says(twins: Twins, column: str) -> None:
    value = getattr(Thing, column)
    ordered = select(value, Thing.id).order_by(value, Thing.id)
    last = select(value, Thing.id).order_by(value.desc().nulls_last(), Thing.id)
    groups = select(value, func.count()).group_by(value).order_by(value)
    distinct = select(value).distinct().order_by(value)
    twins.same(ordered.limit(7), PlanKind.COMBINE)
    twins.same(last.limit(7), PlanKind.COMBINE)
    twins.compare(lambda s: typed(s.execute(groups)))
    twins.compare(lambda s: typed(s.execute(distinct)))


def test_values_of_a_composite_type_come_back_as_they_were(twins: Twins) -> None:
    inside = Paired.id.in_(select(Owner.rank))
    page = select(Paired.id, Paired.pair, Paired.name).order_by(Paired.id)
    twins.same(page, PlanKind.COMBINE)
    twins.same(page.order_by(None).order_by(Paired.pair, Paired.id), PlanKind.COMBINE)
    twins.same(page.where(inside), PlanKind.GATHER)
    groups = select(Paired.pair, func.count()).group_by(Paired.pair)
    twins.same(groups.order_by(Paired.pair), PlanKind.COMBINE)


def test_arrays_of_unequal_lengths_are_aggregated(twins: Twins) -> None:
    numbers = select(func.array_agg(pg.aggregate_order_by(Thing.id, Thing.id.desc())))
    twins.same(numbers, PlanKind.GATHER)
    unnested = select(Thing.id, func.unnest(Thing.numbers).label("n")).subquery()
    total = select(func.sum(unnested.c.n), func.count(unnested.c.n), func.count())
    twins.compare(lambda s: typed(s.execute(total.select_from(unnested))))


def test_a_type_that_is_not_cached_follows_its_parameters(twins: Twins) -> None:
    for heat in (20.5, -3.5, 1.0):
        kept = select(Thing.id, Thing.heat).where(Thing.heat == heat)
        in_ranks = kept.where(Thing.id.in_(select(Owner.rank)))
        twins.same(kept.order_by(Thing.id), PlanKind.COMBINE)
        twins.same(in_ranks.order_by(Thing.id), PlanKind.GATHER)
        twins.same(
            select(func.max(Thing.heat)).where(Thing.heat > heat), PlanKind.COMBINE
        )


def test_a_shards_own_json_serializer_is_used(twins: Twins) -> None:
    """The engines write JSON with sorted keys; as text that is seen."""

    def work(session: Any) -> Any:
        session.add(Thing(id=700, written={"z": 1, "a": 2}))
        written = sa.cast(Thing.written, sa.Text)
        found = session.scalars(
            select(written).where(Thing.id.in_([700, 1])).order_by(Thing.id)
        ).all()
        document = sa.literal({"b": 1, "a": 2}, sa.JSON)
        top = select(Thing.id, document).order_by(Thing.id.desc()).limit(1)
        found += typed(session.execute(top))
        return found

    found = twins.compare(work)
    assert '{"a": 2, "z": 1}' in found


def test_text_is_ordered_by_the_collation_that_is_asked_for(twins: Twins) -> None:
    words = ["b", "B", "a", "A", "_", "ä", "a b", "ab", "", "Z"]

    def work(session: Any) -> Any:
        session.add_all(Owner(id=3000 + n, name=w, rank=n) for n, w in enumerate(words))
        session.add_all(
            Thing(id=3000 + n, in_c=w, five=w[:5]) for n, w in enumerate(words)
        )
        new = Owner.id >= 3000
        found = []
        for term in (
            Owner.name,
            Owner.name.collate("C"),
            func.lower(Owner.name).collate("C"),
            Owner.name.collate("default"),
            Owner.name.desc(),
        ):
            page = select(Owner.name).where(new).order_by(term, Owner.id)
            found.append(session.scalars(page.limit(9)).all())
            inside = Owner.rank.in_(select(Thing.id - 3000))
            found.append(session.scalars(page.where(inside)).all())
        for term in (Thing.in_c, Thing.in_c.collate("default"), Thing.five):
            page = select(Thing.in_c).where(Thing.id >= 3000)
            found.append(session.scalars(page.order_by(term, Thing.id)).all())
        found.append(session.execute(select(func.max(Thing.in_c))).all())
        found.append(session.execute(select(func.min(Owner.name)).where(new)).all())
        session.rollback()
        return found

    found = twins.compare(work)
    assert found[2] == sorted(words)[:9]


# -- shapes of tables ------------------------------------------------------------------


def test_empty_shards_have_no_rows(twins: Twins) -> None:
    for statement in (
        select(func.count(), func.max(Empty.id), func.sum(Empty.v)).select_from(Empty),
        select(Empty.v, func.count()).group_by(Empty.v),
        select(Empty.id).order_by(Empty.id).limit(3),
        select(Empty.id, func.row_number().over(order_by=Empty.id)),
        select(Owner.id).where(Owner.id.in_(select(Empty.v))),
        select(func.count(Owner.id)).where(Owner.rank.not_in(select(Empty.v))),
        select(sa.exists().where(Empty.id > 0)),
    ):
        twins.compare(lambda s, q=statement: typed(s.execute(q)))


def test_a_row_on_one_shard_alone(twins: Twins) -> None:
    def work(session: Any) -> Any:
        session.add(Empty(id=1, v=5))
        found = [
            session.execute(q).all()
            for q in (
                select(Empty).with_only_columns(Empty.id, Empty.v).order_by(Empty.id),
                select(func.count(), func.avg(Empty.v)),
                select(Owner.id).where(Owner.id.in_(select(Empty.v))),
            )
        ]
        session.rollback()
        return found

    assert twins.compare(work)[2] == [(5,)]


@pytest.mark.parametrize("column", ODD, ids=lambda c: c.key)
def test_names_of_columns_that_have_to_be_quoted(twins: Twins, column: Any) -> None:
    inside = Odd.id.in_(select(Owner.rank))
    label = column.label(column.property.columns[0].name)
    for statement in (
        select(Odd.id, column).order_by(column.desc(), Odd.id).limit(9),
        select(column, func.count()).group_by(column).order_by(column),
        select(column, func.sum(Odd.id))
        .where(inside)
        .group_by(column)
        .order_by(column),
        select(Odd.id, label).where(inside, column > 1).order_by(label, Odd.id),
        select(column).distinct().order_by(column.desc()),
        select(Odd.id, func.rank().over(order_by=column)).order_by(Odd.id),
        select(Odd.id).where(column.in_([1, 2, 3])).order_by(column, Odd.id),
    ):
        twins.compare(lambda s, q=statement: typed(s.execute(q)))
        twins.compare(lambda s, q=statement: list(s.execute(q).keys()))

    def objects(session: Any) -> Any:
        for where in (sa.true(), inside):
            page = select(Odd).where(where).order_by(column, Odd.id).limit(8)
            yield [(o.id, getattr(o, column.key)) for o in session.scalars(page)]

    twins.compare(lambda s: list(objects(s)))


def test_tables_of_another_schema(twins: Twins) -> None:
    v = Elsewhere.v
    for statement in (
        select(Elsewhere).with_only_columns(v, Elsewhere.id).order_by(v, Elsewhere.id),
        select(v, func.count()).group_by(v).order_by(v),
        select(Elsewhere.id).where(v.in_(select(Owner.rank))).order_by(Elsewhere.id),
        select(Owner.id, Elsewhere.v)
        .join(Elsewhere, Elsewhere.v == Owner.rank)
        .order_by(Owner.id, Elsewhere.id),
        select(Elsewhere.id, Owner.rank)
        .join(Owner, Owner.id == Elsewhere.id)
        .order_by(Owner.rank.desc(), Owner.id)
        .limit(6),
        select(func.max(Elsewhere.id) - func.min(Elsewhere.id)),
    ):
        assert twins.compare(lambda s, q=statement: typed(s.execute(q)))
