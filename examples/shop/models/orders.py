"""Sharded by customer: orders with their lines, payments and ledger entries.

A debit is positive in the ledger, a credit negative.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from shardalchemy import locator_id, sharded_by
from shop.models.base import Base, Money, now
from shop.models.customers import Customer


class OrderStatus(StrEnum):
    PLACED = "placed"
    SHIPPED = "shipped"
    CANCELLED = "cancelled"
    REFUNDED = "refunded"


class PaymentKind(StrEnum):
    CHARGE = "charge"
    REFUND = "refund"


class Account(StrEnum):
    RECEIVABLE = "customer:receivable"
    SALES = "sales"
    CASH = "cash"
    REFUNDS = "refunds"


class Posting(StrEnum):
    SALE = "sale"
    CHARGE = "charge"
    CANCELLATION = "cancellation"
    CREDIT_NOTE = "credit note"
    REFUND = "refund"


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (
        UniqueConstraint("customer_id", "id"),
        UniqueConstraint("customer_id", "idempotency_key"),
        # Both columns, so that an order cannot go to another customer's address.
        ForeignKeyConstraint(
            ["customer_id", "address_id"], ["addresses.customer_id", "addresses.id"]
        ),
        {"info": sharded_by("customer_id")},
    )

    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[UUID] = mapped_column(ForeignKey("customers.id"))
    address_id: Mapped[UUID]
    idempotency_key: Mapped[str]
    status: Mapped[OrderStatus] = mapped_column(default=OrderStatus.PLACED)
    currency: Mapped[str] = mapped_column(ForeignKey("currencies.code"))
    total: Mapped[Money]
    placed_at: Mapped[datetime] = mapped_column(default=now)

    customer: Mapped[Customer] = relationship()
    lines: Mapped[list[OrderLine]] = relationship(
        back_populates="order",
        order_by="[OrderLine.product_name, OrderLine.product_id]",
    )
    payments: Mapped[list[Payment]] = relationship(
        back_populates="order", order_by="Payment.id"
    )
    entries: Mapped[list[LedgerEntry]] = relationship(
        back_populates="order", order_by="LedgerEntry.id"
    )


class OrderLine(Base):
    """A product as it was bought: its name and price do not follow the product's."""

    __tablename__ = "order_lines"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "order_id"], ["orders.customer_id", "orders.id"]
        ),
        CheckConstraint("quantity > 0", name="quantity"),
        {"info": sharded_by("customer_id")},
    )

    customer_id: Mapped[UUID] = mapped_column(primary_key=True)
    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    product_id: Mapped[UUID] = mapped_column(primary_key=True)
    product_name: Mapped[str]
    quantity: Mapped[int]
    unit_price: Mapped[Money]

    order: Mapped[Order] = relationship(back_populates="lines")


class Payment(Base):
    __tablename__ = "payments"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "order_id"], ["orders.customer_id", "orders.id"]
        ),
        UniqueConstraint("customer_id", "order_id", "kind"),
        {"info": sharded_by("customer_id")},
    )

    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[UUID]
    order_id: Mapped[UUID]
    kind: Mapped[PaymentKind]
    amount: Mapped[Money]
    currency: Mapped[str] = mapped_column(ForeignKey("currencies.code"))
    paid_at: Mapped[datetime] = mapped_column(default=now)

    order: Mapped[Order] = relationship(back_populates="payments")


class LedgerEntry(Base):
    """One side of a posting; the entries of a posting sum to zero."""

    __tablename__ = "ledger_entries"
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_id", "order_id"], ["orders.customer_id", "orders.id"]
        ),
        UniqueConstraint("customer_id", "order_id", "posting", "account"),
        {"info": sharded_by("customer_id")},
    )

    id: Mapped[UUID] = locator_id()
    customer_id: Mapped[UUID]
    order_id: Mapped[UUID]
    posting: Mapped[Posting]
    account: Mapped[Account]
    amount: Mapped[Money]
    currency: Mapped[str] = mapped_column(ForeignKey("currencies.code"))
    posted_at: Mapped[datetime] = mapped_column(default=now)

    order: Mapped[Order] = relationship(back_populates="entries")
