"""The use cases of the shop, as plain functions of a session.

None of them commits: the caller owns the transaction, so that a use case is whole or
has not happened, and several can be one transaction::

    with Session.begin() as session:
        order = place_order(session, customer_id, address_id=…, idempotency_key=…)

    async with AsyncSession.begin() as session:
        order = await session.run_sync(place_order, customer_id, …)

Everyone locks in the same order, so that no two use cases wait for each other: first
the customer, then the order, then products by rising id.
"""

from shop.services.carts import cart, put_in_cart, remove_from_cart
from shop.services.catalogue import (
    add_category,
    add_currency,
    add_product,
    browse,
    categories,
    product,
)
from shop.services.customers import add_address, addresses, customer, register
from shop.services.orders import (
    cancel_order,
    order,
    order_history,
    place_order,
    refund_order,
    ship_order,
)
from shop.services.pages import (
    Page,
    latest_orders,
    objects,
    orders_page,
    page,
    rows,
)
from shop.services.stock import restock

__all__ = [
    "Page",
    "add_address",
    "add_category",
    "add_currency",
    "add_product",
    "addresses",
    "browse",
    "cancel_order",
    "cart",
    "categories",
    "customer",
    "latest_orders",
    "objects",
    "order",
    "order_history",
    "orders_page",
    "page",
    "place_order",
    "product",
    "put_in_cart",
    "refund_order",
    "register",
    "remove_from_cart",
    "restock",
    "rows",
    "ship_order",
]
