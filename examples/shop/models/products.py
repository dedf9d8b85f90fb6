"""Sharded by product: stock is taken where it is kept."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from shardalchemy import locator_id, sharded_by
from shop.models.base import Base, Money, now


class MovementReason(StrEnum):
    OPENING = "opening"
    RESTOCK = "restock"
    SALE = "sale"
    CANCELLATION = "cancellation"


class Product(Base):
    __tablename__ = "products"
    __table_args__ = (
        CheckConstraint("stock >= 0", name="stock"),
        CheckConstraint("price > 0", name="price"),
        {"info": sharded_by("id")},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    name: Mapped[str]
    category_id: Mapped[int] = mapped_column(ForeignKey("categories.id"), index=True)
    price: Mapped[Money]
    currency: Mapped[str] = mapped_column(ForeignKey("currencies.code"))
    stock: Mapped[int]
    # Many buyers at once: they queue for the row before they ask PostgreSQL for it.
    hot: Mapped[bool] = mapped_column(default=False)


class StockMovement(Base):
    """A change of a product's stock; a product's movements sum to its stock."""

    __tablename__ = "stock_movements"
    __table_args__ = (
        # An order takes a product once and gives it back at most once.
        UniqueConstraint("product_id", "order_id", "reason"),
        {"info": sharded_by("product_id")},
    )

    id: Mapped[UUID] = locator_id()
    product_id: Mapped[UUID] = mapped_column(ForeignKey("products.id"))
    quantity: Mapped[int]
    reason: Mapped[MovementReason]
    # No foreign key: the order lives with its customer, maybe on another server.
    order_id: Mapped[UUID | None]
    moved_at: Mapped[datetime] = mapped_column(default=now)

    product: Mapped[Product] = relationship()
