"""Serve the shop on local servers: ``python -m shop``, then open the page it names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from shardalchemy.local import LocalCluster
from shop.api import create_app
from shop.data import generate, load
from shop.models import Base


def main() -> None:
    """Start four PostgreSQL servers and a Valkey, fill them, and serve the API."""
    with LocalCluster(shards=4) as servers:
        cluster = servers.cluster()
        cluster.create_all(Base.metadata)
        load(cluster.sessionmaker(), generate(customers=100, products=200, hot=2))

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with cluster:
                yield

        for name, url in servers.urls.items():
            print(f"{name}: {url}")
        print("API: http://127.0.0.1:8000/docs")
        app = create_app(cluster.async_sessionmaker(), lifespan=lifespan)
        uvicorn.run(app, log_level="warning")


if __name__ == "__main__":
    main()
