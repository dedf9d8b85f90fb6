"""A shop's back office, declared over shards in every way there is."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Integer,
    LargeBinary,
    String,
    Table,
    UniqueConstraint,
    func,
    select,
)
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    column_property,
    declared_attr,
    mapped_column,
    relationship,
)

from shardalchemy import locator_id, reference_table, sharded_by


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Country(Base):
    """A reference table."""

    __tablename__ = "country"
    __table_args__ = {"info": reference_table()}

    code: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str]


class Setting(Base):
    """A home table."""

    __tablename__ = "setting"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Customer(Base):
    __tablename__ = "customer"
    __table_args__ = {"info": sharded_by("id")}

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    country_code: Mapped[str | None] = mapped_column(ForeignKey("country.code"))
    version: Mapped[int] = mapped_column()

    country: Mapped[Country | None] = relationship()
    orders: Mapped[list[Order]] = relationship(
        back_populates="customer", order_by="Order.number", cascade="all, delete-orphan"
    )
    notes: WriteOnlyMapped[Note] = relationship(
        order_by="Note.id", cascade="all, delete-orphan", passive_deletes=True
    )
    visits: DynamicMapped[Visit] = relationship(order_by="Visit.number", lazy="dynamic")
    labels: Mapped[list[Label]] = relationship(
        secondary=lambda: customer_label, order_by="Label.name"
    )

    __mapper_args__ = {"version_id_col": version}


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (
        UniqueConstraint("customer_id", "id"),
        {"info": sharded_by("customer_id")},
    )

    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[int] = mapped_column(ForeignKey("customer.id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(server_default="new")
    placed_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )
    doubled: Mapped[int] = mapped_column(Computed("number * 2", persisted=True))

    customer: Mapped[Customer] = relationship(back_populates="orders")
    lines: Mapped[list[Line]] = relationship(
        back_populates="order", order_by="Line.position", cascade="all, delete-orphan"
    )


class Line(Base):
    __tablename__ = "line"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "order_id"], ["orders.customer_id", "orders.id"]
        ),
        {"info": sharded_by("customer_id")},
    )

    customer_id: Mapped[int] = mapped_column(BigInteger)
    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    product: Mapped[str]

    order: Mapped[Order] = relationship(back_populates="lines")


Order.line_count = column_property(  # type: ignore[attr-defined]
    select(func.count(Line.position))
    .where(Line.order_id == Order.id)
    .correlate_except(Line)
    .scalar_subquery(),
    deferred=True,
)


class OfCustomer:
    """A mixin that declares the shard key for the classes that have it."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> dict[str, Any]:
        return {"info": sharded_by("customer_id")}

    @declared_attr
    @classmethod
    def customer_id(cls) -> Mapped[int]:
        return mapped_column(ForeignKey("customer.id", ondelete="CASCADE"))


class Note(OfCustomer, Base):
    __tablename__ = "note"

    id: Mapped[UUID] = locator_id()
    body: Mapped[str]


class Visit(OfCustomer, Base):
    __tablename__ = "visit"

    id: Mapped[UUID] = locator_id()
    number: Mapped[int]


class Label(Base):
    """Beside its customer, by a composite primary key."""

    __tablename__ = "label"
    __table_args__ = {"info": sharded_by("customer_id")}

    customer_id: Mapped[int] = mapped_column(
        ForeignKey("customer.id"), primary_key=True
    )
    name: Mapped[str] = mapped_column(primary_key=True)


customer_label = Table(
    "customer_label",
    Base.metadata,
    Column("customer_id", BigInteger, ForeignKey("customer.id"), primary_key=True),
    Column("label_name", String, primary_key=True),
    ForeignKeyConstraint(
        ["customer_id", "label_name"], ["label.customer_id", "label.name"]
    ),
    info=sharded_by("customer_id"),
)


class Account(Base):
    """Joined inheritance; the children are where their parents' keys put them."""

    __tablename__ = "account"
    __table_args__ = {"info": sharded_by("owner")}
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "account"}

    owner: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    balance: Mapped[int] = mapped_column(default=0)


class Savings(Account):
    __tablename__ = "savings"
    __mapper_args__ = {"polymorphic_identity": "savings"}

    owner: Mapped[str] = mapped_column(ForeignKey("account.owner"), primary_key=True)
    rate: Mapped[int]


class Loan(Account):
    __tablename__ = "loan"
    __mapper_args__ = {"polymorphic_identity": "loan"}

    owner: Mapped[str] = mapped_column(ForeignKey("account.owner"), primary_key=True)
    years: Mapped[int]


class Event(Base):
    """Single-table inheritance, with a uuid key made by a default."""

    __tablename__ = "event"
    __table_args__ = {"info": sharded_by("id")}
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "event"}

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    kind: Mapped[str] = mapped_column(String(10))
    text: Mapped[str]


class Alarm(Event):
    __mapper_args__ = {"polymorphic_identity": "alarm"}

    level: Mapped[int | None]


class Day(Base):
    __tablename__ = "day"
    __table_args__ = {"info": sharded_by("day")}

    day: Mapped[date] = mapped_column(primary_key=True)
    total: Mapped[int]


class Blob(Base):
    __tablename__ = "blob"
    __table_args__ = {"info": sharded_by("digest")}

    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    size: Mapped[int]


class Reading(Base):
    """A composite primary key of which the shard key is one part."""

    __tablename__ = "reading"
    __table_args__ = {"info": sharded_by("sensor")}

    sensor: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int]


class Ticket(Base):
    """Its shard key is counted by the home shard."""

    __tablename__ = "ticket"
    __table_args__ = {"info": sharded_by("id")}

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    title: Mapped[str]
    parent_id: Mapped[int | None] = mapped_column(BigInteger)
    parent: Mapped[Ticket | None] = relationship(
        primaryjoin="foreign(Ticket.parent_id) == remote(Ticket.id)"
    )


class Counted(Base):
    """The same with an identity column."""

    __tablename__ = "counted"
    __table_args__ = {"info": sharded_by("id")}

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    title: Mapped[str]


measurement = Table(
    "measurement",
    Base.metadata,
    Column("station", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("value", Integer, nullable=False),
    info=sharded_by("station"),
)
