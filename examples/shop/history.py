"""A past for a generated shop: orders over months, so that reports have something.

Products are bought very unequally, some never; customers are loyal, have stopped, or
never bought. As everywhere in the generated shop, equal seeds make equal pasts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import accumulate
from random import Random
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop.data import ShopData
from shop.models import (
    Address,
    Customer,
    MovementReason,
    Order,
    OrderLine,
    OrderStatus,
    Product,
    StockMovement,
)
from shop.services import ledger

# Of each ten customers and products, those that stay without an order.
IDLE = 2
# Pieces of a product that come when there are too few for an order.
DELIVERY = 50
STATUSES = {
    OrderStatus.SHIPPED: 70,
    OrderStatus.PLACED: 18,
    OrderStatus.CANCELLED: 7,
    OrderStatus.REFUNDED: 5,
}


@dataclass(frozen=True, slots=True)
class OrderData:
    """One order; ``quantities`` by product."""

    number: int
    customer_id: UUID
    placed_at: datetime
    status: OrderStatus
    quantities: Mapping[UUID, int]


def generate_orders(
    shop: ShopData, *, orders: int, until: datetime, days: int = 180, seed: int = 1
) -> list[OrderData]:
    """Return ``orders`` orders of the ``days`` days before ``until``, oldest first.

    A third of the buyers bought in the first half of that time only.
    """
    random = Random(seed)
    products = _some(random, [product.id for product in shop.products])
    # The second is bought half as often as the first, the third a third as often.
    weights = list(accumulate(1 / place for place in range(1, len(products) + 1)))
    buyers = _some(random, [customer.id for customer in shop.customers])
    loyal = set(random.sample(buyers, len(buyers) * 2 // 3))
    found = []
    for _ in range(orders):
        customer_id = random.choice(buyers)
        share = random.random() if customer_id in loyal else 0.5 + random.random() / 2
        basket = random.choices(products, cum_weights=weights, k=random.randint(1, 5))
        found.append(
            (
                until - share * timedelta(days=days),
                customer_id,
                *random.choices(list(STATUSES), list(STATUSES.values())),
                {ident: random.randint(1, 4) for ident in sorted(set(basket))},
            )
        )
    return [
        OrderData(number, customer_id, placed_at, status, quantities)
        for number, (placed_at, customer_id, status, quantities) in enumerate(
            sorted(found, key=lambda order: order[0])
        )
    ]


def load_orders(
    session_factory: sessionmaker[ShardedSession], orders: Iterable[OrderData]
) -> None:
    """Store orders with all that belongs to them, as if they had been placed then."""
    with session_factory() as session:
        found = session.execute(select(Address.customer_id, Address.id))
        addresses: dict[UUID, UUID] = dict(found.all())
    for number, wave in enumerate(_waves(orders)):
        wanted = {ident for data in wave for ident in data.quantities}
        with session_factory.begin() as session:
            found = session.scalars(select(Product).where(Product.id.in_(wanted)))
            products = {product.id: product for product in found}
            placed = [
                (data, _order(data, addresses[data.customer_id], products))
                for data in wave
            ]
            session.add_all(order for _, order in placed)
            session.flush()  # the orders have their ids from here on
            for data, order in placed:
                _move_stock(session, data, order, products)
                _book(session, data, order)
            if number == 0:
                _register_before(session, wave)


def _some(random: Random, idents: Sequence[UUID]) -> list[UUID]:
    """Return the identities that are not idle, in an order of their own."""
    return random.sample(idents, max(1, len(idents) * (10 - IDLE) // 10))


def _waves(orders: Iterable[OrderData]) -> Iterator[Sequence[OrderData]]:
    """Yield every customer's first order, then every second, and so on.

    Each is stored before the next, so that a customer's ids sort as their orders do.
    """
    waves: dict[int, list[OrderData]] = defaultdict(list)
    seen: Counter[UUID] = Counter()
    for data in orders:
        waves[seen[data.customer_id]].append(data)
        seen[data.customer_id] += 1
    yield from waves.values()


def _order(
    data: OrderData, address_id: UUID, products: Mapping[UUID, Product]
) -> Order:
    bought = [(products[ident], n) for ident, n in data.quantities.items()]
    return Order(
        customer_id=data.customer_id,
        address_id=address_id,
        idempotency_key=f"history {data.number}",
        currency=bought[0][0].currency,
        total=sum(product.price * quantity for product, quantity in bought),
        placed_at=data.placed_at,
        status=data.status,
        lines=[
            OrderLine(
                product_id=product.id,
                product_name=product.name,
                quantity=quantity,
                unit_price=product.price,
            )
            for product, quantity in bought
        ],
        payments=[],
        entries=[],
    )


def _move_stock(
    session: ShardedSession,
    data: OrderData,
    order: Order,
    products: Mapping[UUID, Product],
) -> None:
    for ident, quantity in data.quantities.items():
        product = products[ident]
        moves = [(MovementReason.SALE, -quantity, order.id)]
        if product.stock < quantity:
            moves.insert(0, (MovementReason.RESTOCK, DELIVERY, None))
        if data.status is OrderStatus.CANCELLED:
            moves.append((MovementReason.CANCELLATION, quantity, order.id))
        for reason, change, order_id in moves:
            product.stock += change
            session.add(
                StockMovement(
                    product=product,
                    quantity=change,
                    reason=reason,
                    order_id=order_id,
                    moved_at=data.placed_at,
                )
            )


def _book(session: ShardedSession, data: OrderData, order: Order) -> None:
    ledger.record_sale(session, order)
    if data.status is OrderStatus.CANCELLED:
        ledger.reverse_sale(session, order)
    elif data.status is OrderStatus.REFUNDED:
        ledger.record_refund(session, order)
    for payment in order.payments:
        payment.paid_at = data.placed_at
    for entry in order.entries:
        entry.posted_at = data.placed_at


def _register_before(session: ShardedSession, firsts: Sequence[OrderData]) -> None:
    """Have customers registered a day before their first order."""
    first = {data.customer_id: data.placed_at for data in firsts}
    for customer in session.scalars(select(Customer).where(Customer.id.in_(first))):
        customer.registered_at = first[customer.id] - timedelta(days=1)
