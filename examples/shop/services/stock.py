"""Taking products from stock and putting them back.

Stock changes only here, and only together with a movement that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from uuid import UUID

from sqlalchemy import select

from shardalchemy import ShardedSession as Session
from shop.errors import NotFound, OutOfStock
from shop.models import MovementReason, Order, Product, StockMovement

# Seconds that a buyer queues for a hot product before being turned away.
QUEUE_TIMEOUT = 5.0


def locked_products(
    session: Session, product_ids: Iterable[UUID]
) -> dict[UUID, Product]:
    """Return products that stay as they are until this transaction ends.

    They are locked one by one in the order of their ids. Everyone who locks several
    does so, and therefore nobody waits in a circle.
    """
    return {ident: _locked_product(session, ident) for ident in sorted(product_ids)}


def _locked_product(session: Session, product_id: UUID) -> Product:
    hot = session.scalar(select(Product.hot).where(Product.id == product_id))
    if hot is None:
        raise NotFound("product", product_id)
    if hot:
        return session.lock_row(Product, product_id, timeout=QUEUE_TIMEOUT)
    return session.get_one(
        Product, product_id, with_for_update=True, populate_existing=True
    )


def ensure_in_stock(
    products: Mapping[UUID, Product], quantities: Mapping[UUID, int]
) -> None:
    """Raise ``OutOfStock`` with every product of which there is not enough."""
    short = [
        ident
        for ident, quantity in quantities.items()
        if products[ident].stock < quantity
    ]
    if short:
        raise OutOfStock(short)


def take(
    session: Session,
    order: Order,
    products: Mapping[UUID, Product],
    quantities: Mapping[UUID, int],
) -> None:
    """Take an order's products, locked before, from stock."""
    for ident, quantity in quantities.items():
        _move(session, products[ident], -quantity, MovementReason.SALE, order.id)


def put_back(session: Session, order: Order) -> None:
    """Return everything that an order had taken."""
    quantities = {line.product_id: line.quantity for line in order.lines}
    for ident, product in locked_products(session, quantities).items():
        _move(
            session, product, quantities[ident], MovementReason.CANCELLATION, order.id
        )


def restock(session: Session, product_id: UUID, quantity: int) -> Product:
    """Add a delivery of a product to its stock."""
    product = _locked_product(session, product_id)
    _move(session, product, quantity, MovementReason.RESTOCK)
    session.flush()
    return product


def _move(
    session: Session,
    product: Product,
    quantity: int,
    reason: MovementReason,
    order_id: UUID | None = None,
) -> None:
    product.stock += quantity
    session.add(
        StockMovement(
            product=product, quantity=quantity, reason=reason, order_id=order_id
        )
    )
