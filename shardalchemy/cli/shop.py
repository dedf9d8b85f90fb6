"""The example application that the demonstration runs.

An installed wheel carries it beside the library, a checkout has it under ``examples``.
It is a package of its own, ``shop``, as it would be in a project that uses the library;
importing this module makes it importable, in the processes of the sale as well.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import shardalchemy

__all__ = ["ShopSize", "data", "errors", "invariants", "models", "services"]


def _folder_of_shop() -> Path:
    package = Path(shardalchemy.__file__).parent
    for folder in (package / "_examples", package.parent / "examples"):
        if (folder / "shop" / "__init__.py").is_file():
            return folder
    raise ModuleNotFoundError(
        "the example 'shop' is neither in the installed package nor in a checkout"
        " beside it; install shardalchemy from its wheel.",
        name="shop",
    )


_folder = str(_folder_of_shop())
if _folder not in sys.path:
    sys.path.insert(0, _folder)

data = import_module("shop.data")
errors = import_module("shop.errors")
invariants = import_module("shop.invariants")
models = import_module("shop.models")
services = import_module("shop.services")

# Hot pieces a second of the sale: so few that even a slow machine sells them all.
_HOT_PIECES = 10


@dataclass(frozen=True, slots=True)
class ShopSize:
    """Which shop to generate: equal sizes make equal shops, in every process.

    ``hot`` products are those that everyone wants, ``pieces`` what there is of each.
    """

    customers: int
    products: int
    hot: int
    pieces: int
    seed: int

    @classmethod
    def for_sale_of(
        cls, seconds: int, *, customers: int, products: int, seed: int
    ) -> ShopSize:
        """Return a shop whose hot products do not last for a sale of *seconds*."""
        hot = min(10, products // 5)
        pieces = max(1, _HOT_PIECES * seconds // hot)
        return cls(customers, products, hot, pieces, seed)

    def generate(self) -> Any:
        """Return the shop's customers and products as ``shop.data.ShopData``."""
        generated = data.generate(
            customers=self.customers,
            products=self.products,
            hot=self.hot,
            seed=self.seed,
        )
        return replace(
            generated,
            products=tuple(
                replace(product, stock=self.pieces) if product.hot else product
                for product in generated.products
            ),
        )
