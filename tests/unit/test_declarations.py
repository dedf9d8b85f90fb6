"""What a model may declare, and the errors of what it may not."""

from __future__ import annotations

import datetime
import enum
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Computed,
    Date,
    Enum,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.dialects.postgresql import CITEXT, ExcludeConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column
from sqlmodel import Field, SQLModel

from shardalchemy import DeclarationError, locator_id, reference_table, sharded_by
from shardalchemy.schema import Kind, checked, placement_of


def table(name: str, metadata: MetaData, *items: Any, key: str = "id") -> Table:
    return Table(name, metadata, *items, info=sharded_by(key))


@pytest.mark.parametrize(
    ("type_", "family"),
    [
        (Integer(), "int8"),
        (BigInteger(), "int8"),
        (Text(), "text"),
        (String(20), "text"),
        (Uuid(), "uuid"),
        (LargeBinary(), "bytea"),
        (Date(), "date"),
    ],
)
def test_key_types(type_: Any, family: str) -> None:
    t = table("t", MetaData(), Column("id", type_, primary_key=True))
    placement = placement_of(t)
    assert placement.kind is Kind.SHARDED
    assert placement.pin is not None
    assert placement.pin.family == family


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "type_", [Float(), CHAR(3), Enum(Colour), CITEXT(), Uuid(native_uuid=False)]
)
def test_a_type_that_is_not_hashed_alike_is_refused(type_: Any) -> None:
    t = table("t", MetaData(), Column("id", type_, primary_key=True))
    with pytest.raises(DeclarationError, match="A shard key is"):
        placement_of(t)


def test_a_type_decorator_hashes_what_is_stored() -> None:
    class Cents(TypeDecorator[int]):
        impl = BigInteger
        cache_ok = True

        def process_bind_param(self, value: Any, dialect: Any) -> int:
            return int(value * 100)

    t = table("t", MetaData(), Column("id", Cents(), primary_key=True))
    plain = table("p", MetaData(), Column("id", BigInteger(), primary_key=True))
    pin, plain_pin = placement_of(t).pin, placement_of(plain).pin
    assert pin is not None
    assert plain_pin is not None
    assert pin.slot(1.5) == plain_pin.slot(150)


def test_an_unknown_column_is_named_with_those_there_are() -> None:
    t = table("t", MetaData(), Column("id", Integer, primary_key=True), key="nope")
    with pytest.raises(DeclarationError, match=r"'nope'.*it has id"):
        placement_of(t)


def refused(metadata: MetaData, match: str) -> None:
    with pytest.raises(DeclarationError, match=match):
        checked(metadata)


def test_a_nullable_key_is_refused() -> None:
    metadata = MetaData()
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("k", Integer),
        key="k",
    )
    refused(metadata, "may be NULL")


def test_a_key_outside_the_primary_key_is_refused() -> None:
    metadata = MetaData()
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("k", Integer, nullable=False),
        key="k",
    )
    refused(metadata, r"not part of its primary key \(id\).*locator_id")


def test_a_computed_key_is_refused() -> None:
    metadata = MetaData()
    table("t", metadata, Column("id", Integer, Computed("1 + 1"), primary_key=True))
    refused(metadata, "computed by the server")


@pytest.mark.parametrize(
    "unique",
    [
        UniqueConstraint("email", name="uq"),
        Index("uq", "email", unique=True),
        ExcludeConstraint(("email", "="), name="uq", using="gist"),
    ],
)
def test_a_unique_that_cannot_hold_across_shards_is_refused(unique: Any) -> None:
    metadata = MetaData()
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("email", Text),
        unique,
    )
    refused(metadata, "uq on .* cannot hold across shards")


def test_a_unique_with_the_key_in_it_holds() -> None:
    metadata = MetaData()
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("email", Text),
        UniqueConstraint("id", "email"),
    )
    checked(metadata)


def home(metadata: MetaData) -> Table:
    return Table("home", metadata, Column("id", Integer, primary_key=True))


def test_a_foreign_key_from_a_sharded_to_a_home_table_is_refused() -> None:
    metadata = MetaData()
    home(metadata)
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("h", ForeignKey("home.id")),
    )
    refused(metadata, "t → home: a sharded table cannot refer to a home table")


def test_a_foreign_key_from_a_home_to_a_sharded_table_is_refused() -> None:
    metadata = MetaData()
    table("t", metadata, Column("id", Integer, primary_key=True))
    Table(
        "home",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("t", ForeignKey("t.id")),
    )
    refused(metadata, "home → t: a home table cannot refer to a sharded table")


def test_a_foreign_key_that_may_cross_shards_is_refused() -> None:
    metadata = MetaData()
    table("p", metadata, Column("id", Integer, primary_key=True))
    table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("p", ForeignKey("p.id")),
    )
    refused(metadata, "t → p: the two rows may live on different shards")


def test_foreign_keys_between_equal_keys_and_to_reference_tables_hold() -> None:
    metadata = MetaData()
    Table("r", metadata, Column("c", Text, primary_key=True), info=reference_table())
    table("p", metadata, Column("id", Integer, primary_key=True))
    table(
        "t",
        metadata,
        Column("k", ForeignKey("p.id"), primary_key=True),
        Column("n", Integer, primary_key=True),
        Column("c", ForeignKey("r.c")),
        key="k",
    )
    kinds = [placement.kind for placement in checked(metadata)]
    assert sorted(kind.value for kind in kinds) == ["reference", "sharded", "sharded"]


class Base(DeclarativeBase):
    pass


class OfCustomer:
    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[int]

    @declared_attr.directive
    def __table_args__(cls) -> Any:
        return (
            UniqueConstraint("customer_id", "id"),
            {"info": sharded_by("customer_id")},
        )


class Order(OfCustomer, Base):
    __tablename__ = "orders"


class Line(OfCustomer, Base):
    __tablename__ = "lines"
    order_id: Mapped[UUID]

    @declared_attr.directive
    def __table_args__(cls) -> Any:
        return (
            ForeignKeyConstraint(
                ["customer_id", "order_id"], ["orders.customer_id", "orders.id"]
            ),
            {"info": sharded_by("customer_id")},
        )


class Person(Base):
    __tablename__ = "people"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Employee(Person):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    hired: Mapped[datetime.date]
    __mapper_args__ = {"polymorphic_identity": "employee"}


class Guest(Person):
    __mapper_args__ = {"polymorphic_identity": "guest"}


def test_a_mixin_declares_for_its_classes() -> None:
    assert placement_of(Order.__table__).column_name == "customer_id"
    assert set(placement_of(Order.__table__).pins) == {"customer_id", "id"}


def test_a_foreign_key_to_a_locator_pins_as_well() -> None:
    assert set(placement_of(Line.__table__).pins) == {"customer_id", "id", "order_id"}


def test_a_joined_inheritance_child_lives_beside_its_parent() -> None:
    placement = placement_of(Employee.__table__)
    assert placement.kind is Kind.SHARDED
    assert placement.column_name == "id"
    assert Guest.__table__ is Person.__table__
    checked(Base.metadata)


def test_a_locator_in_a_home_table_is_refused() -> None:
    class Other(DeclarativeBase):
        pass

    class Thing(Other):
        __tablename__ = "things"
        id: Mapped[UUID] = locator_id()

    refused(Other.metadata, "is a locator_id")


def test_a_sqlmodel_table_declares_as_any_other() -> None:
    class Wallet(SQLModel, table=True):
        __tablename__ = "wallets"
        __table_args__ = {"info": sharded_by("owner")}
        owner: str = Field(primary_key=True)

    assert placement_of(Wallet.__table__).kind is Kind.SHARDED


def test_info_of_another_shape_is_refused() -> None:
    t = Table("t", MetaData(), Column("id", Integer), info={"shardalchemy": "id"})
    with pytest.raises(DeclarationError, match=r"write\s+info=sharded_by"):
        placement_of(t)
