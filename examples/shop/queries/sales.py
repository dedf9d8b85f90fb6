"""What was sold: by product, by day and category, by basket."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Select, func, select

from shop.models import Category, Order, OrderLine, Product
from shop.queries.periods import NOT_SOLD, sold, utc_day

_UNITS = func.sum(OrderLine.quantity)
_REVENUE = func.sum(OrderLine.quantity * OrderLine.unit_price)


def best_sellers(
    *,
    by: Literal["units", "revenue"] = "units",
    currency: str = "EUR",
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 10,
) -> Select[Any]:
    """The products of which most was sold, in pieces or in money.

    The name is the one that buyers saw: it is in the order's lines, so that no product
    has to be looked up.
    """
    units, revenue = _UNITS.label("units"), _REVENUE.label("revenue")
    measure = {"units": units, "revenue": revenue}[by]
    return (
        select(
            OrderLine.product_id,
            func.max(OrderLine.product_name).label("name"),
            units,
            revenue,
        )
        .join(OrderLine.order)
        .where(*sold(currency, since, until))
        .group_by(OrderLine.product_id)
        .order_by(measure.desc(), OrderLine.product_id)
        .limit(limit)
    )


def category_leaders(*, currency: str = "EUR", places: int = 3) -> Select[Any]:
    """The products that earn most in each category, and their place in it."""
    revenue = _REVENUE.label("revenue")
    ranked = (
        select(
            Category.name.label("category"),
            func.row_number()
            .over(
                partition_by=Category.id, order_by=(_REVENUE.desc(), Product.id.asc())
            )
            .label("place"),
            Product.id.label("product_id"),
            Product.name,
            revenue,
        )
        .select_from(OrderLine)
        .join(OrderLine.order)
        .join(Product, Product.id == OrderLine.product_id)
        .join(Category, Category.id == Product.category_id)
        .where(*sold(currency))
        .group_by(Category.id, Category.name, Product.id, Product.name)
        .subquery()
    )
    return (
        select(ranked)
        .where(ranked.c.place <= places)
        .order_by(ranked.c.category, ranked.c.place)
    )


def revenue_by_day(
    *,
    currency: str = "EUR",
    since: datetime | None = None,
    until: datetime | None = None,
) -> Select[Any]:
    """Revenue by day and category, with each category's total up to that day.

    Beside it the share of the day's whole revenue, as a fraction of one.
    """
    lines = (
        select(
            utc_day(Order.placed_at).label("day"),
            Category.name.label("category"),
            (OrderLine.quantity * OrderLine.unit_price).label("amount"),
        )
        .select_from(OrderLine)
        .join(OrderLine.order)
        .join(Product, Product.id == OrderLine.product_id)
        .join(Category, Category.id == Product.category_id)
        .where(*sold(currency, since, until))
        .cte("lines")
    )
    day, category = lines.c.day, lines.c.category
    revenue = func.sum(lines.c.amount)
    return (
        select(
            day,
            category,
            revenue.label("revenue"),
            func.sum(revenue)
            .over(partition_by=category, order_by=day)
            .label("running_total"),
            (revenue / func.sum(revenue).over(partition_by=day)).label("share_of_day"),
        )
        .group_by(day, category)
        .order_by(day, category)
    )


def revenue_by_week(*, currency: str = "EUR") -> Select[Any]:
    """Orders and revenue by week, with all weeks' total up to it.

    ``change`` is the difference to the week before that had a sale; the first has none.
    """
    week = func.date_trunc("week", func.timezone("UTC", Order.placed_at)).label("week")
    weeks = (
        select(
            week, func.count().label("orders"), func.sum(Order.total).label("revenue")
        )
        .where(*sold(currency))
        .group_by(week)
        .subquery()
    )
    revenue = weeks.c.revenue
    return select(
        weeks,
        func.sum(revenue).over(order_by=weeks.c.week).label("running_total"),
        (revenue - func.lag(revenue).over(order_by=weeks.c.week)).label("change"),
    ).order_by(weeks.c.week)


def basket() -> Select[Any]:
    """The average order by currency: its value, its lines, its pieces."""
    lines = (
        select(
            OrderLine.customer_id,
            OrderLine.order_id,
            func.count().label("lines"),
            func.sum(OrderLine.quantity).label("pieces"),
        )
        .group_by(OrderLine.customer_id, OrderLine.order_id)
        .subquery()
    )
    return (
        select(
            Order.currency,
            func.count().label("orders"),
            func.avg(Order.total).label("value"),
            func.avg(lines.c.lines).label("lines"),
            func.avg(lines.c.pieces).label("pieces"),
        )
        .join(
            lines,
            (lines.c.customer_id == Order.customer_id) & (lines.c.order_id == Order.id),
        )
        .where(Order.status.not_in(NOT_SOLD))
        .group_by(Order.currency)
        .order_by(Order.currency)
    )


def order_values() -> Select[Any]:
    """The median order by currency, between the values of the outer tenths."""
    return (
        select(
            Order.currency,
            *(
                func.percentile_cont(share).within_group(Order.total).label(name)
                for name, share in (("low", 0.1), ("median", 0.5), ("high", 0.9))
            ),
        )
        .where(Order.status.not_in(NOT_SOLD))
        .group_by(Order.currency)
        .order_by(Order.currency)
    )


def status_counts() -> Select[Any]:
    """How many orders are in which status, and what they come to."""
    return (
        select(
            Order.currency,
            Order.status,
            func.count().label("orders"),
            func.sum(Order.total).label("total"),
        )
        .group_by(Order.currency, Order.status)
        .order_by(Order.currency, Order.status)
    )
