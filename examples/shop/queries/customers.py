"""Customers as the shop's owner sees them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Date, Numeric, Select, cast, exists, extract, func, select

from shop.models import Customer, Order
from shop.queries.periods import NOT_SOLD, days_ago, sold, utc_month


def top(
    *, currency: str = "EUR", since: datetime | None = None, limit: int = 10
) -> Select[Any]:
    """The customers who spent most, with their orders and what they spent."""
    spent = func.sum(Order.total).label("spent")
    return (
        select(Customer.id, Customer.name, func.count().label("orders"), spent)
        .join(Order, Order.customer_id == Customer.id)
        .where(*sold(currency, since))
        .group_by(Customer.id, Customer.name)
        .order_by(spent.desc(), Customer.id)
        .limit(limit)
    )


def dormant(*, days: int = 30) -> Select[Any]:
    """Customers without an order in the last ``days`` days, and their last one's time.

    ``last_order_at`` is None of a customer who never ordered; those come last.
    """
    last = (
        select(func.max(Order.placed_at))
        .where(Order.customer_id == Customer.id)
        .scalar_subquery()
        .label("last_order_at")
    )
    recently = exists().where(
        Order.customer_id == Customer.id, Order.placed_at >= days_ago(days)
    )
    return (
        select(Customer.id, Customer.name, Customer.email, last)
        .where(~recently)
        .order_by(last.desc().nulls_last(), Customer.name, Customer.id)
    )


def never_ordered() -> Select[tuple[Customer]]:
    """Customers who registered and left it at that."""
    return (
        select(Customer)
        .outerjoin(Order, Order.customer_id == Customer.id)
        .where(Order.id.is_(None))
        .order_by(Customer.name, Customer.id)
    )


def repeat_buyers() -> Select[Any]:
    """How many customers bought, how many of them more than once, and their share."""
    orders = (
        select(Order.customer_id, func.count().label("orders"))
        .where(Order.status.not_in(NOT_SOLD))
        .group_by(Order.customer_id)
        .subquery()
    )
    buyers = func.count()
    repeated = func.count().filter(orders.c.orders > 1)
    return select(
        buyers.label("buyers"),
        repeated.label("repeat_buyers"),
        # Nobody's share is None, not a division by zero.
        (cast(repeated, Numeric) / func.nullif(buyers, 0)).label("share"),
    ).select_from(orders)


def days_between_orders() -> Select[Any]:
    """How many days buyers let pass between two orders: mean, shortest and longest."""
    gaps = select(
        (
            Order.placed_at
            - func.lag(Order.placed_at).over(
                partition_by=Order.customer_id, order_by=(Order.placed_at, Order.id)
            )
        ).label("gap")
    ).subquery()
    days = extract("epoch", gaps.c.gap) / 86400
    return select(
        func.count(gaps.c.gap).label("gaps"),
        func.avg(days).label("mean"),
        func.min(days).label("shortest"),
        func.max(days).label("longest"),
    )


def cohorts() -> Select[Any]:
    """By the month of their first order: how many customers ordered in which month.

    ``month`` counts from the first, which is 0 and has the whole cohort in it.
    """
    firsts = (
        select(
            Order.customer_id,
            utc_month(func.min(Order.placed_at)).label("cohort"),
        )
        .group_by(Order.customer_id)
        .cte("firsts")
    )
    active = (
        select(
            firsts.c.cohort,
            Order.customer_id,
            utc_month(Order.placed_at).label("month"),
            Order.total,
        )
        .join(firsts, firsts.c.customer_id == Order.customer_id)
        .cte("active")
    )
    # Of two first days of months; age() gives whole years and months.
    age = func.age(active.c.month, active.c.cohort)
    month = extract("year", age) * 12 + extract("month", age)
    return (
        select(
            cast(active.c.cohort, Date).label("cohort"),
            month.label("month"),
            func.count(active.c.customer_id.distinct()).label("customers"),
            func.count().label("orders"),
            func.sum(active.c.total).label("revenue"),
        )
        .group_by(active.c.cohort, active.c.month)
        .order_by(active.c.cohort, active.c.month)
    )
