"""What can go wrong in the shop's own terms.

Each error is raised before a use case has written anything, or leaves the caller's
transaction to be rolled back: either way nothing has changed.
"""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from shop.models import OrderStatus


class ShopError(Exception):
    """The root of the shop's errors."""


class NotFound(ShopError):
    """Something was named that the shop does not have."""

    def __init__(self, what: str, ident: object) -> None:
        super().__init__(f"There is no {what} {ident}.")


class Conflict(ShopError):
    """The request is well formed but does not fit what is stored."""


class EmailTaken(Conflict):
    def __init__(self, email: str) -> None:
        super().__init__(f"{email} belongs to another account.")


class EmptyCart(Conflict):
    def __init__(self) -> None:
        super().__init__("The cart is empty; put a product into it first.")


class MixedCurrencies(Conflict):
    def __init__(self, currencies: Collection[str]) -> None:
        super().__init__(
            f"The cart holds prices in {', '.join(sorted(currencies))}; "
            "an order has one currency. Place one order for each."
        )


class OutOfStock(Conflict):
    """``product_ids`` are the products of which there are fewer than asked for."""

    def __init__(self, product_ids: Collection[UUID]) -> None:
        self.product_ids = sorted(product_ids)
        super().__init__(
            f"Not enough in stock of {', '.join(map(str, self.product_ids))}."
        )


class WrongStatus(Conflict):
    def __init__(self, verb: str, status: OrderStatus, required: OrderStatus) -> None:
        super().__init__(
            f"An order that is {status} cannot be {verb}, only one that is {required}."
        )
