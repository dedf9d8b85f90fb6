"""Every statement means what it means on one PostgreSQL, or it is refused.

The same rows are kept twice: in one plain database, read through a plain ``Session``,
and in a cluster of four shards. A seeded generator makes statements; each must give
equal rows on both, or be refused by the cluster. ``python test_planner_differential.py
FIRST LAST`` searches more seeds than the suite has time for.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import itertools
import random
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    String,
    UniqueConstraint,
    and_,
    bindparam,
    case,
    cast,
    create_engine,
    delete,
    exists,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    make_url,
    not_,
    or_,
    select,
    tablesample,
    text,
    true,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    column_property,
    foreign,
    joinedload,
    mapped_column,
    relationship,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_loader_criteria,
    with_parent,
    with_polymorphic,
)

from shardalchemy import Cluster, locator_id, reference_table, sharded_by
from shardalchemy.errors import ShardAlchemyError, UnsupportedQueryError
from shardalchemy.ids import new_locator
from shardalchemy.local import LocalCluster
from shardalchemy.schema import placement_of

SEEDS = 8
STATEMENTS = 100  # a seed

pytestmark = pytest.mark.filterwarnings("ignore:.*cartesian product")


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "pd_countries"
    __table_args__ = {"info": reference_table()}
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    v: Mapped[int | None]
    customers: Mapped[list[Customer]] = relationship(
        primaryjoin=lambda: Country.code == foreign(Customer.country_code),
        viewonly=True,
        order_by=lambda: Customer.id,
    )


class Customer(Base):
    __tablename__ = "pd_customers"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str]
    v: Mapped[int | None]
    country_code: Mapped[str | None] = mapped_column(ForeignKey("pd_countries.code"))
    country: Mapped[Country | None] = relationship()
    orders: Mapped[list[Order]] = relationship(
        back_populates="customer", order_by=lambda: (Order.v, Order.id)
    )
    lines: Mapped[list[Line]] = relationship(
        primaryjoin=lambda: Customer.id == foreign(Line.customer_id),
        viewonly=True,
        order_by=lambda: (Line.no, Line.order_id),
    )


class Order(Base):
    __tablename__ = "pd_orders"
    __table_args__ = (
        UniqueConstraint("id", "customer_id"),
        {"info": sharded_by("customer_id")},
    )
    id: Mapped[uuid.UUID] = locator_id()
    customer_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("pd_customers.id"))
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("pd_orders.id"))
    v: Mapped[int | None]
    status: Mapped[str]
    placed: Mapped[datetime.date]
    customer: Mapped[Customer] = relationship(back_populates="orders")
    parent: Mapped[Order | None] = relationship(remote_side=lambda: Order.id)
    lines: Mapped[list[Line]] = relationship(
        back_populates="order", order_by=lambda: Line.no
    )
    same_status: Mapped[list[Line]] = relationship(
        primaryjoin=lambda: and_(
            foreign(Line.v) == Order.v, Line.customer_id.in_([1, 2, 3, 4])
        ),
        viewonly=True,
        order_by=lambda: (Line.no, Line.order_id),
    )


class Line(Base):
    __tablename__ = "pd_lines"
    __table_args__ = (
        ForeignKeyConstraint(
            ["order_id", "customer_id"], ["pd_orders.id", "pd_orders.customer_id"]
        ),
        {"info": sharded_by("customer_id")},
    )
    order_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]
    order: Mapped[Order] = relationship(back_populates="lines")


class Tag(Base):
    __tablename__ = "pd_tags"
    __table_args__ = {"info": sharded_by("tag")}
    tag: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[int | None] = mapped_column(BigInteger)
    v: Mapped[int | None]


class Party(Base):
    __tablename__ = "pd_parties"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    type: Mapped[str]
    v: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "type", "polymorphic_identity": "party"}


class Firm(Party):
    __tablename__ = "pd_firms"
    id: Mapped[int] = mapped_column(ForeignKey("pd_parties.id"), primary_key=True)
    vat: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "firm"}


class Note(Base):
    """A home table that refers to customers without a constraint."""

    __tablename__ = "pd_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int | None] = mapped_column(BigInteger)
    body: Mapped[str]
    customer: Mapped[Customer | None] = relationship(
        primaryjoin=lambda: foreign(Note.customer_id) == Customer.id, viewonly=True
    )


class CountedNote(Base):
    __table__ = Note.__table__
    customers = column_property(
        select(func.count(Customer.id))
        .where(Customer.id == Note.customer_id)
        .scalar_subquery(),
    )


class Code(sa.TypeDecorator[int]):
    """An int that is stored as text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> str | None:
        return None if value is None else f"c{value:03}"

    def process_result_value(self, value: str | None, dialect: Any) -> int | None:
        return None if value is None else int(value[1:])


class Gadget(Base):
    __tablename__ = "pd_gadgets"
    __table_args__ = {"info": sharded_by("code")}
    code: Mapped[int] = mapped_column(Code(20), primary_key=True)
    v: Mapped[int | None]


class Setting(Base):
    """A reference table whose columns have defaults."""

    __tablename__ = "pd_settings"
    __table_args__ = {"info": reference_table()}
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    v: Mapped[int | None]
    token: Mapped[uuid.UUID | None] = mapped_column(
        default=uuid.uuid4, onupdate=uuid.uuid4
    )
    touched: Mapped[str | None] = mapped_column(
        onupdate=func.md5(cast(func.random(), String))
    )


WORDS = ["a", "b", "B", "ä", "x y", "", "c001", "long" * 9]


def make_rows() -> dict[type[Base], list[dict[str, Any]]]:
    rng = random.Random(7)

    def v() -> int | None:
        return rng.choice([None, 1, 2, 3, 4, 5, 6])

    countries = [
        {"code": c, "name": n, "v": v()}
        for c, n in [("de", "D"), ("fr", "F"), ("it", "I"), ("xx", "D")]
    ]
    customers = [
        {"id": i, "name": rng.choice("nopq"), "v": v(), "country_code": c}
        for i in [*range(1, 10), -3, 2**40]
        for c in [rng.choice([None, "de", "fr", "it"])]
    ]
    pin = placement_of(Order.__table__).pin
    assert pin is not None
    orders: list[dict[str, Any]] = []
    for customer in customers[:-2]:
        mine: list[dict[str, Any]] = []
        for _ in range(rng.randrange(5)):
            slot = pin.slot(customer["id"])
            assert slot is not None
            mine.append(
                {
                    "id": new_locator(slot),
                    "customer_id": customer["id"],
                    "parent_id": rng.choice([None, *(m["id"] for m in mine)]),
                    "v": v(),
                    "status": rng.choice(["new", "paid"]),
                    "placed": datetime.date(2024, 1, rng.randrange(1, 9)),
                }
            )
        orders += mine
    lines = [
        {"order_id": o["id"], "no": no, "customer_id": o["customer_id"], "v": v()}
        for o in orders
        for no in range(rng.randrange(4))
    ]
    tags = [
        {"tag": w, "customer_id": rng.choice([None, 1, 2, 3, 99]), "v": v()}
        for w in WORDS
    ]
    parties = [{"id": i, "type": "party", "v": v()} for i in range(1, 5)]
    firms = [{"id": i, "v": v(), "vat": f"V{i % 3}"} for i in range(5, 10)]
    notes = [{"id": i, "customer_id": i % 7, "body": "b"} for i in range(1, 9)]
    gadgets = [{"code": i, "v": v()} for i in range(1, 9)]
    settings = [{"id": i, "v": v(), "token": None} for i in range(1, 4)]
    return {
        Country: countries,
        Customer: customers,
        Order: orders,
        Line: lines,
        Tag: tags,
        Party: parties,
        Firm: firms,
        Note: notes,
        Gadget: gadgets,
        Setting: settings,
    }


ROWS = make_rows()
ORDER_IDS = [row["id"] for row in ROWS[Order]]


def plain_value(value: Any) -> Any:
    """Return something comparable for a value of a result row."""
    if isinstance(value, Base):
        mapper = sa.inspect(type(value))
        loaded = sa.inspect(value).dict
        return (
            type(value).__name__,
            *(
                (a.key, plain_value(loaded[a.key]))
                for a in mapper.column_attrs
                if a.key in loaded
            ),
            *(
                (r.key, plain_value(loaded[r.key]))
                for r in mapper.relationships
                if r.key in loaded and r.key in ("orders", "lines", "same_status")
            ),
            *(
                (r.key, loaded[r.key] and plain_key(loaded[r.key]))
                for r in mapper.relationships
                if r.key in loaded and r.key in ("customer", "country", "parent")
            ),
        )
    if isinstance(value, list | tuple):
        return tuple(plain_value(v) for v in value)
    return value


def plain_key(value: Any) -> Any:
    return sa.inspect(value).identity


class Refused(Exception):
    pass


class Failed(Exception):
    """The statement is an error, whichever it is."""


class Both:
    """The plain database and the cluster, which hold the same rows."""

    def __init__(self, servers: LocalCluster) -> None:
        self.url = make_url(servers.urls["s1"])
        self.name = f"pd_{uuid.uuid4().hex[:8]}"
        self.admin = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with self.admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {self.name}")
        self.engine = create_engine(self.url.set(database=self.name))
        self.cluster: Cluster = servers.cluster()
        self.drop()
        Base.metadata.create_all(self.engine)
        self.cluster.create_all(Base.metadata)
        self.plain = sa.orm.sessionmaker(self.engine)
        self.sharded = self.cluster.sessionmaker()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        for maker in (self.plain, self.sharded):
            with maker() as session:
                for entity, rows in ROWS.items():
                    session.add_all(entity(**row) for row in rows)
                    session.flush()
                session.commit()

    def drop(self) -> None:
        for shard in self.cluster._shards.names:
            with self.cluster._sync.connect(shard) as connection:
                for base in (OddBase, Base):
                    base.metadata.drop_all(connection)
                connection.commit()

    def close(self) -> None:
        self.drop()
        self.cluster.close()
        self.engine.dispose()
        with self.admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {self.name} WITH (FORCE)")
        self.admin.dispose()

    def run(self, maker: Any, work: Callable[[Any], Any]) -> Any:
        with maker() as session:
            try:
                return work(session)
            except ShardAlchemyError as error:
                if maker is self.plain:
                    raise
                reason = str(error)
                for cut in (" cannot be run", " of pd_", ":", " is ", ","):
                    reason = reason.split(cut)[0]
                self.refusals[reason[:60]] += 1
                raise Refused(str(error)) from error
            except (sa.exc.SQLAlchemyError, ArithmeticError) as error:
                raise Failed(f"{type(error).__name__}: {error}") from error

    def compare(
        self,
        work: Callable[[Any], Any],
        *,
        ordered: bool = False,
    ) -> str:
        """Run *work* on both; return what came of it, or fail."""
        try:
            expected = self.run(self.plain, work)
        except Failed as failed:
            try:
                got = self.run(self.sharded, work)
            except (Failed, Refused):
                self.errors[str(failed)[:70]] += 1
                return "error on both"
            raise AssertionError(
                f"plain fails, sharded gives {got!r}\n{failed}"
            ) from None
        try:
            got = self.run(self.sharded, work)
        except Refused:
            return "refused"
        if not ordered and isinstance(expected, list) and isinstance(got, list):
            expected = sorted(expected, key=repr)
            got = sorted(got, key=repr)
        assert got == expected, f"\n     got {got!r}\nexpected {expected!r}"
        return "equal"

    def check(
        self,
        statement: Any,
        params: Any = None,
        *,
        ordered: bool = False,
        options: Any = None,
        unique: bool = False,
    ) -> str:
        def work(session: Any) -> Any:
            result = session.execute(statement, params, execution_options=options or {})
            if unique:
                result = result.unique()
            # all() first: unique() tells entities apart by id(), see below.
            return [plain_value(tuple(row)) for row in result.all()]

        return self.compare(work, ordered=ordered)

    def check_write(
        self, statement: Any, params: Any = None, options: Any = None
    ) -> str:
        """Run a write on both, compare all rows afterwards, and roll back."""

        def work(session: Any) -> Any:
            result = session.execute(statement, params, execution_options=options or {})
            try:
                returned = sorted(map(repr, map(plain_value, map(tuple, result))))
            except sa.exc.ResourceClosedError:
                returned = []
            return returned, self.everything(session)

        return self.compare(work)

    def everything(self, session: Any) -> Any:
        """Return all rows as the session sees them; copies of a table must agree."""
        found = {}
        session.expunge_all()
        for table in Base.metadata.sorted_tables:
            kind = placement_of(table).kind.value
            if session.get_bind() is self.engine or kind == "home":
                rows = stored(session, table)
            else:
                per_shard = [
                    stored(session, table, {"shard": shard})
                    for shard in self.cluster.topology.shards
                ]
                if kind == "reference":
                    assert all(rows == per_shard[0] for rows in per_shard), (
                        f"copies of {table} differ"
                    )
                    rows = per_shard[0]
                else:
                    rows = sorted(row for rows in per_shard for row in rows)
            # Its generated values differ between the plain database and the cluster.
            found[table.name] = len(rows) if table is Setting.__table__ else rows
        return found


def stored(session: Any, table: Any, bind_arguments: Any = None) -> list[str]:
    result = session.execute(select(table), bind_arguments=bind_arguments)
    return sorted(repr(tuple(row)) for row in result)


@pytest.fixture(scope="module")
def both(shard_servers: LocalCluster) -> Iterator[Both]:
    pair = Both(shard_servers)
    try:
        yield pair
    finally:
        pair.close()


# -- the generator ------------------------------------------------------------------


class Maker:
    """Makes statements from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.simple = False  # nothing that keeps rows of several shards apart
        self.known: list[Any] = []

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # values

    def key(self, column: Any) -> Any:
        """Return a value to compare a shard key with; mostly of its type."""
        rng = self.rng
        if numeric(column) == "code":
            return rng.randrange(1, 9)
        if not numeric(column):
            return rng.choice([*WORDS * 3, "de", "fr", "zz", None])
        return rng.choice(
            [*range(1, 10)] * 3
            + [-3, 2**40, 99, 2**62, 5.0, 2.5, None, decimal.Decimal(4)]
            + rng.choice([[]] * 9 + [[2**70, True, "5", decimal.Decimal("2.5")]])
        )

    def small(self) -> int:
        return self.rng.randrange(1, 7)

    # sources: something with columns; `key` and `v` of it

    def source(self, depth: int) -> tuple[Any, Any, Any]:
        """Return a FROM element with the column that pins it and another column."""
        if depth > 0 and self.chance(0.3):
            return self.nested(depth - 1)
        entity = self.rng.choice(ENTITIES)
        if self.chance(0.5):
            entity = aliased(entity)
        return entity, key_of(entity), entity.v

    def nested(self, depth: int) -> tuple[Any, Any, Any]:
        inner, key, v = self.source(depth)
        statement = select(key.label("k"), v.label("v"))
        if self.chance(0.3):
            statement = statement.where(self.criterion([(inner, key, v)], depth))
        if self.chance(0.25) and depth > 0:
            other = self.source(depth - 1)
            statement = self.join(
                statement.select_from(inner), [(inner, key, v)], other
            )
        shape = 1.0 if self.simple else self.rng.random()
        if shape < 0.08:
            statement = statement.limit(1000)
        elif shape < 0.16:
            statement = statement.distinct()
        elif shape < 0.24:
            statement = select(key.label("k"), func.count().label("v")).group_by(key)
        elif shape < 0.3:
            statement = statement.with_only_columns(
                key.label("k"), func.sum(v).over(partition_by=key).label("v")
            )
        elif shape < 0.36:
            statement = select(func.max(key).label("k"), func.sum(v).label("v"))
        elif shape < 0.42:
            other, okey, ov = self.source(0)
            if entity_of(other) in NUMERIC and entity_of(inner) in NUMERIC:
                both = union_all(
                    select(key.label("k"), v.label("v")),
                    select(okey.label("k"), ov.label("v")),
                )
                made = both.subquery() if self.chance(0.5) else both.cte()
                return made, made.c.k, made.c.v
        made = statement.subquery() if self.chance(0.6) else statement.cte()
        self.remember(made)
        return made, made.c.k, made.c.v

    def remember(self, made: Any) -> None:
        self.known = [*self.known, made][-2:]

    def criterion(self, sources: list[Any], depth: int) -> Any:
        source, key, v = self.rng.choice(sources)
        r = self.rng.random()
        if r < 0.3:
            value = self.key(key)
            if self.chance(0.2):
                return literal(value) == key if value is not None else key.is_(None)
            if self.chance(0.1) and value is not None:
                return key == bindparam(None, value)
            return key == value
        if r < 0.4:
            values = [self.key(key) for _ in range(self.rng.randrange(4))]
            return key.in_(values) if self.chance(0.8) else key.not_in(values)
        if r < 0.45:
            return or_(self.criterion(sources, 0), self.criterion(sources, 0))
        if r < 0.5:
            return and_(self.criterion(sources, 0), self.criterion(sources, 0))
        if r < 0.54:
            return not_(self.criterion(sources, 0))
        if r < 0.6:
            column = self.pick(key, v)
            return column.is_(None) if self.chance(0.6) else column.is_not(None)
        if r < 0.64 and entity_of(source) is Order:
            entity = source
            locator = self.pick(entity.id, entity.parent_id)
            ids = self.rng.sample(ORDER_IDS, 2)
            return self.pick(
                locator == ids[0],
                locator.in_(ids),
                locator.is_(None),
            )
        if r < 0.68 and len(sources) > 1:
            (_, k1, _), (_, k2, _) = self.rng.sample(sources, 2)
            if numeric(k1) == numeric(k2):
                return k1 == k2
        if r < (0.7 if self.simple else 0.8) and depth > 0:
            return self.subcriterion(sources, depth - 1)
        if r < 0.84:
            return func.coalesce(v, 0) + 1 == self.small()
        if r < 0.86:
            return case((v > 3, true()), else_=v.is_(None))
        return self.pick(v == self.small(), v > self.small(), v.in_([1, 2, None]))

    def subcriterion(self, sources: list[Any], depth: int) -> Any:
        _, okey, ov = self.rng.choice(sources)
        inner, key, v = self.source(depth)
        criteria = [self.criterion([(inner, key, v)], depth)] * self.chance(0.5)
        if self.chance(0.7) and numeric(okey) == numeric(key):
            criteria.append(okey == key)
        elif self.chance(0.3):
            criteria.append(ov == v)
        r = self.rng.random()
        if r < 0.5:
            made: Any = select(key).select_from(inner).where(*criteria).exists()
            return made if self.chance(0.5) else ~made
        if r < 0.7:
            made = ov.in_(select(v).select_from(inner).where(*criteria))
            return made if self.chance(0.6) else not_(made)
        if r < 0.85 and numeric(okey) == numeric(key):
            return okey.in_(select(key).select_from(inner).where(*criteria))
        return ov < (
            select(self.pick(func.max(v), func.count()))
            .select_from(inner)
            .where(*criteria)
            .scalar_subquery()
        )

    def join(self, statement: Any, sources: list[Any], new: Any) -> Any:
        element, key, v = new
        _, okey, ov = self.rng.choice(sources)
        r = self.rng.random()
        if r < (0.9 if self.simple else 0.65) and numeric(okey) == numeric(key):
            on: Any = okey == key if self.chance(0.5) else key == okey
        elif r < 0.8:
            on = ov == v
        elif r < 0.9:
            on = true()
        else:
            on = self.criterion([*sources, new], 0)
        if self.chance(0.25):
            on = and_(on, self.criterion([*sources, new], 0))
        r = self.rng.random()
        if r < 0.45:
            return statement.join(element, on)
        if r < 0.85:
            return statement.outerjoin(element, on)
        if r < 0.93 and not self.simple:
            return statement.join(element, on, full=True)
        return statement.add_columns(key.label(f"x{self.rng.random()}")).where(on)

    def statement(self) -> tuple[Any, bool]:
        """Return a SELECT, and whether its order is total."""
        rng = self.rng
        self.known: list[Any] = []
        self.simple = self.chance(0.5)
        sources = [self.source(2)]
        statement = select().select_from(sources[0][0])
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            new = self.source(1)
            if self.known and self.chance(0.15):
                again = rng.choice(self.known).alias()
                new = again, again.c.k, again.c.v
            statement = self.join(statement, sources, new)
            sources.append(new)
        if self.chance(0.15):
            outer, okey, _ = rng.choice(sources)
            _, key, v = self.source(0)
            if numeric(okey) == numeric(key):
                side = (
                    select(key.label("k"), v.label("v"))
                    .where(key == okey)
                    .correlate(outer)
                    .lateral()
                )
                statement = (
                    statement.join(side, true())
                    if self.chance(0.5)
                    else statement.outerjoin(side, true())
                )
                sources.append((side, side.c.k, side.c.v))
        pinned = rng.random()
        if pinned < 0.6:
            first = self.key(sources[0][1])
            for _, key, _ in sources:
                alike = numeric(key) == numeric(sources[0][1])
                value = first if alike and self.chance(0.8) else self.key(key)
                if self.chance(0.9):
                    statement = statement.where(key == value)
        for _ in range(rng.choice([0, 1, 1, 2])):
            statement = statement.where(self.criterion(sources, 2))
        columns = [c for _, key, v in sources for c in (key, v)]
        r = 0.52 + rng.random() / 2 if self.simple else rng.random()
        if r < 0.12:
            _, _, v = rng.choice(sources)
            return statement.add_columns(
                func.count(), func.sum(v), func.max(func.coalesce(v, -1))
            ), True
        if r < 0.2:
            _, key, v = rng.choice(sources)
            return statement.add_columns(key, func.count()).group_by(key), False
        if r < 0.25:
            return statement.add_columns(*columns).distinct(), False
        if r < 0.3:
            _, key, v = rng.choice(sources)
            return statement.add_columns(
                key, func.count().over(partition_by=rng.choice([key, v]))
            ), False
        labelled = [c.label(f"c{i}") for i, c in enumerate(columns)]
        if r < 0.4:
            statement = statement.add_columns(*labelled).order_by(*labelled)
            if self.chance(0.5):
                statement = statement.limit(3).offset(rng.randrange(2))
            return statement, True
        if r < 0.5:
            inner, key, v = self.source(1)
            _, okey, _ = rng.choice(sources)
            if numeric(okey) == numeric(key):
                scalar = select(self.pick(func.count(), func.sum(v))).select_from(inner)
                statement = statement.add_columns(
                    scalar.where(key == okey).scalar_subquery()
                    if self.chance(0.8)
                    else scalar.scalar_subquery()
                )
        if r < 0.55:
            _, key, v = rng.choice(sources)
            columns.append(func.coalesce(v, 0) * 2)
        if r < 0.6:
            one = statement.add_columns(*columns[:2])
            other, key, v = self.source(1)
            two = select(key, v).select_from(other)
            if self.chance(0.6):
                with contextlib.suppress(sa.exc.ArgumentError):
                    two = two.where(key == self.key(key))
            if len(one.selected_columns) == 2 and numeric(key) == numeric(columns[0]):
                return rng.choice([union, union_all])(one, two), False
        return statement.add_columns(*columns), False

    # entities, with what the ORM adds

    def loading(self) -> Any:
        rng = self.rng
        entity = rng.choice([Customer, Order, Line, Party, Firm, Country, Gadget, Tag])
        statement = select(entity)
        options: list[Any] = []
        if entity is Customer:
            options = [
                rng.choice([joinedload, selectinload, subqueryload])(Customer.orders),
                rng.choice([joinedload, selectinload])(Customer.country),
                rng.choice([joinedload, selectinload, subqueryload])(Customer.lines),
                selectinload(Customer.orders).joinedload(Order.lines),
                joinedload(Customer.orders).selectinload(Order.lines),
            ]
        elif entity is Order:
            options = [
                rng.choice([joinedload, selectinload])(Order.customer),
                rng.choice([joinedload, selectinload])(Order.parent),
                rng.choice([joinedload, selectinload, subqueryload])(Order.lines),
                rng.choice([joinedload, selectinload])(Order.same_status),
                joinedload(Order.customer).joinedload(Customer.country),
            ]
        elif entity is Line:
            options = [joinedload(Line.order).joinedload(Order.customer)]
        elif entity is Country:
            options = [rng.choice([selectinload, joinedload])(Country.customers)]
        elif entity is Party:
            options = [selectin_polymorphic(Party, [Firm])]
            if self.chance(0.5):
                statement = select(with_polymorphic(Party, "*"))
                options = []
                entity = statement.column_descriptions[0]["entity"]
        if options and self.chance(0.7):
            statement = statement.options(rng.choice(options))
        k, v = key_of(entity), entity.v
        sources = [(entity, k, v)]
        if self.chance(0.5):
            statement = statement.where(k == self.key(k))
        for _ in range(rng.choice([0, 1, 1])):
            statement = statement.where(self.criterion(sources, 1))
        if entity is Customer and self.chance(0.3):
            statement = statement.where(
                self.pick(
                    Customer.orders.any(),
                    ~Customer.orders.any(Order.v > 3),
                    Customer.country.has(Country.v > 1),
                    Customer.country.has(name="D"),
                    ~Customer.country.has(),
                )
            )
        if entity is Order and self.chance(0.3):
            statement = statement.where(
                self.pick(
                    Order.customer.has(Customer.v > 2),
                    Order.customer.has(Customer.id == self.small()),
                    Order.lines.any(Line.v == 3),
                    Order.parent.has(),
                    Order.parent == None,  # noqa: E711
                )
            )
        if self.chance(0.15):
            statement = statement.options(
                with_loader_criteria(
                    Order,
                    self.pick(
                        Order.customer_id == self.small(),
                        Order.v != self.small(),
                        Order.customer_id.in_(
                            select(Customer.id).where(Customer.v > 2)
                        ),
                    ),
                    include_aliases=True,
                )
            )
        if self.chance(0.25):
            statement = statement.order_by(*sa.inspect(entity_of(entity)).primary_key)
            if self.chance(0.6):
                statement = statement.limit(3)
            return statement, True
        return statement, False

    # writes

    def write(self) -> Any:
        rng = self.rng
        entity = rng.choice([Customer, Order, Line, Tag, Gadget, Party])
        table = entity.__table__
        k, v = key_of(entity), entity.v
        sources = [(entity, k, v)]
        criteria = [self.criterion(sources, 1) for _ in range(rng.choice([0, 1, 1]))]
        if self.chance(0.8):
            criteria.append(k == self.key(k))
        if self.chance(0.3):
            other = self.source(0)
            if numeric(other[1]) == numeric(k):
                criteria.append(other[1] == k if self.chance(0.7) else other[2] == v)
        if self.chance(0.3):
            criteria.append(self.subcriterion(sources, 1))
        target = entity if self.chance(0.5) else table
        if entity in (Line, Tag, Gadget) and self.chance(0.4):
            return delete(target).where(*criteria)
        _, ik, iv = self.source(1)
        value: Any = self.pick(
            7,
            v + 1,
            func.coalesce(v, 0) + 2,
            select(func.max(iv)).where(ik == k).scalar_subquery()
            if numeric(ik) == numeric(k)
            else 8,
            select(func.count(iv)).scalar_subquery(),
        )
        statement = update(target).where(*criteria).values(v=value)
        return statement.returning(v) if self.chance(0.3) else statement


ENTITIES = [Customer, Order, Line] * 3 + [Tag, Party, Firm, Country, Gadget]
NUMERIC = (Customer, Order, Line, Party, Firm)


def entity_of(source: Any) -> Any:
    """Return the mapped class behind a source, or None for a subquery."""
    inspected = sa.inspect(source, raiseerr=False)
    mapper = getattr(inspected, "mapper", None)
    return None if mapper is None else mapper.class_


def key_of(entity: Any) -> Any:
    name = {
        Order: "customer_id",
        Line: "customer_id",
        Tag: "tag",
        Country: "code",
        Gadget: "code",
    }.get(entity_of(entity), "id")
    return getattr(entity, name)


def numeric(column: Any) -> Any:
    type_ = column.type
    return "code" if isinstance(type_, Code) else not isinstance(type_, String)


def search(both: Both, seed: int, count: int) -> list[str]:
    """Run *count* statements made from *seed*; return what went wrong."""
    maker = Maker(seed)
    wrong = []
    for number in range(count):
        kind = maker.rng.random()
        statement: Any = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind < 0.65:
                    statement, ordered = maker.statement()
                    outcome = both.check(statement, ordered=ordered)
                elif kind < 0.85:
                    statement, ordered = maker.loading()
                    outcome = both.check(statement, ordered=ordered, unique=True)
                else:
                    statement = maker.write()
                    options = (
                        {"synchronize_session": False}
                        if kind < 0.95
                        else {"synchronize_session": "fetch"}
                    )
                    outcome = both.check_write(statement, options=options)
                    if outcome == "refused":
                        outcome = "write refused"
        except AssertionError as error:
            wrong.append(f"seed {seed} #{number}\n{statement}\n{str(error)[:1500]}")
            outcome = "WRONG"
        except (sa.exc.ArgumentError, sa.exc.CompileError, NotImplementedError):
            outcome = "not made"
        except Failed as error:
            wrong.append(
                f"seed {seed} #{number}\n{statement}\nonly sharded: {error}"[:3000]
            )
            outcome = "WRONG"
        except Exception as error:
            wrong.append(f"seed {seed} #{number}\n{statement}\n{error!r}"[:3000])
            outcome = "CRASH"
        both.outcomes[outcome] += 1
    return wrong


def report(both: Both) -> str:
    total = sum(both.outcomes.values())
    lines = [f"{total} statements: {dict(both.outcomes)}"]
    lines += [
        f"  {n:5} {n / total:5.1%} refused: {why}"
        for why, n in both.refusals.most_common(16)
    ]
    lines += [f"  {n:5} error: {why}" for why, n in both.errors.most_common(6)]
    return "\n".join(lines)


def main(first: int, last: int) -> None:
    with LocalCluster(4) as servers:
        both = Both(servers)
        try:
            for seed in range(first, last):
                for wrong in search(both, seed, 200):
                    print(wrong, "\n", flush=True)
            print(report(both))
        finally:
            both.close()


# -- statements that were once answered wrongly --------------------------------------

KEYS = [row["id"] for row in ROWS[Customer]]


# Once wrong: unique() on a merged result tells entities apart by id() after they are
# freed.
def test_iterating_a_unique_result(both: Both) -> None:
    def work(session: Any) -> Any:
        found: list[Any] = []
        for _ in range(20):
            statement = select(Tag).execution_options(populate_existing=True)
            found += [t.tag for t in session.scalars(statement).unique()]
            session.expunge_all()
        return found

    both.compare(work)


# Once wrong: IS NULL on a nullable locator column is taken to be true of no row.
def test_a_nullable_locator_that_is_null(both: Both) -> None:
    both.check(select(Order.id, Order.v).where(Order.parent_id.is_(None)))
    for key in KEYS:
        both.check(
            select(Order).where(Order.customer_id == key, Order.parent_id.is_(None))
        )


# Once wrong: a left join on both makes two elements colocated that are not joined.
def test_a_cross_join_with_a_left_join_on_both(both: Both) -> None:
    on = and_(Line.customer_id == Customer.id, Line.customer_id == Party.id)
    both.check(
        select(Customer.id, Party.id, Line.no)
        .select_from(Customer)
        .join(Party, true())
        .outerjoin(Line, on)
    )


# Once wrong: the same, by a lateral subquery.
def test_a_cross_join_with_a_lateral_on_both(both: Both) -> None:
    side = (
        select(Line.no)
        .where(Line.customer_id == Customer.id, Line.customer_id == Party.id)
        .lateral()
    )
    both.check(
        select(Customer.id, Party.id, side.c.no)
        .select_from(Customer)
        .join(Party, true())
        .outerjoin(side, true())
    )


# Once wrong: the same, by NOT EXISTS over a FROM-subquery.
def test_a_cross_join_with_not_exists_on_both(both: Both) -> None:
    y = select(Line.customer_id).subquery()
    both.check(
        select(Customer.id, Party.id).where(
            ~exists().where(y.c.customer_id == Customer.id, y.c.customer_id == Party.id)
        )
    )


# Once wrong: a criterion on one reference to a CTE is taken to restrict the others.
def test_a_cte_referenced_twice_and_pinned_once(both: Both) -> None:
    x = select(Customer.id, Customer.v).cte()
    x1, x2 = x.alias(), x.alias()
    for key in KEYS:
        both.check(select(x1.c.id, x2.c.id).where(x1.c.id == key))


# Once wrong: two references to a CTE are one element, so their join is not looked at.
def test_a_cte_joined_with_itself_on_no_key(both: Both) -> None:
    x = select(Customer.id, Customer.v).cte()
    x1, x2 = x.alias(), x.alias()
    both.check(select(x1.c.id, x2.c.id).where(x1.c.v == x2.c.v))


# Once wrong: a second, uncorrelated reference to a CTE in a subquery is not looked
# at.
def test_a_cte_in_two_subqueries(both: Both) -> None:
    cte = select(Line.customer_id, Line.v, Line.no).cte()
    for no in range(4):
        both.check(
            select(Customer.id).where(
                ~exists().where(cte.c.customer_id == Customer.id, cte.c.no == 17),
                Customer.v.in_(select(cte.c.v).where(cte.c.no == no)),
            )
        )


# Once wrong: a SELECT without a sharded table of its own is not checked to be row-
# wise.
@pytest.mark.parametrize("shape", ["count", "limit", "distinct", "group", "window"])
def test_a_subquery_of_a_subquery(both: Both, shape: str) -> None:
    y = select(Order.v, Order.status).subquery()
    z: Any = {
        "count": select(func.count().label("c")).select_from(y),
        "limit": select(func.coalesce(y.c.v * 0, 0).label("c")).limit(2),
        "distinct": select(y.c.status.label("c")).distinct(),
        "group": select(y.c.status, func.count().label("c")).group_by(y.c.status),
        "window": select(func.count().over().label("c")).select_from(y),
    }[shape]
    both.check(select(z.subquery().c.c))


# Once wrong: IS NULL is pushed through a level at which an outer join blanks the
# column.
def test_is_null_three_levels_up(both: Both) -> None:
    for key in KEYS:
        i = select(Customer.id, Customer.country_code).subquery()
        m = (
            select(Country.code, i.c.id)
            .select_from(Country)
            .outerjoin(i, and_(i.c.country_code == Country.code, i.c.id == key))
            .subquery()
        )
        both.check(select(m.c.code, m.c.id).where(m.c.id.is_(None)))


# Once wrong: parameters given as a list are not read, so the key is NULL.
def test_parameters_in_a_list(both: Both) -> None:
    for key in KEYS:
        both.check(
            select(Customer.id).where(Customer.id == bindparam("x")), [{"x": key}]
        )


# Once wrong: executemany of an UPDATE goes to a shard at hand.
def test_update_of_many_parameter_sets(both: Both) -> None:
    table = Customer.__table__
    both.check_write(
        update(table).where(table.c.id == bindparam("x")).values(v=77),
        [{"x": key} for key in KEYS],
    )


# Once wrong: executemany of a DELETE goes to a shard at hand.
def test_delete_of_many_parameter_sets(both: Both) -> None:
    table = Tag.__table__
    both.check_write(
        delete(table).where(table.c.tag == bindparam("x")), [{"x": w} for w in WORDS]
    )


def test_params_of_a_statement(both: Both) -> None:
    statement = select(Customer.id).where(Customer.id == bindparam("x"))
    for key in KEYS:
        both.check(statement.params(x=key))


# Once wrong: a parameter given by the name that the compiler made is not read.
def test_a_parameter_given_by_its_compiled_name(both: Both) -> None:
    for key in KEYS:
        both.check(select(Customer.id).where(Customer.id == 5), {"id_1": key})


# Once wrong: a table that no Element is made for counts as a reference table.
def test_tablesample(both: Both) -> None:
    both.check(select(tablesample(Customer.__table__, 100)))


# Once wrong: a table() or a Table without its annotation is read on the home shard.
def test_a_sharded_table_by_another_object(both: Both) -> None:
    both.check(select(sa.table("pd_customers", sa.column("id"))))


def test_a_sharded_table_of_another_metadata(both: Both) -> None:
    other = sa.Table("pd_customers", sa.MetaData(), sa.Column("id", BigInteger))
    both.check(select(other))


def test_write_to_a_sharded_table_of_another_metadata(both: Both) -> None:
    other = sa.Table(
        "pd_tags", sa.MetaData(), sa.Column("tag", String), sa.Column("v", Integer)
    )
    both.check_write(update(other).values(v=3))


# Once wrong: a statement over home tables is not compiled: what the ORM adds is not
# seen.
@pytest.mark.parametrize("added", ["joinedload", "criteria", "column_property"])
def test_sharded_tables_that_the_orm_adds_to_a_home_table(
    both: Both, added: str
) -> None:
    subquery = select(Customer.id)
    statement = {
        "joinedload": select(Note).options(joinedload(Note.customer)),
        "criteria": select(Note).options(
            with_loader_criteria(Note, Note.customer_id.in_(subquery))
        ),
        "column_property": select(CountedNote),
    }[added]
    both.check(statement)


# Once wrong: an alias in UPDATE … FROM is no element.
def test_update_from_an_alias_of_the_table(both: Both) -> None:
    other = aliased(Customer)
    for here, there in itertools.pairwise(KEYS):
        both.check_write(
            update(Customer).where(Customer.id == here, other.id == there).values(v=9),
            options={"synchronize_session": False},
        )


# Once wrong: an alias in DELETE … USING is no element.
def test_delete_using_an_alias_of_the_table(both: Both) -> None:
    other = aliased(Tag)
    for word in WORDS:
        both.check_write(
            delete(Tag).where(Tag.tag == word, other.v == 3),
            options={"synchronize_session": False},
        )


# Once wrong: a FROM table of an UPDATE that a subquery also reads is no element.
def test_update_from_a_table_that_a_subquery_reads(both: Both) -> None:
    for key in KEYS:
        mine = select(Order.customer_id).where(Order.customer_id == key).correlate(None)
        both.check_write(
            update(Customer)
            .where(Customer.id == key, Order.v == Customer.v, Customer.id.in_(mine))
            .values(v=99),
            options={"synchronize_session": False},
        )


# Once wrong: a DELETE in a CTE runs on one shard.
def test_delete_in_a_cte(both: Both) -> None:
    removed = delete(Line).where(Line.v == 3).returning(Line.no).cte()
    both.check_write(select(removed.c.no))


# Once wrong: an UPDATE of a reference table in a CTE changes one copy.
def test_update_of_a_reference_table_in_a_cte(both: Both) -> None:
    changed = update(Country).values(v=8).returning(Country.code).cte()
    both.check_write(select(changed.c.code))


# Once wrong: a DELETE in a CTE beside a pinned SELECT runs on one shard.
def test_delete_in_a_cte_beside_a_select(both: Both) -> None:
    removed = delete(Line).returning(Line.no).cte()
    both.check_write(select(Customer.id).where(Customer.id == 5).add_cte(removed))


# Once wrong: text in a WHERE is not parenthesised, so an OR in it undoes the pin.
@pytest.mark.parametrize("kind", [text, literal_column])
def test_text_with_or_beside_a_pin(both: Both, kind: Any) -> None:
    for key in KEYS:
        both.check(
            select(Customer.id).where(Customer.id == key, kind("v = 1 OR v > 2"))
        )


# Once wrong: the same in a DELETE.
def test_text_with_or_in_a_delete(both: Both) -> None:
    for word in WORDS:
        both.check_write(
            delete(Tag).where(Tag.tag == word, text("v = 1 OR v > 2")),
            options={"synchronize_session": False},
        )


# Once wrong: a comment in text hides the pin.
def test_text_with_a_comment(both: Both) -> None:
    both.check(select(Customer.id).where(text("true --"), Customer.id == 5))


# Once wrong: a suffix or a hint may say anything.
@pytest.mark.parametrize("method", ["suffix_with", "with_statement_hint"])
def test_a_suffix_beside_a_pin(both: Both, method: str) -> None:
    for key in KEYS:
        statement = select(Customer.id).where(Customer.id == key)
        both.check(getattr(statement, method)("OR v > 0"))


# Once wrong: subqueries in VALUES, ON CONFLICT and RETURNING of an INSERT are not
# seen.
@pytest.mark.parametrize("place", ["home", "sharded", "text", "conflict", "returning"])
def test_a_subquery_in_an_insert(both: Both, place: str) -> None:
    count: Any = select(func.count(Customer.id)).scalar_subquery()
    conflict = pg.insert(Tag).values(tag="a", v=9)
    statement = {
        "home": insert(Note).values(id=50, body="x", customer_id=count),
        "sharded": insert(Tag).values(tag="zz", v=count),
        "text": insert(Note).values(
            id=50, body="x", customer_id=text("(select count(*) from pd_customers)")
        ),
        "conflict": conflict.on_conflict_do_update(
            index_elements=["tag"], set_={"v": count}
        ),
        "returning": insert(Tag).values(tag="zz", v=9).returning(count),
    }[place]
    both.check_write(statement)


# Once wrong: a subquery over sharded rows in an INSERT into a reference table.
def test_a_subquery_in_an_insert_into_a_reference_table(both: Both) -> None:
    v = select(Customer.v).where(Customer.id == 1).scalar_subquery()
    both.check_write(insert(Country).values(code="zz", name="q", v=v))


def random_int() -> Any:
    return literal_column("(random() * 1000000)::int")


# Once wrong: writes to a reference table that each copy evaluates for itself.
@pytest.mark.parametrize("kind", ["literal", "onupdate", "conflict"])
def test_copies_of_a_reference_table_stay_equal(both: Both, kind: str) -> None:
    conflict = pg.insert(Country).values(code="de", name="q", v=1)
    statement = {
        "literal": update(Country).values(v=random_int()),
        "onupdate": update(Setting).values(v=4),
        "conflict": conflict.on_conflict_do_update(
            index_elements=["code"], set_={"v": random_int()}
        ),
    }[kind]

    def work(session: Any) -> Any:
        session.execute(statement)
        both.everything(session)

    both.compare(work)


# Once wrong: shard= and shard_key= send a write of a reference table to one copy.
@pytest.mark.parametrize("option", [{"shard": "s2"}, {"shard_key": 1}])
def test_a_named_shard_for_a_reference_table(both: Both, option: Any) -> None:
    both.check_write(
        update(Country).values(v=9), options={**option, "synchronize_session": False}
    )


# Once wrong: only create_all() guards reference tables against textual SQL.
def test_text_on_a_reference_table_in_another_process(
    both: Both, shard_servers: LocalCluster
) -> None:
    with shard_servers.cluster() as other, other.sessionmaker()() as session:
        with contextlib.suppress(UnsupportedQueryError):
            session.execute(text("update pd_countries set v = 55"))
        both.everything(session)


# Once wrong: shard_key= hashes a locator, or a converted key, as what Python calls
# it.
@pytest.mark.parametrize("entity", [Order, Gadget])
def test_shard_key_that_is_no_plain_key(both: Both, entity: Any) -> None:
    for row in ROWS[entity]:
        key = row["id"] if entity is Order else row["code"]
        column = Order.id if entity is Order else Gadget.code
        both.check(
            select(func.count(), func.min(entity.v)).where(column == key),
            options={"shard_key": key},
        )


# Once wrong: an expression that SQLAlchemy's user compiles may be an aggregate.
def test_a_compiled_element_of_the_application(both: Both) -> None:
    both.check(select(CountAll()).select_from(Customer))


class CountAll(sa.ColumnElement[int]):
    inherit_cache = True
    type = Integer()


@compiles(CountAll)
def _count_all(element: Any, compiler: Any, **kw: Any) -> str:
    return "count(*)"


# Once wrong: a lazy load over several shards is not in the relationship's order.
def test_a_lazy_load_with_an_order(both: Both) -> None:
    def work(session: Any) -> Any:
        return [
            [
                (line.no, line.order_id)
                for line in session.scalars(select(Order).where(Order.id == one))
                .one()
                .same_status
            ]
            for one in ORDER_IDS
        ]

    both.compare(work, ordered=True)


# Once wrong: DDL is run on the home shard, whatever it reads.
@pytest.mark.parametrize(
    "kind", ["ddl", *(["into"] if hasattr(sa.Select, "into") else [])]
)
def test_ddl_that_reads_a_sharded_table(both: Both, kind: str) -> None:
    ddl: Any = (
        sa.DDL("CREATE TABLE pd_into AS SELECT * FROM pd_customers")
        if kind == "ddl"
        else select(Customer.id).into("pd_into")
    )

    def work(session: Any) -> Any:
        session.execute(ddl)
        return session.scalar(text("SELECT count(*) FROM pd_into"))

    both.compare(work)


# Once wrong: FOR UPDATE on a reference table locks the copy at hand, not the home
# shard's.
def test_for_update_of_a_reference_table(both: Both) -> None:
    with both.sharded() as one, both.sharded() as two:
        locking = select(Country).where(Country.code == "de")
        first, second = (
            next(k for k in KEYS if both.cluster.shard_for(Customer, k) == shard)
            for shard in both.cluster.topology.shards[:2]
        )
        one.execute(select(Customer).where(Customer.id == first)).all()
        two.execute(select(Customer).where(Customer.id == second)).all()
        one.execute(locking.with_for_update()).all()
        try:
            two.execute(locking.with_for_update(nowait=True)).all()
        except sa.exc.OperationalError:
            return
        raise AssertionError("both sessions have locked the row")


class OddBase(DeclarativeBase):
    pass


class Blank(OddBase):
    __tablename__ = "pd_blank"
    __table_args__ = {"info": sharded_by("k")}
    k: Mapped[str] = mapped_column(
        String(5).with_variant(sa.CHAR(5), "postgresql"), primary_key=True
    )


class Named(OddBase):
    __tablename__ = "pd größe"
    __table_args__ = {"info": sharded_by("k")}
    k: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def make(both: Both, entity: Any, keys: list[Any]) -> None:
    metadata = sa.MetaData()
    entity.__table__.to_metadata(metadata)
    both.cluster.create_all(metadata)
    metadata.create_all(both.engine)
    for maker in (both.plain, both.sharded):
        with maker() as session:
            for key in keys:
                session.merge(entity(k=key))
            session.commit()


# Once wrong: a variant of the key's type for PostgreSQL is not looked at.
def test_a_key_whose_type_has_a_variant(both: Both) -> None:
    words = ["a", "b", "c", "d"]
    with contextlib.suppress(ShardAlchemyError):
        make(both, Blank, words)
        for word in words:
            both.check(select(func.max(Blank.k)).where(Blank.k == word + " "))


# Once wrong: names that are not plain words are not guarded against textual SQL.
def test_text_that_names_a_quoted_table(both: Both) -> None:
    make(both, Named, list(range(8)))
    both.check(text('SELECT count(*) FROM "pd größe"'))


# -- statements that fail, though nothing speaks against them -------------------------


@pytest.mark.parametrize("kind", ["orm", "core", "values"])
def test_insert_on_several_shards(both: Both, kind: str) -> None:
    rows = [{"tag": f"q{n}", "v": n} for n in range(9)]
    if kind == "values":
        both.check_write(insert(Tag.__table__).values(rows))
    else:
        both.check_write(insert(Tag if kind == "orm" else Tag.__table__), rows)


class Odd(sa.TypeDecorator[int]):
    impl = Integer
    cache_ok = False


# Once wrong: a pending object in a statement that is not cached is not flushed first.
def test_a_pending_object_in_a_statement_without_a_cache_key(both: Both) -> None:
    def work(session: Any) -> Any:
        order = Order(customer_id=1, status="new", placed=datetime.date(2024, 1, 1))
        session.add(order)
        return session.execute(
            select(Order.id).where(
                Order.parent == order, sa.type_coerce(Order.v, Odd).is_(None)
            )
        ).all()

    both.compare(work)


def test_update_of_an_alias(both: Both) -> None:
    both.check_write(update(Customer.__table__.alias("q")).values(v=4))


# -- shapes that must keep working ----------------------------------------------------


@pytest.mark.parametrize("listening", [False, True])
def test_equal_shapes_with_other_values(both: Both, listening: bool) -> None:
    maker = both.sharded
    if listening:
        both.sharded = both.cluster.sessionmaker()
        sa.event.listen(both.sharded, "do_orm_execute", lambda state: None)
    try:
        for key in KEYS[:-1]:  # an integer parameter cannot hold the last
            for statement, params in equal_shapes(key):
                assert both.check(statement, params, unique=True) == "equal"
            assert (
                both.check_write(update(Customer).where(Customer.id == key).values(v=3))
                == "equal"
            )
    finally:
        both.sharded = maker


def equal_shapes(key: int) -> Iterator[tuple[Any, Any]]:
    x = bindparam("x")
    named = select(Customer.id).where(Customer.id == x)
    yield named, {"x": key}
    yield named.where(Customer.v != bindparam("y", 4)), {"x": key}
    yield select(Customer.id).where(Customer.id == bindparam("x", 4)), {"x": key}
    yield select(Customer.id).where(Customer.id == bindparam("x", key)), None
    yield (
        select(Customer.id).where(bindparam("x", callable_=lambda: key) == Customer.id),
        None,
    )
    expanding = Customer.id.in_(bindparam("x", expanding=True))
    yield select(Customer.id).where(expanding), {"x": [key, None, key + 1]}
    yield select(Customer.id).where(~expanding), {"x": [key, None]}
    yield select(Customer.id).where(~expanding), {"x": [key]}
    yield lambda_stmt(lambda: select(Customer.id).where(Customer.id == key)), None
    yield (
        lambda_stmt(lambda: select(Customer)) + (lambda s: s.where(Customer.id == key)),
        None,
    )
    both_keys = [key, key + 1]
    yield (
        lambda_stmt(lambda: select(Customer.id).where(Customer.id.in_(both_keys))),
        None,
    )
    yield (
        select(Customer).options(with_loader_criteria(Customer, lambda c: c.id == key)),
        None,
    )
    yield (
        select(Customer).options(
            selectinload(Customer.orders),
            with_loader_criteria(Order, lambda c: c.customer_id == key),
        ),
        None,
    )
    yield select(func.count(Order.id)).where(Order.customer_id == key), None


@pytest.mark.parametrize("yield_per", [2, 3, 100])
def test_reading_in_parts(both: Both, yield_per: int) -> None:
    def work(session: Any) -> Any:
        options = {"yield_per": yield_per}
        rows = session.execute(select(Order), execution_options=options)
        found = [row.Order.id for part in rows.partitions() for row in part]
        found += session.scalars(select(Order.id), execution_options=options)
        return found

    assert both.compare(work) == "equal"


def test_objects_in_criteria(both: Both) -> None:
    def work(session: Any) -> Any:
        new = Order(customer_id=1, status="new", placed=datetime.date(2024, 1, 1))
        session.add(new)
        session.add(Order(customer_id=1, parent=new, status="y", placed=new.placed))
        found = []
        for key in KEYS:
            customer = session.get(Customer, key)
            for criterion in (
                Order.customer == customer,
                Order.customer != customer,
                with_parent(customer, Customer.orders),
                Order.parent == new,
            ):
                rows = session.execute(select(Order.customer_id).where(criterion))
                found += sorted(map(tuple, rows))
        return found

    assert both.compare(work) == "equal"


def random_statements(both: Both, first: int, last: int) -> list[str]:
    return [w for seed in range(first, last) for w in search(both, seed, STATEMENTS)]


def test_random_statements(both: Both) -> None:
    both.outcomes.clear()
    both.refusals.clear()
    wrong = random_statements(both, 0, SEEDS)
    print("\n" + report(both))
    assert not wrong, "\n\n".join(wrong)
    assert both.outcomes["equal"] > 0.85 * sum(both.outcomes.values())
    assert both.outcomes["refused"] == 0, "every SELECT is answered"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
