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
    lateral,
    literal,
    literal_column,
    make_url,
    not_,
    or_,
    select,
    tablesample,
    text,
    true,
    tuple_,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    contains_eager,
    foreign,
    joinedload,
    mapped_column,
    raiseload,
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
        self.shards_used: collections.Counter[int] = collections.Counter()
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
        self, work: Callable[[Any], Any], *, ordered: bool = False, unpaired: bool = False
    ) -> str:
        """Run *work* on both; return what came of it, or fail."""
        try:
            expected = self.run(self.plain, work)
        except Failed as failed:
            try:
                got = self.run(self.sharded, work)
            except (Failed, Refused):
                return "error on both"
            raise AssertionError(f"plain fails, sharded gives {got!r}\n{failed}") from None
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
            result = session.execute(
                statement, params, execution_options=options or {}
            )
            if unique:
                result = result.unique()
            return [plain_value(tuple(row)) for row in result]

        return self.compare(work, ordered=ordered)

    def check_write(
        self, statement: Any, params: Any = None, options: Any = None
    ) -> str:
        """Run a write on both, compare all rows afterwards, and roll back."""

        def work(session: Any) -> Any:
            result = session.execute(
                statement, params, execution_options=options or {}
            )
            returned = (
                sorted(map(repr, map(plain_value, map(tuple, result))))
                if result.returns_rows
                else result.rowcount
            )
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
            found[table.name] = [
                row for row in rows
            ] if table.name != "pd_settings" else len(rows)
        return found


@pytest.fixture(scope="module")
def both(shard_servers: LocalCluster) -> Iterator[Both]:
    pair = Both(shard_servers)
    try:
        yield pair
    finally:
        pair.close()
