"""The shop on local servers.

``python -m shop`` serves it: open the page that it names. ``python -m shop explain``
prints how its typical statements are answered.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

import uvicorn
from fastapi import FastAPI

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster
from shop.api import create_app
from shop.data import ShopData, generate, load
from shop.explain import explained, statements
from shop.history import generate_orders, load_orders
from shop.models import Base


@contextmanager
def running_shop() -> Iterator[tuple[LocalCluster, Cluster, ShopData]]:
    """Start four PostgreSQL servers and a Valkey, and fill them with half a year."""
    shop = generate(customers=100, products=200, hot=2)
    with LocalCluster(shards=4) as servers, servers.cluster() as cluster:
        cluster.create_all(Base.metadata)
        make_session = cluster.sessionmaker()
        load(make_session, shop)
        until = datetime.now(UTC)
        load_orders(make_session, generate_orders(shop, orders=600, until=until))
        yield servers, cluster, shop


def serve() -> None:
    """Serve the API until interrupted."""
    with running_shop() as (servers, cluster, _):

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with cluster:
                yield

        for name, url in servers.urls.items():
            print(f"{name}: {url}")
        print("API: http://127.0.0.1:8000/docs")
        app = create_app(cluster.async_sessionmaker(), lifespan=lifespan)
        uvicorn.run(app, log_level="warning")


def explain() -> None:
    """Print how ten statements are answered."""
    with running_shop() as (_, cluster, shop), cluster.sessionmaker()() as session:
        cart = [product.id for product in shop.products[:5]]
        named = statements(shop.customers[0].id, cart)
        for name, plan in explained(session, named):
            print(f"{name.capitalize()}\n{plan}\n")


if __name__ == "__main__":
    commands = {"serve": serve, "explain": explain}
    wanted = sys.argv[1:] or ["serve"]
    if len(wanted) != 1 or wanted[0] not in commands:
        sys.exit("usage: python -m shop [serve | explain]")
    commands[wanted[0]]()
