"""Products: found by a visitor, watched by the shop."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import Select, exists, func, select

from shop.models import (
    Category,
    MovementReason,
    Order,
    OrderLine,
    Product,
    StockMovement,
)
from shop.queries.periods import NOT_SOLD, days_ago


class ProductOrder(StrEnum):
    """How found products are ordered."""

    NAME = "name"
    CHEAPEST = "cheapest"
    DEAREST = "dearest"


_ORDERS = {
    ProductOrder.NAME: Product.name,
    ProductOrder.CHEAPEST: Product.price,
    ProductOrder.DEAREST: Product.price.desc(),
}


def search(
    *,
    text: str = "",
    category_slug: str | None = None,
    min_price: int | None = None,
    max_price: int | None = None,
    in_stock: bool = False,
    order: ProductOrder = ProductOrder.NAME,
) -> Select[tuple[Product]]:
    """Products whose names contain every word of ``text``, in any case."""
    query = select(Product).order_by(_ORDERS[order], Product.id)
    for word in text.split():
        query = query.where(Product.name.icontains(word, autoescape=True))
    if category_slug is not None:
        query = query.join(Category, Category.id == Product.category_id).where(
            Category.slug == category_slug
        )
    if min_price is not None:
        query = query.where(Product.price >= min_price)
    if max_price is not None:
        query = query.where(Product.price <= max_price)
    if in_stock:
        query = query.where(Product.stock > 0)
    return query


def stock_below(threshold: int, *, days: int = 30) -> Select[Any]:
    """Products of which there are fewer than ``threshold``, the scarcest first.

    ``sold`` is how many were taken from stock within the last ``days`` days.
    """
    sold = (
        select(func.coalesce(-func.sum(StockMovement.quantity), 0))
        .where(
            StockMovement.product_id == Product.id,
            StockMovement.reason == MovementReason.SALE,
            StockMovement.moved_at >= days_ago(days),
        )
        .scalar_subquery()
    )
    return (
        select(
            Product.id,
            Product.name,
            Category.name.label("category"),
            Product.stock,
            sold.label("sold"),
        )
        .join(Category, Category.id == Product.category_id)
        .where(Product.stock < threshold)
        .order_by(Product.stock, Product.name, Product.id)
    )


def unsold(*, days: int = 90, limit: int = 100) -> Select[Any]:
    """Products that nobody has bought for ``days`` days, the costliest stock first."""
    bought = (
        exists()
        .where(OrderLine.product_id == Product.id)
        .where(
            Order.customer_id == OrderLine.customer_id, Order.id == OrderLine.order_id
        )
        .where(Order.status.not_in(NOT_SOLD), Order.placed_at >= days_ago(days))
    )
    value = (Product.stock * Product.price).label("value")
    return (
        select(Product.id, Product.name, Product.stock, value)
        .where(~bought)
        .order_by(value.desc(), Product.id)
        .limit(limit)
    )


def category_overview() -> Select[Any]:
    """Every category, an empty one too, with its products and what is in stock."""
    return (
        select(
            Category.slug,
            Category.name,
            func.count(Product.id).label("products"),
            func.count(Product.id).filter(Product.stock > 0).label("available"),
            func.coalesce(func.sum(Product.stock * Product.price), 0).label("value"),
            func.min(Product.price).label("cheapest"),
            func.max(Product.price).label("dearest"),
        )
        .outerjoin(Product, Product.category_id == Category.id)
        .group_by(Category.id, Category.slug, Category.name)
        .order_by(Category.name)
    )
