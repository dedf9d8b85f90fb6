"""A shop of any size to try it on, the same every time for the same seed.

Customers and products get their ids here, so that a test or a demonstration can name
them before they are stored. Addresses get theirs when they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar
from uuid import UUID

from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop.models import (
    Address,
    Category,
    Currency,
    Customer,
    EmailClaim,
    MovementReason,
    Product,
    StockMovement,
)
from shop.words import CITIES, FIRST_NAMES, LAST_NAMES, RANGES, STREETS

T = TypeVar("T")

CURRENCIES = {"EUR": ("Euro", 2), "USD": ("US dollar", 2), "JPY": ("Yen", 0)}


@dataclass(frozen=True, slots=True)
class CustomerData:
    id: UUID
    name: str
    email: str
    street: str
    postal_code: str
    city: str


@dataclass(frozen=True, slots=True)
class ProductData:
    id: UUID
    name: str
    category_id: int
    price: int
    stock: int
    hot: bool


@dataclass(frozen=True, slots=True)
class ShopData:
    customers: tuple[CustomerData, ...]
    products: tuple[ProductData, ...]


def generate(
    *, customers: int, products: int, hot: int = 1, stock: int = 100, seed: int = 1
) -> ShopData:
    """Return a shop's customers and products.

    The first ``hot`` products are those that everyone wants. A product starts with
    about ``stock`` pieces, a hot one with ten times as many.
    """
    random = Random(seed)
    return ShopData(
        customers=tuple(_customer(random, n) for n in range(customers)),
        products=tuple(_product(random, stock, n < hot) for n in range(products)),
    )


def load(session_factory: sessionmaker[ShardedSession], data: ShopData) -> None:
    """Store a generated shop, with its currencies and categories."""
    load_reference(session_factory)
    for products in _batches(data.products):
        with session_factory.begin() as session:
            for product in products:
                session.add_all(_product_rows(product))
    for customers in _batches(data.customers):
        with session_factory.begin() as session:
            for customer in customers:
                session.add_all(_customer_rows(customer))


def load_reference(session_factory: sessionmaker[ShardedSession]) -> None:
    """Store the currencies and categories, where they are not stored yet."""
    with session_factory.begin() as session:
        for code, (name, exponent) in CURRENCIES.items():
            session.merge(Currency(code=code, name=name, exponent=exponent))
        for ident, category in enumerate(RANGES, start=1):
            session.merge(Category(id=ident, slug=category.slug, name=category.name))


def _customer(random: Random, number: int) -> CustomerData:
    first, last = random.choice(FIRST_NAMES), random.choice(LAST_NAMES)
    city, postal_code = random.choice(CITIES)
    return CustomerData(
        id=_uuid(random),
        name=f"{first} {last}",
        email=f"{first}.{last}.{number}@example.com".lower(),
        street=f"{random.randint(1, 120)} {random.choice(STREETS)}",
        postal_code=postal_code.format(random.randint(1, 99)),
        city=city,
    )


def _product(random: Random, stock: int, hot: bool) -> ProductData:
    category_id = random.randint(1, len(RANGES))
    category = RANGES[category_id - 1]
    return ProductData(
        id=_uuid(random),
        name=f"{random.choice(category.styles)} {random.choice(category.nouns)}",
        category_id=category_id,
        price=random.randrange(category.cheapest, category.dearest, 50),
        stock=stock * 10 if hot else random.randint(stock // 2, stock * 3 // 2),
        hot=hot,
    )


def _uuid(random: Random) -> UUID:
    return UUID(int=random.getrandbits(128), version=4)


def _product_rows(data: ProductData) -> Iterator[object]:
    product = Product(
        id=data.id,
        name=data.name,
        category_id=data.category_id,
        price=data.price,
        currency="EUR",
        stock=data.stock,
        hot=data.hot,
    )
    yield product
    yield StockMovement(
        product=product, quantity=data.stock, reason=MovementReason.OPENING
    )


def _customer_rows(data: CustomerData) -> Iterator[object]:
    yield EmailClaim(email=data.email, customer_id=data.id)
    customer = Customer(id=data.id, name=data.name, email=data.email)
    yield customer
    yield Address(
        customer=customer,
        street=data.street,
        postal_code=data.postal_code,
        city=data.city,
    )


def _batches(items: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
