"""An order's rows are where the topology says, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import LiteralString
from uuid import UUID, uuid4

import pytest
from shop_stage import Buyer, Stage, plain
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

import shop
from shardalchemy import AsyncShardedSession, Cluster, ShardedSession
from shop import services
from shop.models import (
    CartItem,
    Customer,
    LedgerEntry,
    Order,
    OrderLine,
    Payment,
    Product,
    StockMovement,
)

OF_ORDER: dict[type, LiteralString] = {
    Order: "SELECT count(*) FROM orders WHERE id = %s",
    OrderLine: "SELECT count(*) FROM order_lines WHERE order_id = %s",
    Payment: "SELECT count(*) FROM payments WHERE order_id = %s",
    LedgerEntry: "SELECT count(*) FROM ledger_entries WHERE order_id = %s",
}
OF_PRODUCT: dict[type, LiteralString] = {
    Product: "SELECT count(*) FROM products WHERE id = %s",
    StockMovement: "SELECT count(*) FROM stock_movements WHERE product_id = %s",
}


class Servers:
    """What the servers hold, asked in plain SQL."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = urls

    def holding(self, query: LiteralString, ident: UUID) -> dict[str, int]:
        """Return how many rows each server has, of those that have any."""
        counts = {}
        for name, url in self._urls.items():
            with plain(url) as connection:
                [(counts[name],)] = connection.execute(query, [ident]).fetchall()
        return {name: n for name, n in counts.items() if n}


@pytest.fixture
def servers(urls: Mapping[str, str]) -> Servers:
    return Servers(urls)


@pytest.fixture
def scattered(
    cluster: Cluster, stage: Stage
) -> Callable[[int], tuple[Buyer, list[UUID]]]:
    """Return a buyer with a cart of products that live on other shards than they."""

    def scattered(shards: int) -> tuple[Buyer, list[UUID]]:
        buyer = stage.buyer()
        taken = {cluster.shard_for(Customer, buyer.id)}
        products = []
        while len(taken) < shards:
            ident = uuid4()
            shard = cluster.shard_for(Product, ident)
            if shard not in taken:
                taken.add(shard)
                products.append(stage.product(ident=ident, hot=not products))
        stage.fill_cart(buyer, dict.fromkeys(products, 1))
        return buyer, products

    return scattered


def assert_in_place(
    cluster: Cluster,
    servers: Servers,
    buyer: Buyer,
    products: list[UUID],
    order_id: UUID,
) -> None:
    home = cluster.shard_for(Customer, buyer.id)
    counts = {Order: 1, OrderLine: len(products), Payment: 1, LedgerEntry: 4}
    for entity, query in OF_ORDER.items():
        assert cluster.shard_for(entity, buyer.id) == home
        assert servers.holding(query, order_id) == {home: counts[entity]}, entity
    for product_id in products:
        shard = cluster.shard_for(Product, product_id)
        assert shard != home
        assert servers.holding(OF_PRODUCT[Product], product_id) == {shard: 1}
        # Its opening stock and its sale.
        assert servers.holding(OF_PRODUCT[StockMovement], product_id) == {shard: 2}


@pytest.mark.parametrize("shards", [2, 3])
def test_an_order_over_several_shards(
    cluster: Cluster,
    servers: Servers,
    stage: Stage,
    scattered: Callable[[int], tuple[Buyer, list[UUID]]],
    assert_sound: Callable[[], None],
    shards: int,
) -> None:
    buyer, products = scattered(shards)
    order_id = stage.place(buyer)
    assert_in_place(cluster, servers, buyer, products, order_id)
    assert [stage.stock(product_id) for product_id in products] == [9] * len(products)
    assert_sound()


@pytest.mark.parametrize("shards", [2, 3])
async def test_an_order_over_several_shards_asynchronously(
    cluster: Cluster,
    servers: Servers,
    stage: Stage,
    AsyncSession: async_sessionmaker[AsyncShardedSession],
    scattered: Callable[[int], tuple[Buyer, list[UUID]]],
    assert_sound: Callable[[], None],
    shards: int,
) -> None:
    buyer, products = scattered(shards)

    def place(session: ShardedSession) -> UUID:
        return services.place_order(
            session, buyer.id, address_id=buyer.address_id, idempotency_key="1"
        ).id

    async with AsyncSession.begin() as session:
        order_id = await session.run_sync(place)
    assert_in_place(cluster, servers, buyer, products, order_id)
    assert [stage.stock(product_id) for product_id in products] == [9] * len(products)
    assert_sound()


@pytest.mark.parametrize("shards", [2, 3])
def test_an_order_rolled_back_at_its_end_is_nowhere(
    Session: sessionmaker[ShardedSession],
    servers: Servers,
    stage: Stage,
    scattered: Callable[[int], tuple[Buyer, list[UUID]]],
    assert_sound: Callable[[], None],
    shards: int,
) -> None:
    buyer, products = scattered(shards)
    with Session() as session:
        order_id = services.place_order(
            session, buyer.id, address_id=buyer.address_id, idempotency_key="1"
        ).id
        session.rollback()
    for query in OF_ORDER.values():
        assert servers.holding(query, order_id) == {}
    assert [stage.stock(product_id) for product_id in products] == [10] * len(products)
    with Session() as session:
        assert len(services.cart(session, buyer.id)) == len(products)
    assert_sound()


def test_all_that_a_customer_owns_lives_together(
    cluster: Cluster, servers: Servers, stage: Stage
) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    home = cluster.shard_for(Customer, buyer.id)
    assert cluster.shard_for(CartItem, buyer.id) == home
    for query, ident in (
        ("SELECT count(*) FROM customers WHERE id = %s", buyer.id),
        ("SELECT count(*) FROM addresses WHERE id = %s", buyer.address_id),
        ("SELECT count(*) FROM cart_items WHERE customer_id = %s", buyer.id),
    ):
        assert servers.holding(query, ident) == {home: 1}


def test_only_the_declarations_know_about_shards() -> None:
    imported: dict[str, set[str]] = {}
    source = Path(shop.__file__).parent
    for path in source.rglob("*.py"):
        module = path.relative_to(source).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "shardalchemy":
                names = imported.setdefault(module[0], set())
                names.update(alias.name for alias in node.names)
    assert imported == {
        "models": {"locator_id", "reference_table", "sharded_by"},
        "services": {"ShardedSession"},
        "api": {"AsyncShardedSession", "ShardedSession"},
        "data": {"ShardedSession"},
        "history": {"ShardedSession"},
        "explain": {"ShardedSession", "UnsupportedQueryError"},
        "__main__": {"Cluster"},
    }
