"""Running queries: all rows of a report, or one page of a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import Row, Select, func, select

from shardalchemy import ShardedSession as Session
from shop import queries
from shop.models import Order
from shop.services.customers import customer
from shop.services.orders import order

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, counted from 1, and how long the whole list is."""

    items: Sequence[T]
    number: int
    size: int
    total: int

    @property
    def pages(self) -> int:
        return -(-self.total // self.size)


def rows(session: Session, query: Select[Any]) -> Sequence[Row[Any]]:
    """Return all rows of a report."""
    return session.execute(query).all()


def objects(session: Session, query: Select[tuple[T]]) -> Sequence[T]:
    """Return all objects that ``query`` selects, each once."""
    return session.scalars(query).unique().all()


def page(
    session: Session, query: Select[tuple[T]], *, number: int = 1, size: int = 20
) -> Page[T]:
    """Return a page of the objects that ``query`` selects, none past the last."""
    whole = query.order_by(None).subquery()
    total = session.scalar(select(func.count()).select_from(whole))
    items = session.scalars(query.limit(size).offset((number - 1) * size)).all()
    return Page(items, number, size, total or 0)


def orders_page(
    session: Session, customer_id: UUID, *, number: int = 1, size: int = 20
) -> Page[Order]:
    """Return a numbered page of the customer's orders, newest first.

    ``order_history`` pages by the last order seen, which is quicker far back; this one
    can say how many pages there are.
    """
    customer(session, customer_id)
    query = queries.orders.of_customer(customer_id)
    return page(session, query, number=number, size=size)


def latest_orders(
    session: Session, *, limit: int = 20, before: UUID | None = None
) -> Sequence[Order]:
    """Return everybody's latest orders; ``before`` is the last id of the page before.

    The list goes on from where that order stands in it, by the time it was placed.
    """
    place = None
    if before is not None:
        last = order(session, before)
        place = (last.placed_at, last.id)
    return session.scalars(queries.orders.latest(limit=limit, before=place)).all()
