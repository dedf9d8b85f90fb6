"""Sets the scene of a test: what must exist before it, each committed on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from uuid import UUID, uuid4

import psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop import services
from shop.models import MovementReason, Product, StockMovement
from shop.services.catalogue import category

CATEGORY = "lighting"

TRUNCATE = """
TRUNCATE cart_items, ledger_entries, payments, order_lines, orders, addresses,
         customers, email_claims, stock_movements, products
"""


@dataclass(frozen=True, slots=True)
class Buyer:
    id: UUID
    address_id: UUID


class Stage:
    def __init__(self, session_factory: sessionmaker[ShardedSession]) -> None:
        self._factory = session_factory
        self._numbers = count(1)

    def buyer(self) -> Buyer:
        number = next(self._numbers)
        with self._factory.begin() as session:
            customer = services.register(
                session, name="Clara Weber", email=f"clara.{number}@example.com"
            )
            address = services.add_address(
                session,
                customer.id,
                street="1 Mill Lane",
                postal_code="1010",
                city="Vienna",
            )
            return Buyer(customer.id, address.id)

    def product(
        self,
        *,
        ident: UUID | None = None,
        name: str = "Brass lantern",
        stock: int = 10,
        price: int = 2500,
        currency: str = "EUR",
        hot: bool = False,
    ) -> UUID:
        ident = ident or uuid4()
        with self._factory.begin() as session:
            product = Product(
                id=ident,
                name=name,
                category_id=category(session, CATEGORY).id,
                price=price,
                currency=currency,
                stock=stock,
                hot=hot,
            )
            session.add(product)
            session.add(
                StockMovement(
                    product=product, quantity=stock, reason=MovementReason.OPENING
                )
            )
        return ident

    def fill_cart(self, buyer: Buyer, quantities: Mapping[UUID, int]) -> None:
        with self._factory.begin() as session:
            for product_id, quantity in quantities.items():
                services.put_in_cart(session, buyer.id, product_id, quantity)

    def place(self, buyer: Buyer, key: str = "first") -> UUID:
        """Place the order that is in the buyer's cart."""
        with self._factory.begin() as session:
            return services.place_order(
                session, buyer.id, address_id=buyer.address_id, idempotency_key=key
            ).id

    def order(self, buyer: Buyer, quantities: Mapping[UUID, int]) -> UUID:
        self.fill_cart(buyer, quantities)
        return self.place(buyer, key=str(uuid4()))

    def stock(self, product_id: UUID) -> int:
        with self._factory() as session:
            return services.product(session, product_id).stock


def plain(url: str) -> psycopg.Connection:
    """Connect to one server behind the library's back, each statement committed."""
    address = make_url(url).set(drivername="postgresql")
    return psycopg.connect(
        address.render_as_string(hide_password=False), autocommit=True
    )
