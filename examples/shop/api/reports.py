"""What the shop's owner looks at in the morning."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from shop import queries, services
from shop.api.report_schemas import (
    Basket,
    BestSeller,
    CategoryLeader,
    CategoryOverview,
    CohortMonth,
    DayOfCategory,
    DaysBetweenOrders,
    DormantCustomer,
    OrderValues,
    RepeatBuyers,
    ScarceProduct,
    StatusCount,
    TopCustomer,
    UnsoldProduct,
    Week,
)
from shop.api.schemas import CurrencyCode, CustomerView
from shop.api.transaction import InTransaction

router = APIRouter(prefix="/reports", tags=["reports"])

Days = Annotated[int, Query(ge=1, le=3650)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Since = Annotated[AwareDatetime | None, Query(description="The first moment.")]
Until = Annotated[AwareDatetime | None, Query(description="The moment after the last.")]


@router.get("/best-sellers", summary="Products of which most was sold")
async def best_sellers(
    transaction: InTransaction,
    by: Literal["units", "revenue"] = "units",
    currency: CurrencyCode = "EUR",
    since: Since = None,
    until: Until = None,
    limit: Limit = 10,
) -> list[BestSeller]:
    query = queries.sales.best_sellers(
        by=by, currency=currency, since=since, until=until, limit=limit
    )
    return await transaction.many(BestSeller, services.rows, query)


@router.get("/category-leaders", summary="The products that earn most per category")
async def category_leaders(
    transaction: InTransaction,
    currency: CurrencyCode = "EUR",
    places: Annotated[int, Query(ge=1, le=20)] = 3,
) -> list[CategoryLeader]:
    query = queries.sales.category_leaders(currency=currency, places=places)
    return await transaction.many(CategoryLeader, services.rows, query)


@router.get("/revenue-by-day", summary="Revenue by day and category, running totals")
async def revenue_by_day(
    transaction: InTransaction,
    currency: CurrencyCode = "EUR",
    since: Since = None,
    until: Until = None,
) -> list[DayOfCategory]:
    query = queries.sales.revenue_by_day(currency=currency, since=since, until=until)
    return await transaction.many(DayOfCategory, services.rows, query)


@router.get("/revenue-by-week", summary="Revenue by week, and how it changes")
async def revenue_by_week(
    transaction: InTransaction, currency: CurrencyCode = "EUR"
) -> list[Week]:
    query = queries.sales.revenue_by_week(currency=currency)
    return await transaction.many(Week, services.rows, query)


@router.get("/basket", summary="The average order")
async def basket(transaction: InTransaction) -> list[Basket]:
    return await transaction.many(Basket, services.rows, queries.sales.basket())


@router.get("/order-values", summary="The median order, and the outer tenths")
async def order_values(transaction: InTransaction) -> list[OrderValues]:
    query = queries.sales.order_values()
    return await transaction.many(OrderValues, services.rows, query)


@router.get("/order-status", summary="How many orders are in which status")
async def order_status(transaction: InTransaction) -> list[StatusCount]:
    query = queries.sales.status_counts()
    return await transaction.many(StatusCount, services.rows, query)


@router.get("/top-customers", summary="Customers who spent most")
async def top_customers(
    transaction: InTransaction,
    currency: CurrencyCode = "EUR",
    since: Since = None,
    limit: Limit = 10,
) -> list[TopCustomer]:
    query = queries.customers.top(currency=currency, since=since, limit=limit)
    return await transaction.many(TopCustomer, services.rows, query)


@router.get("/dormant-customers", summary="Customers who have stopped ordering")
async def dormant_customers(
    transaction: InTransaction, days: Days = 30
) -> list[DormantCustomer]:
    query = queries.customers.dormant(days=days)
    return await transaction.many(DormantCustomer, services.rows, query)


@router.get("/never-ordered", summary="Customers without any order")
async def never_ordered(transaction: InTransaction) -> list[CustomerView]:
    query = queries.customers.never_ordered()
    return await transaction.many(CustomerView, services.objects, query)


@router.get("/repeat-buyers", summary="The share of buyers who came back")
async def repeat_buyers(transaction: InTransaction) -> list[RepeatBuyers]:
    query = queries.customers.repeat_buyers()
    return await transaction.many(RepeatBuyers, services.rows, query)


@router.get("/days-between-orders", summary="How long buyers take to come back")
async def days_between_orders(transaction: InTransaction) -> list[DaysBetweenOrders]:
    query = queries.customers.days_between_orders()
    return await transaction.many(DaysBetweenOrders, services.rows, query)


@router.get("/cohorts", summary="What became of the buyers of each month")
async def cohorts(transaction: InTransaction) -> list[CohortMonth]:
    query = queries.customers.cohorts()
    return await transaction.many(CohortMonth, services.rows, query)


@router.get("/stock", summary="Products that are running out")
async def stock(
    transaction: InTransaction,
    below: Annotated[int, Query(ge=1)] = 10,
    days: Days = 30,
) -> list[ScarceProduct]:
    query = queries.products.stock_below(below, days=days)
    return await transaction.many(ScarceProduct, services.rows, query)


@router.get("/unsold", summary="Products that nobody buys")
async def unsold(
    transaction: InTransaction, days: Days = 90, limit: Limit = 100
) -> list[UnsoldProduct]:
    query = queries.products.unsold(days=days, limit=limit)
    return await transaction.many(UnsoldProduct, services.rows, query)


@router.get("/categories", summary="What each category has on offer")
async def categories(transaction: InTransaction) -> list[CategoryOverview]:
    query = queries.products.category_overview()
    return await transaction.many(CategoryOverview, services.rows, query)
