"""A customer's cart: what they may order next, at today's prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from shardalchemy import ShardedSession as Session
from shop.errors import NotFound
from shop.models import CartItem, Product
from shop.services.catalogue import product
from shop.services.customers import customer, locked_customer


@dataclass(frozen=True, slots=True)
class CartLine:
    product: Product
    quantity: int

    @property
    def amount(self) -> int:
        return self.product.price * self.quantity


def put_in_cart(
    session: Session, customer_id: UUID, product_id: UUID, quantity: int
) -> CartItem:
    """Have ``quantity`` of a product in the cart, whatever was there before.

    Nothing is reserved: stock is taken when the order is placed.
    """
    locked_customer(session, customer_id)
    product(session, product_id)
    item = session.get(CartItem, (customer_id, product_id))
    if item is None:
        item = CartItem(customer_id=customer_id, product_id=product_id)
        session.add(item)
    item.quantity = quantity
    session.flush()
    return item


def remove_from_cart(session: Session, customer_id: UUID, product_id: UUID) -> None:
    locked_customer(session, customer_id)
    item = session.get(CartItem, (customer_id, product_id))
    if item is None:
        raise NotFound("cart item for product", product_id)
    session.delete(item)
    session.flush()


def cart(session: Session, customer_id: UUID) -> list[CartLine]:
    """Return the cart by product name."""
    customer(session, customer_id)
    quantities = {
        item.product_id: item.quantity for item in items(session, customer_id)
    }
    products = session.scalars(
        select(Product)
        .where(Product.id.in_(quantities))
        .order_by(Product.name, Product.id)
    )
    return [CartLine(product, quantities[product.id]) for product in products]


def items(session: Session, customer_id: UUID) -> Sequence[CartItem]:
    """Return the cart's items by product id."""
    return session.scalars(
        select(CartItem)
        .where(CartItem.customer_id == customer_id)
        .order_by(CartItem.product_id)
    ).all()
