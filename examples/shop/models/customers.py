"""Sharded by customer: who they are, where they live, what they are about to buy."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, ForeignKey, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from shardalchemy import locator_id, sharded_by
from shop.models.base import Base, now


class EmailClaim(Base):
    """Makes e-mail addresses unique over all customers.

    A unique constraint on ``customers.email`` could only see one server's customers;
    a row whose shard key is the address itself meets every other claim to it.
    """

    __tablename__ = "email_claims"
    __table_args__ = ({"info": sharded_by("email")},)

    email: Mapped[str] = mapped_column(Text, primary_key=True)
    customer_id: Mapped[UUID]


class Customer(Base):
    __tablename__ = "customers"
    __table_args__ = ({"info": sharded_by("id")},)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    name: Mapped[str]
    email: Mapped[str]
    registered_at: Mapped[datetime] = mapped_column(default=now)

    addresses: Mapped[list[Address]] = relationship(back_populates="customer")


class Address(Base):
    __tablename__ = "addresses"
    __table_args__ = (
        UniqueConstraint("customer_id", "id"),
        {"info": sharded_by("customer_id")},
    )

    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id"))
    street: Mapped[str]
    postal_code: Mapped[str]
    city: Mapped[str]

    customer: Mapped[Customer] = relationship(back_populates="addresses")


class CartItem(Base):
    __tablename__ = "cart_items"
    __table_args__ = (
        CheckConstraint("quantity > 0", name="quantity"),
        {"info": sharded_by("customer_id")},
    )

    customer_id: Mapped[UUID] = mapped_column(
        ForeignKey("customers.id"), primary_key=True
    )
    # No foreign key to products, here and in order_lines: PostgreSQL checks foreign
    # keys within one server, and the product is usually on another.
    product_id: Mapped[UUID] = mapped_column(primary_key=True)
    quantity: Mapped[int]
