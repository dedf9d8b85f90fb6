"""Conditions that the queries share: what counts as sold, and when."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Date, DateTime, cast, func

from shop.models import Order, OrderStatus

NOT_SOLD = (OrderStatus.CANCELLED, OrderStatus.REFUNDED)


def sold(
    currency: str, since: datetime | None = None, until: datetime | None = None
) -> Iterator[ColumnElement[bool]]:
    """Yield what makes an order a sale in ``currency``, from ``since`` to ``until``.

    The first moment is part of the period, the last is not.
    """
    yield Order.currency == currency
    yield Order.status.not_in(NOT_SOLD)
    if since is not None:
        yield Order.placed_at >= since
    if until is not None:
        yield Order.placed_at < until


def days_ago(days: int) -> ColumnElement[datetime]:
    """Return the moment ``days`` days before the transaction began, by the database."""
    return func.now() - timedelta(days=days)


def utc_day(moment: ColumnElement[datetime]) -> ColumnElement[object]:
    """Return the day of a moment in UTC, whatever the connection's time zone is."""
    return cast(func.timezone("UTC", moment), Date)


def utc_month(moment: ColumnElement[datetime]) -> ColumnElement[object]:
    """Return the first day of a moment's month in UTC."""
    return cast(
        func.date_trunc("month", func.timezone("UTC", moment, type_=DateTime)), Date
    )
