"""What the API takes and gives. Amounts are in minor units of their currency."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from shop.models import OrderStatus, PaymentKind

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# Enough to catch a typing error; whether mail arrives, only a mail can tell.
Email = Annotated[str, StringConstraints(pattern=r"^\s*[^@\s]+@[^@\s]+\.[^@\s]+\s*$")]
CurrencyCode = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
Quantity = Annotated[int, Field(gt=0, le=1_000_000)]


class View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Registration(BaseModel):
    name: Text
    email: Email


class CustomerView(View):
    id: UUID
    name: str
    email: str
    registered_at: datetime


class NewAddress(BaseModel):
    street: Text
    postal_code: Text
    city: Text


class AddressView(View):
    id: UUID
    street: str
    postal_code: str
    city: str


class CategoryView(View):
    slug: str
    name: str


class NewProduct(BaseModel):
    name: Text
    category_slug: str
    price: Annotated[int, Field(gt=0, examples=[1999])]
    currency: Annotated[CurrencyCode, Field(examples=["EUR"])]
    stock: Annotated[int, Field(ge=0)]
    hot: bool = False


class ProductView(View):
    id: UUID
    name: str
    price: int
    currency: str
    stock: int


class Delivery(BaseModel):
    quantity: Quantity


class CartQuantity(BaseModel):
    quantity: Quantity


class CartItemView(View):
    product_id: UUID
    quantity: int


class CartLineView(View):
    product: ProductView
    quantity: int
    amount: int


class NewOrder(BaseModel):
    address_id: UUID


class OrderSummary(View):
    id: UUID
    status: OrderStatus
    currency: str
    total: int
    placed_at: datetime


class OrderLineView(View):
    product_id: UUID
    product_name: str
    quantity: int
    unit_price: int


class PaymentView(View):
    kind: PaymentKind
    amount: int
    currency: str
    paid_at: datetime


class OrderView(OrderSummary):
    customer_id: UUID
    address_id: UUID
    lines: list[OrderLineView]
    payments: list[PaymentView]


class OrderPage(View):
    items: list[OrderSummary]
    number: int
    pages: int
    total: int


class ProductPage(View):
    items: list[ProductView]
    number: int
    pages: int
    total: int


class LatestOrder(OrderSummary):
    customer: CustomerView
    lines: list[OrderLineView]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class OutOfStockProblem(Problem):
    product_ids: list[UUID]
