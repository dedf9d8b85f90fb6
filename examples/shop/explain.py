"""How the shop's typical statements are answered: ``python -m shop explain``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, select

from shardalchemy import ShardedSession, UnsupportedQueryError
from shop import queries
from shop.models import Customer, Product


def statements(customer_id: UUID, product_ids: list[UUID]) -> Mapping[str, Select[Any]]:
    """Return ten statements by what a person would call them, simplest first."""
    month = datetime.now(UTC) - timedelta(days=30)
    found = queries.products.search(text="lamp", max_price=10_000)
    return {
        "a customer": select(Customer).where(Customer.id == customer_id),
        "a page of a customer's orders": queries.orders.of_customer(customer_id)
        .limit(20)
        .offset(20),
        "the products of a cart": select(Product).where(Product.id.in_(product_ids)),
        "the second page of a search": found.limit(20).offset(20),
        "how many products a search finds": select(func.count()).select_from(
            found.order_by(None).subquery()
        ),
        "the latest orders with their lines": queries.orders.latest_at_once(),
        "best sellers of a month": queries.sales.best_sellers(since=month),
        "customers without an order in 30 days": queries.customers.dormant(),
        "revenue by day and category, with running totals": (
            queries.sales.revenue_by_day(since=month)
        ),
        "the median order": queries.sales.order_values(),
    }


def explained(
    session: ShardedSession, named: Mapping[str, Select[Any]]
) -> Iterator[tuple[str, str]]:
    """Yield each statement's name, and its plan or why it is refused; run nothing."""
    for name, statement in named.items():
        try:
            yield name, str(session.explain(statement))
        except UnsupportedQueryError as refusal:
            yield name, f"Refused: {refusal}"
