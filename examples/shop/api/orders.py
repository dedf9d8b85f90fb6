"""From a cart to the door, and back."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, status

from shop import services
from shop.api.schemas import (
    LatestOrder,
    NewOrder,
    OrderPage,
    OrderSummary,
    OrderView,
    OutOfStockProblem,
    Problem,
)
from shop.api.transaction import InTransaction

router = APIRouter(
    tags=["orders"],
    responses={
        status.HTTP_404_NOT_FOUND: {"model": Problem},
        status.HTTP_409_CONFLICT: {"model": Problem},
    },
)

IdempotencyKey = Annotated[
    str,
    Header(
        min_length=1,
        max_length=200,
        description="Chosen by the client, new for each order. A request that is "
        "repeated with the same key returns the order that the first one placed.",
    ),
]


@router.post(
    "/customers/{customer_id}/orders",
    status_code=status.HTTP_201_CREATED,
    summary="Place an order",
    responses={
        status.HTTP_409_CONFLICT: {"model": OutOfStockProblem | Problem},
        status.HTTP_503_SERVICE_UNAVAILABLE: {"model": Problem},
    },
)
async def place_order(
    customer_id: UUID,
    order: NewOrder,
    idempotency_key: IdempotencyKey,
    transaction: InTransaction,
) -> OrderView:
    """Turn the cart into a paid order, or change nothing (409)."""
    return await transaction.one(
        OrderView,
        services.place_order,
        customer_id,
        address_id=order.address_id,
        idempotency_key=idempotency_key,
    )


@router.get("/customers/{customer_id}/orders", summary="List a customer's orders")
async def order_history(
    customer_id: UUID,
    transaction: InTransaction,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[
        UUID | None, Query(description="The last id of the page before.")
    ] = None,
) -> list[OrderSummary]:
    """Newest first."""
    return await transaction.many(
        OrderSummary, services.order_history, customer_id, limit=limit, before=before
    )


@router.get(
    "/customers/{customer_id}/orders/pages/{number}",
    summary="Show a numbered page of a customer's orders",
)
async def orders_page(
    customer_id: UUID,
    number: Annotated[int, Path(ge=1)],
    transaction: InTransaction,
    size: Annotated[int, Query(ge=1, le=100)] = 20,
) -> OrderPage:
    """Newest first; a page past the last is empty."""
    return await transaction.one(
        OrderPage, services.orders_page, customer_id, number=number, size=size
    )


@router.get("/orders", summary="List everybody's latest orders")
async def latest_orders(
    transaction: InTransaction,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[
        UUID | None, Query(description="The last id of the page before.")
    ] = None,
) -> list[LatestOrder]:
    """Newest first, with who ordered and what."""
    return await transaction.many(
        LatestOrder, services.latest_orders, limit=limit, before=before
    )


@router.get("/orders/{order_id}", summary="Show an order")
async def order(order_id: UUID, transaction: InTransaction) -> OrderView:
    return await transaction.one(OrderView, services.order, order_id)


@router.post("/orders/{order_id}/ship", summary="Hand an order to the carrier")
async def ship_order(order_id: UUID, transaction: InTransaction) -> OrderView:
    return await transaction.one(OrderView, services.ship_order, order_id)


@router.post("/orders/{order_id}/cancel", summary="Cancel an order not yet shipped")
async def cancel_order(order_id: UUID, transaction: InTransaction) -> OrderView:
    """Goods go back to stock, money back to the customer."""
    return await transaction.one(OrderView, services.cancel_order, order_id)


@router.post("/orders/{order_id}/refund", summary="Refund a shipped order in full")
async def refund_order(order_id: UUID, transaction: InTransaction) -> OrderView:
    return await transaction.one(OrderView, services.refund_order, order_id)
