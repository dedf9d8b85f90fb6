"""The shop's tables: what is stored, and how it is spread.

The ``info`` of each table is all that this application knows about shards:

- **by product** (``products``, ``stock_movements``): stock is taken where it is kept;
- **by customer** (customers, addresses, carts, orders, payments, the ledger): all that
  one customer owns lives together, so that within one customer any SQL works and
  foreign keys hold as usual;
- **by e-mail** (``email_claims``): one address, one account, across all customers;
- **reference** (``currencies``, ``categories``): a copy everywhere, joined anywhere.

Money is an integer count of the currency's minor unit (cents).
"""

from shop.models.base import Base
from shop.models.customers import Address, CartItem, Customer, EmailClaim
from shop.models.orders import (
    Account,
    LedgerEntry,
    Order,
    OrderLine,
    OrderStatus,
    Payment,
    PaymentKind,
    Posting,
)
from shop.models.products import MovementReason, Product, StockMovement
from shop.models.reference import Category, Currency

__all__ = [
    "Account",
    "Address",
    "Base",
    "CartItem",
    "Category",
    "Currency",
    "Customer",
    "EmailClaim",
    "LedgerEntry",
    "MovementReason",
    "Order",
    "OrderLine",
    "OrderStatus",
    "Payment",
    "PaymentKind",
    "Posting",
    "Product",
    "StockMovement",
]
