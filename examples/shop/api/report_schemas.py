"""What the reports give. Amounts are in minor units of the report's currency."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from uuid import UUID

from shop.api.schemas import View
from shop.models import OrderStatus


class BestSeller(View):
    product_id: UUID
    name: str
    units: int
    revenue: int


class CategoryLeader(View):
    category: str
    place: int
    product_id: UUID
    name: str
    revenue: int


class DayOfCategory(View):
    day: date
    category: str
    revenue: int
    running_total: int
    share_of_day: Decimal


class Week(View):
    week: datetime
    orders: int
    revenue: int
    running_total: int
    change: int | None


class Basket(View):
    currency: str
    orders: int
    value: Decimal
    lines: Decimal
    pieces: Decimal


class OrderValues(View):
    currency: str
    low: float
    median: float
    high: float


class StatusCount(View):
    currency: str
    status: OrderStatus
    orders: int
    total: int


class TopCustomer(View):
    id: UUID
    name: str
    orders: int
    spent: int


class DormantCustomer(View):
    id: UUID
    name: str
    email: str
    last_order_at: datetime | None


class RepeatBuyers(View):
    buyers: int
    repeat_buyers: int
    share: Decimal | None


class DaysBetweenOrders(View):
    gaps: int
    mean: Decimal | None
    shortest: Decimal | None
    longest: Decimal | None


class CohortMonth(View):
    cohort: date
    month: int
    customers: int
    orders: int
    revenue: int


class ScarceProduct(View):
    id: UUID
    name: str
    category: str
    stock: int
    sold: int


class UnsoldProduct(View):
    id: UUID
    name: str
    stock: int
    value: int


class CategoryOverview(View):
    slug: str
    name: str
    products: int
    available: int
    value: int
    cheapest: int | None
    dearest: int | None
