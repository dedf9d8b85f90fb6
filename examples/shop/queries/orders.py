"""Orders as pages show them."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import joinedload, selectinload

from shop.models import Order


def of_customer(customer_id: UUID) -> Select[tuple[Order]]:
    """A customer's orders, newest first; for a page of any number."""
    return (
        select(Order)
        .where(Order.customer_id == customer_id)
        .order_by(Order.placed_at.desc(), Order.id.desc())
    )


def latest(
    *, limit: int = 20, before: tuple[datetime, UUID] | None = None
) -> Select[tuple[Order]]:
    """Everybody's latest orders, with their customers and lines.

    ``before`` is when the last order of the page before was placed, and its id. The
    lines come in a second statement: a row of the first is an order.
    """
    query = (
        select(Order)
        .options(joinedload(Order.customer), selectinload(Order.lines))
        .order_by(Order.placed_at.desc(), Order.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(tuple_(Order.placed_at, Order.id) < tuple_(*before))
    return query


def latest_at_once(*, limit: int = 20) -> Select[tuple[Order]]:
    """The same in one statement, in which an order has a row for each of its lines.

    Its result wants ``unique()``.
    """
    return (
        select(Order)
        .options(joinedload(Order.customer), joinedload(Order.lines))
        .order_by(Order.placed_at.desc(), Order.id.desc())
        .limit(limit)
    )
