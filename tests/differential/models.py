"""A schema that has a column of every kind and a table of every placement.

``Account`` and what belongs to it (`Purchase`, `Item`, `Specimen`) share a ring key;
``Event``, ``Label``, ``Device`` and ``Party`` are sharded by keys of their own, of
other types; ``Region`` is a reference table and ``Memo`` a home table.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Computed,
    ForeignKey,
    ForeignKeyConstraint,
    LargeBinary,
    Numeric,
    String,
    UniqueConstraint,
    func,
    select,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    composite,
    foreign,
    mapped_column,
    relationship,
)

from shardalchemy import locator_id, reference_table, sharded_by

__all__ = [
    "Account",
    "Base",
    "CountedAccount",
    "Device",
    "Event",
    "Firm",
    "Item",
    "Label",
    "Memo",
    "Party",
    "Person",
    "Point",
    "Purchase",
    "Region",
    "Specimen",
    "Status",
]


class Base(DeclarativeBase):
    pass


class Status(enum.Enum):
    """In an order that is not the alphabet's."""

    NEW = "new"
    PAID = "paid"
    CLOSED = "closed"
    ABORTED = "aborted"


class Code(sa.TypeDecorator[int]):
    """An int that is stored as text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> str | None:
        return None if value is None else f"c{value:03}"

    def process_result_value(self, value: str | None, dialect: Any) -> int | None:
        return None if value is None else int(value[1:])


class Cents(sa.TypeDecorator[decimal.Decimal]):
    """An amount that is stored as a whole number of cents."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else decimal.Decimal(int(value)) / 100


@dataclass
class Point:
    x: int | None
    y: int | None


class Region(Base):
    __tablename__ = "df_regions"
    __table_args__ = {"info": reference_table()}
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    v: Mapped[int | None]
    parent_code: Mapped[str | None] = mapped_column(ForeignKey("df_regions.code"))
    parent: Mapped[Region | None] = relationship(remote_side=lambda: Region.code)
    accounts: Mapped[list[Account]] = relationship(
        back_populates="region", order_by=lambda: Account.id
    )


class Account(Base):
    __tablename__ = "df_accounts"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str]
    email: Mapped[str | None] = mapped_column(String(80))
    v: Mapped[int | None]
    active: Mapped[bool | None]
    balance: Mapped[decimal.Decimal | None] = mapped_column(Numeric(12, 2))
    score: Mapped[float | None]
    status: Mapped[Status | None] = mapped_column(
        sa.Enum(
            Status, name="df_status", values_callable=lambda e: [m.value for m in e]
        )
    )
    joined: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    region_code: Mapped[str | None] = mapped_column(ForeignKey("df_regions.code"))
    region: Mapped[Region | None] = relationship(back_populates="accounts")
    purchases: Mapped[list[Purchase]] = relationship(
        back_populates="account",
        order_by=lambda: (Purchase.v.desc().nulls_last(), Purchase.id),
    )
    items: Mapped[list[Item]] = relationship(
        primaryjoin=lambda: Account.id == foreign(Item.account_id),
        viewonly=True,
        order_by=lambda: (Item.no, Item.purchase_id),
    )
    specimen: Mapped[Specimen | None] = relationship(
        primaryjoin=lambda: Account.id == foreign(Specimen.id), viewonly=True
    )
    # By a column that is no key of the events: these are on any shard.
    events: Mapped[list[Event]] = relationship(
        primaryjoin=lambda: Account.id == foreign(Event.account_id),
        viewonly=True,
        order_by=lambda: Event.id,
    )

    @hybrid_property
    def double(self) -> Any:
        return None if self.v is None else self.v * 2

    @double.inplace.expression
    @classmethod
    def _double(cls) -> Any:
        return cls.v * 2


Account.titled = column_property(  # type: ignore[attr-defined]
    Account.__table__.c.name
    + " ("
    + func.coalesce(Account.__table__.c.region_code, "-")
    + ")"
)


class Purchase(Base):
    __tablename__ = "df_purchases"
    __table_args__ = (
        UniqueConstraint("id", "account_id"),
        {"info": sharded_by("account_id")},
    )
    id: Mapped[uuid.UUID] = locator_id()
    account_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("df_accounts.id"))
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("df_purchases.id"))
    v: Mapped[int | None]
    status: Mapped[str]
    placed: Mapped[datetime.date]
    total: Mapped[decimal.Decimal] = mapped_column(Numeric(10, 2))
    tags: Mapped[list[str] | None] = mapped_column(pg.ARRAY(String))
    doc: Mapped[Any | None] = mapped_column(pg.JSONB(none_as_null=True))
    account: Mapped[Account] = relationship(back_populates="purchases")
    parent: Mapped[Purchase | None] = relationship(remote_side=lambda: Purchase.id)
    items: Mapped[list[Item]] = relationship(
        back_populates="purchase", order_by=lambda: Item.no
    )


class Item(Base):
    __tablename__ = "df_items"
    __table_args__ = (
        ForeignKeyConstraint(
            ["purchase_id", "account_id"],
            ["df_purchases.id", "df_purchases.account_id"],
        ),
        {"info": sharded_by("account_id")},
    )
    purchase_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    account_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]
    sku: Mapped[str]
    price: Mapped[decimal.Decimal | None] = mapped_column(Cents)
    purchase: Mapped[Purchase] = relationship(back_populates="items")


class Specimen(Base):
    """A column of every kind, beside the account of the same id."""

    __tablename__ = "df_specimens"
    __table_args__ = (
        CheckConstraint("t_char <> 'never'"),
        {"info": sharded_by("id")},
    )
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]
    i_small: Mapped[int | None] = mapped_column(sa.SmallInteger)
    i_int: Mapped[int | None]
    i_big: Mapped[int | None] = mapped_column(BigInteger)
    n_fixed: Mapped[decimal.Decimal | None] = mapped_column(Numeric(20, 6))
    n_free: Mapped[decimal.Decimal | None] = mapped_column(Numeric)
    f_real: Mapped[float | None] = mapped_column(sa.REAL)
    f_double: Mapped[float | None] = mapped_column(sa.Double)
    flag: Mapped[bool | None]
    t_text: Mapped[str | None] = mapped_column(sa.Text)
    t_varchar: Mapped[str | None] = mapped_column(sa.VARCHAR(40))
    t_char: Mapped[str | None] = mapped_column(sa.CHAR(6))
    t_c: Mapped[str | None] = mapped_column(sa.Text(collation="C"))
    d_date: Mapped[datetime.date | None]
    d_time: Mapped[datetime.time | None]
    d_timetz: Mapped[datetime.time | None] = mapped_column(sa.Time(timezone=True))
    d_stamp: Mapped[datetime.datetime | None]
    d_stamptz: Mapped[datetime.datetime | None] = mapped_column(
        sa.DateTime(timezone=True)
    )
    d_span: Mapped[datetime.timedelta | None] = mapped_column(sa.Interval)
    u: Mapped[uuid.UUID | None]
    raw: Mapped[bytes | None] = mapped_column(LargeBinary)
    doc: Mapped[Any | None] = mapped_column(pg.JSONB(none_as_null=True))
    numbers: Mapped[list[int] | None] = mapped_column(pg.ARRAY(sa.Integer))
    span: Mapped[pg.Range[int] | None] = mapped_column(pg.INT4RANGE)
    address: Mapped[ipaddress.IPv4Address | None] = mapped_column(pg.INET)
    body: Mapped[str | None]
    words: Mapped[str | None] = mapped_column(
        pg.TSVECTOR,
        Computed(
            "to_tsvector('simple'::regconfig, coalesce(body, ''))", persisted=True
        ),
    )
    code: Mapped[int | None] = mapped_column(Code(8))
    point: Mapped[Point] = composite(
        mapped_column("x", sa.Integer), mapped_column("y", sa.Integer)
    )


class Event(Base):
    """Sharded by its own uuid, so away from the account that it names."""

    __tablename__ = "df_events"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    account_id: Mapped[int | None] = mapped_column(BigInteger)
    v: Mapped[int | None]
    kind: Mapped[str]
    at: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True))
    account: Mapped[Account | None] = relationship(
        primaryjoin=lambda: foreign(Event.account_id) == Account.id,
        viewonly=True,
    )


class Label(Base):
    __tablename__ = "df_labels"
    __table_args__ = {"info": sharded_by("label")}
    label: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[int | None] = mapped_column(BigInteger)
    v: Mapped[int | None]


class Device(Base):
    __tablename__ = "df_devices"
    __table_args__ = {"info": sharded_by("code")}
    code: Mapped[int] = mapped_column(Code(20), primary_key=True)
    account_id: Mapped[int | None] = mapped_column(BigInteger)
    v: Mapped[int | None]


class Party(Base):
    __tablename__ = "df_parties"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    type: Mapped[str]
    v: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "type", "polymorphic_identity": "party"}


class Person(Party):
    """In its parent's table."""

    nick: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "person"}


class Firm(Party):
    """In a table of its own beside its parent's."""

    __tablename__ = "df_firms"
    id: Mapped[int] = mapped_column(ForeignKey("df_parties.id"), primary_key=True)
    vat: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "firm"}


class Memo(Base):
    """A home table that names accounts without a constraint."""

    __tablename__ = "df_memos"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    account_id: Mapped[int | None] = mapped_column(BigInteger)
    v: Mapped[int | None]
    body: Mapped[str]


class CountedAccount(Base):
    """Accounts with a column that counts rows beside them."""

    __table__ = Account.__table__
    counted: Mapped[int] = column_property(
        select(func.count(Purchase.id))
        .where(Purchase.account_id == Account.__table__.c.id)
        .correlate(Account.__table__)
        .scalar_subquery(),
    )
    __mapper_args__ = {"exclude_properties": ["email", "score"]}
