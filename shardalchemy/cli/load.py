"""Filling the shop, in as many processes as there are cores to use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shardalchemy.cli.processes import Workers
from shardalchemy.cli.shop import data
from shardalchemy.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

    from shardalchemy.cli.shop import ShopSize

__all__ = ["fill"]

# Customers and products a piece. Each is one transaction over all shards; more rows in
# it are no faster, and the progress bar would jump.
_PIECE = 500


def fill(cluster: Cluster, urls: Mapping[str, str], size: ShopSize) -> Iterator[int]:
    """Store the shop; yield how many customers and products each step has stored."""
    # First and alone: the processes would all find it missing at the same time.
    data.load_reference(cluster.sessionmaker())
    parts = min(2, os.cpu_count() or 1)
    with Workers(
        _fill_part, [(dict(urls), size, part, parts) for part in range(parts)]
    ) as workers:
        yield from workers.messages()


def _fill_part(
    parent: Connection[Any, Any],
    urls: dict[str, str],
    size: ShopSize,
    part: int,
    parts: int,
) -> None:
    """Store every *parts*-th customer and product."""
    whole = size.generate()
    with Cluster(urls) as cluster:
        sessions = cluster.sessionmaker()
        for products in _pieces(whole.products[part::parts]):
            data.load(sessions, data.ShopData(customers=(), products=products))
            parent.send(len(products))
        for customers in _pieces(whole.customers[part::parts]):
            data.load(sessions, data.ShopData(customers=customers, products=()))
            parent.send(len(customers))


def _pieces(rows: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(rows), _PIECE):
        yield rows[start : start + _PIECE]
