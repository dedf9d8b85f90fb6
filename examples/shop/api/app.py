"""The FastAPI application: routes, and errors as HTTP answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request, status
from fastapi.responses import JSONResponse
from sqlalchemy.exc import TimeoutError as WaitedTooLong
from sqlalchemy.ext.asyncio import async_sessionmaker

from shardalchemy import AsyncShardedSession
from shop.api import catalogue, customers, orders, reports
from shop.errors import Conflict, NotFound, OutOfStock

TAGS = [
    {"name": "customers", "description": "Accounts, addresses and carts."},
    {"name": "catalogue", "description": "What is on offer, and its stock."},
    {"name": "orders", "description": "From a cart to the door, and back."},
    {"name": "reports", "description": "What was sold, to whom, and what was not."},
]


def create_app(
    session_factory: async_sessionmaker[AsyncShardedSession],
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """Return the shop's API over the sessions that ``session_factory`` makes.

    ``lifespan`` is entered when the application starts and left when it stops: where
    the cluster behind the sessions is closed.
    """
    app = FastAPI(title="Shop", version="1.0", openapi_tags=TAGS, lifespan=lifespan)
    app.state.session_factory = session_factory
    for routes in (customers.router, catalogue.router, orders.router, reports.router):
        app.include_router(routes)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(OutOfStock, _out_of_stock)
    app.add_exception_handler(WaitedTooLong, _busy)
    return app


def _not_found(request: Request, error: Exception) -> JSONResponse:
    return _problem(status.HTTP_404_NOT_FOUND, error)


def _conflict(request: Request, error: Exception) -> JSONResponse:
    return _problem(status.HTTP_409_CONFLICT, error)


def _out_of_stock(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OutOfStock)
    return JSONResponse(
        {"detail": str(error), "product_ids": [str(i) for i in error.product_ids]},
        status.HTTP_409_CONFLICT,
    )


def _busy(request: Request, error: Exception) -> JSONResponse:
    """Answer a buyer whose turn for a hot product did not come in time."""
    return JSONResponse(
        {"detail": "The shop is busy; try again."},
        status.HTTP_503_SERVICE_UNAVAILABLE,
        headers={"Retry-After": "1"},
    )


def _problem(status_code: int, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code)
