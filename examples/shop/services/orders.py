"""Orders: placed, shipped, cancelled, refunded, looked up.

Placing and cancelling write where the customer lives and where each product lives. It
is one transaction like any other here; that it spans servers shows nowhere below.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import delete, select

from shardalchemy import ShardedSession as Session
from shop.errors import EmptyCart, MixedCurrencies, NotFound, WrongStatus
from shop.models import Address, CartItem, Order, OrderLine, OrderStatus
from shop.services import carts, ledger, stock
from shop.services.customers import customer, locked_customer


def place_order(
    session: Session, customer_id: UUID, *, address_id: UUID, idempotency_key: str
) -> Order:
    """Turn the customer's cart into a paid order.

    A client that got no answer calls again with the same ``idempotency_key`` and gets
    the order that the first call placed.

    Raises ``OutOfStock``, ``EmptyCart`` or ``MixedCurrencies``, and ``NotFound`` for a
    customer, address or product that does not exist.
    """
    locked_customer(session, customer_id)
    placed = session.scalar(
        select(Order).where(
            Order.customer_id == customer_id, Order.idempotency_key == idempotency_key
        )
    )
    if placed is not None:
        return placed

    address = session.get(Address, address_id)
    if address is None or address.customer_id != customer_id:
        raise NotFound("address", address_id)
    quantities = {
        item.product_id: item.quantity for item in carts.items(session, customer_id)
    }
    if not quantities:
        raise EmptyCart
    products = stock.locked_products(session, quantities)
    stock.ensure_in_stock(products, quantities)
    currencies = {product.currency for product in products.values()}
    if len(currencies) > 1:
        raise MixedCurrencies(currencies)

    order = Order(
        customer_id=customer_id,
        address_id=address_id,
        idempotency_key=idempotency_key,
        currency=currencies.pop(),
        total=sum(products[ident].price * n for ident, n in quantities.items()),
        lines=[
            OrderLine(
                product_id=ident,
                product_name=products[ident].name,
                quantity=quantity,
                unit_price=products[ident].price,
            )
            for ident, quantity in quantities.items()
        ],
    )
    session.add(order)
    session.flush()  # the order has its id from here on
    stock.take(session, order, products, quantities)
    ledger.record_sale(session, order)
    session.execute(delete(CartItem).where(CartItem.customer_id == customer_id))
    session.flush()
    return order


def ship_order(session: Session, order_id: UUID) -> Order:
    """Hand a placed order over to the carrier; it can no longer be cancelled."""
    order = _locked_order(session, order_id, "shipped", OrderStatus.PLACED)
    order.status = OrderStatus.SHIPPED
    session.flush()
    return order


def cancel_order(session: Session, order_id: UUID) -> Order:
    """Undo a placed order: goods back to stock, money back to the customer."""
    order = _locked_order(session, order_id, "cancelled", OrderStatus.PLACED)
    order.status = OrderStatus.CANCELLED
    stock.put_back(session, order)
    ledger.reverse_sale(session, order)
    session.flush()
    return order


def refund_order(session: Session, order_id: UUID) -> Order:
    """Pay a shipped order back in full; the goods stay with the customer."""
    order = _locked_order(session, order_id, "refunded", OrderStatus.SHIPPED)
    order.status = OrderStatus.REFUNDED
    ledger.record_refund(session, order)
    session.flush()
    return order


def order(session: Session, order_id: UUID) -> Order:
    found = session.get(Order, order_id)
    if found is None:
        raise NotFound("order", order_id)
    return found


def order_history(
    session: Session, customer_id: UUID, *, limit: int = 20, before: UUID | None = None
) -> Sequence[Order]:
    """Return a page of the customer's orders, newest first.

    ``before`` is the last id of the page before. An order's id begins with the moment
    it was made, so that one customer's ids sort by time and pages stay put when a new
    order arrives.
    """
    customer(session, customer_id)
    statement = select(Order).where(Order.customer_id == customer_id)
    if before is not None:
        statement = statement.where(Order.id < before)
    return session.scalars(statement.order_by(Order.id.desc()).limit(limit)).all()


def _locked_order(
    session: Session, order_id: UUID, verb: str, required: OrderStatus
) -> Order:
    order = session.get(Order, order_id, with_for_update=True, populate_existing=True)
    if order is None:
        raise NotFound("order", order_id)
    if order.status is not required:
        raise WrongStatus(verb, order.status, required)
    return order
