"""What is on offer: currencies, categories and products."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select

from shardalchemy import ShardedSession as Session
from shop.errors import NotFound
from shop.models import Category, Currency, MovementReason, Product, StockMovement


def add_currency(session: Session, code: str, name: str, *, exponent: int) -> Currency:
    """Add a currency whose minor unit is ``10 ** -exponent`` of it."""
    currency = Currency(code=code, name=name, exponent=exponent)
    session.add(currency)
    session.flush()
    return currency


def add_category(session: Session, ident: int, slug: str, name: str) -> Category:
    category = Category(id=ident, slug=slug, name=name)
    session.add(category)
    session.flush()
    return category


def categories(session: Session) -> Sequence[Category]:
    return session.scalars(select(Category).order_by(Category.name)).all()


def category(session: Session, slug: str) -> Category:
    found = session.scalar(select(Category).where(Category.slug == slug))
    if found is None:
        raise NotFound("category", slug)
    return found


def add_product(
    session: Session,
    *,
    name: str,
    category_slug: str,
    price: int,
    currency: str,
    stock: int,
    hot: bool = False,
) -> Product:
    """Put a product on offer.

    ``price`` is in minor units of ``currency``. A ``hot`` product's buyers queue for
    it, which keeps a rush from slowing the database down.
    """
    if session.get(Currency, currency) is None:
        raise NotFound("currency", currency)
    product = Product(
        name=name,
        category_id=category(session, category_slug).id,
        price=price,
        currency=currency,
        stock=stock,
        hot=hot,
    )
    session.add(product)
    session.add(
        StockMovement(product=product, quantity=stock, reason=MovementReason.OPENING)
    )
    session.flush()
    return product


def product(session: Session, product_id: UUID) -> Product:
    found = session.get(Product, product_id)
    if found is None:
        raise NotFound("product", product_id)
    return found


def browse(
    session: Session, category_slug: str, *, in_stock: bool = False
) -> Sequence[Product]:
    """Return a category's products by name, only those ``in_stock`` if asked."""
    statement = (
        select(Product)
        .where(Product.category_id == category(session, category_slug).id)
        .order_by(Product.name, Product.id)
    )
    if in_stock:
        statement = statement.where(Product.stock > 0)
    return session.scalars(statement).all()
