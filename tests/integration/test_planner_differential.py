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
    String,
    UniqueConstraint,
    and_,
    bindparam,
    case,
    cast,
    create_engine,
    delete,
    func,
    literal,
    make_url,
    not_,
    or_,
    select,
    true,
    union,
    union_all,
    update,
)
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
    with_polymorphic,
)

from shardalchemy import Cluster, locator_id, reference_table, sharded_by
from shardalchemy.errors import ShardAlchemyError
from shardalchemy.ids import new_locator
from shardalchemy.local import LocalCluster
from shardalchemy.schema import placement_of

SEEDS = 12
STATEMENTS = 100  # a seed


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
    customer_id: Mapped[int] = mapped_column(ForeignKey("pd_customers.id"))
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
        Base.metadata.create_all(self.engine)
        self.cluster.create_all(Base.metadata)
        self.plain = sa.orm.sessionmaker(self.engine)
        self.sharded = self.cluster.sessionmaker()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        for maker in (self.plain, self.sharded):
            with maker() as session:
                for entity in reversed(Base.metadata.sorted_tables):
                    for name in self.cluster.topology.shards:
                        if maker is self.sharded:
                            session.execute(
                                entity.delete(), bind_arguments={"shard": name}
                            ) if placement_of(entity).kind.value != "home" or (
                                name == self.cluster.topology.home
                            ) else None
                session.commit()
                for entity, rows in ROWS.items():
                    for row in rows:
                        session.add(entity(**row))
                    session.flush()
                session.commit()

    def close(self) -> None:
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
                for cut in (" over several shards", ":", " is ", ","):
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
        unpaired: bool = False,
    ) -> str:
        """Run *work* on both; return what came of it, or fail."""
        try:
            expected = self.run(self.plain, work)
        except Failed as failed:
            try:
                got = self.run(self.sharded, work)
            except (Failed, Refused):
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
                rows = sorted(map(repr, map(tuple, session.execute(select(table)))))
            else:
                per_shard = [
                    sorted(
                        map(
                            repr,
                            map(
                                tuple,
                                session.execute(
                                    select(table), bind_arguments={"shard": shard}
                                ),
                            ),
                        )
                    )
                    for shard in self.cluster.topology.shards
                ]
                if kind == "reference":
                    assert all(rows == per_shard[0] for rows in per_shard), (
                        f"copies of {table} differ"
                    )
                    rows = per_shard[0]
                else:
                    rows = sorted(row for rows in per_shard for row in rows)
            found[table.name] = (
                [row for row in rows] if table.name != "pd_settings" else len(rows)
            )
        return found


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

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # values

    def key(self, entity: Any) -> Any:
        """Return a value to compare *entity*'s shard key with; mostly a right one."""
        rng = self.rng
        if entity_of(entity) is Tag:
            return rng.choice([*WORDS, *WORDS, 5, None, "zz"])
        if entity_of(entity) is Gadget:
            return rng.randrange(1, 9)
        return rng.choice(
            [*range(1, 10)] * 3
            + [-3, 2**40, 99, 2**62, 2**70, 5.0, 2.5, None, True]
            + [decimal.Decimal(4), decimal.Decimal("2.5")]
        )

    def small(self) -> int:
        return self.rng.randrange(1, 7)

    # sources: something with columns; `key` and `v` of it

    def source(self, depth: int) -> tuple[Any, Any, Any]:
        """Return a FROM element with the column that pins it and another column."""
        if depth > 0 and self.chance(0.3):
            return self.nested(depth - 1)
        entity = self.pick(
            Customer, Customer, Order, Order, Line, Line, Tag, Party, Firm, Country,
            Gadget,
        )
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
        shape = self.rng.random()
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
        self.known = [*getattr(self, "known", ()), made][-2:]

    def criterion(self, sources: list[Any], depth: int) -> Any:
        source, key, v = self.rng.choice(sources)
        r = self.rng.random()
        if r < 0.3:
            value = self.key(source)
            if self.chance(0.2):
                return literal(value) == key if value is not None else key.is_(None)
            if self.chance(0.1) and value is not None:
                return key == bindparam(None, value)
            return key == value
        if r < 0.4:
            values = [self.key(source) for _ in range(self.rng.randrange(4))]
            if entity_of(source) is Tag:
                values = [w for w in values if isinstance(w, str)]
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
                locator == ids[0], locator.in_(ids), locator.is_(None), locator == None  # noqa: E711
            )
        if r < 0.68 and len(sources) > 1:
            (_, k1, _), (_, k2, _) = self.rng.sample(sources, 2)
            if numeric(k1) == numeric(k2):
                return k1 == k2
        if r < 0.8 and depth > 0:
            return self.subcriterion(sources, depth - 1)
        if r < 0.84:
            return func.coalesce(v, 0) + 1 == self.small()
        if r < 0.86:
            return case((v > 3, true()), else_=v.is_(None))
        return self.pick(v == self.small(), v > self.small(), v.in_([1, 2, None]))

    def subcriterion(self, sources: list[Any], depth: int) -> Any:
        outer, okey, ov = self.rng.choice(sources)
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
        if r < 0.65 and numeric(okey) == numeric(key):
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
        if r < 0.93:
            return statement.join(element, on, full=True)
        return statement.add_columns(key.label(f"x{self.rng.random()}")).where(on)

    def statement(self) -> tuple[Any, bool]:
        """Return a SELECT, and whether its order is total."""
        rng = self.rng
        self.known: list[Any] = []
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
            outer, okey, ov = rng.choice(sources)
            inner, key, v = self.source(0)
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
        if pinned < 0.5:
            first = self.key(sources[0][0])
            for source, key, _ in sources:
                value = first if self.chance(0.8) else self.key(source)
                if isinstance(value, str) == (not numeric(key)) and self.chance(0.9):
                    with contextlib.suppress(sa.exc.ArgumentError):
                        statement = statement.where(key == value)
        for _ in range(rng.choice([0, 1, 1, 2])):
            statement = statement.where(self.criterion(sources, 2))
        columns = [c for _, key, v in sources for c in (key, v)]
        r = rng.random()
        if r < 0.12:
            source, key, v = rng.choice(sources)
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
                    two = two.where(key == self.key(other))
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
            statement = statement.where(k == self.key(entity))
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
                        Order.customer_id.in_(select(Customer.id).where(Customer.v > 2)),
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
            criteria.append(k == self.key(entity))
        if self.chance(0.3):
            other = self.source(0)
            if numeric(other[1]) == numeric(k):
                criteria.append(other[1] == k if self.chance(0.7) else other[2] == v)
        if self.chance(0.3):
            criteria.append(self.subcriterion(sources, 1))
        target = entity if self.chance(0.5) else table
        if entity in (Line, Tag, Gadget) and self.chance(0.4):
            return delete(target).where(*criteria)
        inner, ik, iv = self.source(1)
        value: Any = self.pick(
            7, v + 1, func.coalesce(v, 0) + 2,
            select(func.max(iv)).where(ik == k).scalar_subquery()
            if numeric(ik) == numeric(k) else 8,
            select(func.count(iv)).scalar_subquery(),
        )
        statement = update(target).where(*criteria).values(v=value)
        return statement.returning(v) if self.chance(0.3) else statement


NUMERIC = (Customer, Order, Line, Party, Firm)


def entity_of(source: Any) -> Any:
    """Return the mapped class behind a source, or None for a subquery."""
    inspected = sa.inspect(source, raiseerr=False)
    mapper = getattr(inspected, "mapper", None)
    return None if mapper is None else mapper.class_


def key_of(entity: Any) -> Any:
    name = {
        Order: "customer_id", Line: "customer_id", Tag: "tag", Country: "code",
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
        except AssertionError as error:
            wrong.append(f"seed {seed} #{number}\n{statement}\n{str(error)[:1500]}")
            outcome = "WRONG"
        except (sa.exc.ArgumentError, sa.exc.CompileError, NotImplementedError):
            outcome = "not made"
        except Failed as error:
            wrong.append(f"seed {seed} #{number}\n{statement}\nonly sharded: {error}"[:3000])
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
        for why, n in both.refusals.most_common(12)
    ]
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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
