"""Pages and reports: what four servers answer is what one answers, to the last digit.

One shop with half a year behind it is stored twice: on the cluster, and in one ordinary
database under a plain ``Session``. Nothing here is compared with numbers written down;
whatever one PostgreSQL says of all the rows is right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import httpx
import pytest
from shop_stage import TRUNCATE, plain
from sqlalchemy import Select, create_engine, insert, inspect, make_url, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from shardalchemy import Cluster
from shardalchemy.local import LocalCluster
from shop import queries, services
from shop.api import create_app
from shop.data import ShopData, generate, load
from shop.errors import NotFound
from shop.explain import explained, statements
from shop.history import generate_orders, load_orders
from shop.models import Base, Order
from shop.queries.products import ProductOrder

NOW = datetime.now(UTC)
SPRING = {"since": NOW - timedelta(days=120), "until": NOW - timedelta(days=40)}


class Shops(NamedTuple):
    """The same shop, on one server and on four."""

    data: ShopData
    one: sessionmaker[Session]
    four: sessionmaker[Any]
    one_url: str

    def compare(self, run: Callable[[Any], Any]) -> Any:
        """Assert that *run* gives the same over both; return it."""
        with self.one() as session:
            expected = seen(run(session))
        with self.four() as session:
            assert seen(run(session)) == expected
        return expected


@pytest.fixture(scope="module")
def shops(
    shard_servers: LocalCluster, cluster: Cluster, urls: Mapping[str, str]
) -> Iterator[Shops]:
    home = next(iter(shard_servers.urls.values()))
    with plain(home) as connection:
        connection.execute("DROP DATABASE IF EXISTS shop_on_one")
        connection.execute("CREATE DATABASE shop_on_one")
    for url in urls.values():
        with plain(url) as connection:
            connection.execute(TRUNCATE)
    four = cluster.sessionmaker()
    # So few products and whole prices that equal sums, names and stocks occur.
    data = generate(customers=60, products=70, hot=2, stock=40)
    load(four, data)
    load_orders(four, generate_orders(data, orders=260, until=NOW))
    one_url = make_url(home).set(database="shop_on_one")
    engine = create_engine(one_url)
    Base.metadata.create_all(engine)
    one = sessionmaker(engine)
    copy(four, one)
    yield Shops(data, one, four, one_url.render_as_string(hide_password=False))
    engine.dispose()
    for url in urls.values():
        with plain(url) as connection:
            connection.execute(TRUNCATE)


def copy(source: sessionmaker[Any], target: sessionmaker[Any]) -> None:
    with source() as reading, target.begin() as writing:
        for table in Base.metadata.sorted_tables:
            rows = reading.execute(select(table)).mappings().all()
            if rows:
                writing.execute(insert(table), [dict(row) for row in rows])


def seen(value: Any) -> Any:
    """Return a result as what it holds: types, values, what is loaded of an object."""
    if isinstance(value, list):
        return [seen(item) for item in value]
    if hasattr(value, "_mapping"):
        return {key: seen(item) for key, item in value._mapping.items()}
    if isinstance(value, Base):
        state = inspect(value)
        loaded = {key: state.dict[key] for key in sorted(state.dict.keys())}
        loaded.pop("_sa_instance_state")
        return (type(value), {key: seen(item) for key, item in loaded.items()})
    if isinstance(value, services.Page):
        return (seen(list(value.items)), value.number, value.total, value.pages)
    return (type(value), value)


QUERIES: dict[str, Select[Any]] = {
    "best sellers": queries.sales.best_sellers(limit=1000),
    "best sellers, three": queries.sales.best_sellers(limit=3),
    "best sellers by revenue": queries.sales.best_sellers(by="revenue"),
    "best sellers of a period": queries.sales.best_sellers(**SPRING),
    "category leaders": queries.sales.category_leaders(),
    "category winners": queries.sales.category_leaders(places=1),
    "revenue by day": queries.sales.revenue_by_day(),
    "revenue by day of a period": queries.sales.revenue_by_day(**SPRING),
    "revenue by week": queries.sales.revenue_by_week(),
    "basket": queries.sales.basket(),
    "order values": queries.sales.order_values(),
    "status counts": queries.sales.status_counts(),
    "top customers": queries.customers.top(limit=1000),
    "top three customers of a period": queries.customers.top(
        since=SPRING["since"], limit=3
    ),
    "dormant customers": queries.customers.dormant(),
    "dormant for a quarter": queries.customers.dormant(days=90),
    "never ordered": queries.customers.never_ordered(),
    "repeat buyers": queries.customers.repeat_buyers(),
    "days between orders": queries.customers.days_between_orders(),
    "cohorts": queries.customers.cohorts(),
    "stock": queries.products.stock_below(20),
    "unsold": queries.products.unsold(),
    "unsold in a week": queries.products.unsold(days=7, limit=10),
    "categories": queries.products.category_overview(),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_report_over_four_servers_is_that_of_one(shops: Shops, name: str) -> None:
    rows = shops.compare(lambda s: list(services.rows(s, QUERIES[name])))
    assert rows


def test_a_report_of_nothing_is_that_of_one_server(shops: Shops) -> None:
    """No row, or the one row that an aggregate has of no rows."""
    ended = NOW - timedelta(days=3650)
    for query in (
        queries.sales.best_sellers(until=ended),
        queries.sales.revenue_by_day(until=ended),
        queries.sales.revenue_by_week(currency="JPY"),
        queries.customers.top(currency="JPY"),
        queries.products.stock_below(0),
    ):
        assert shops.compare(lambda s, q=query: list(services.rows(s, q))) == []


SEARCHES: dict[str, dict[str, Any]] = {
    "everything": {},
    "a word in any case": {"text": "LAMP"},
    "two words": {"text": "oak chair"},
    "what matches nothing": {"text": "100%_"},
    "a category": {"category_slug": "lighting"},
    "prices, cheapest first": {
        "min_price": 2000,
        "max_price": 20_000,
        "order": ProductOrder.CHEAPEST,
    },
    "in stock, dearest first": {"in_stock": True, "order": ProductOrder.DEAREST},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_paged_to_its_end(shops: Shops, name: str) -> None:
    query = queries.products.search(**SEARCHES[name])

    def all_pages(session: Any) -> list[services.Page[Any]]:
        pages = [services.page(session, query, number=1, size=7)]
        while pages[-1].number <= pages[-1].pages:
            number = pages[-1].number + 1
            pages.append(services.page(session, query, number=number, size=7))
        return pages

    pages = shops.compare(all_pages)
    found = [item for items, *_ in pages for item in items]
    assert len(found) == pages[0][2]
    assert pages[-1][0] == []


def test_one_customers_orders_are_paged_by_number(shops: Shops) -> None:
    def all_pages(session: Any) -> list[services.Page[Any]]:
        return [
            services.orders_page(session, customer.id, number=number, size=4)
            for customer in shops.data.customers[:10]
            for number in (1, 2, 3)
        ]

    pages = shops.compare(all_pages)
    assert any(items for items, number, *_ in pages if number == 2)


def test_one_customers_history_goes_on_where_a_page_ended(shops: Shops) -> None:
    def walk(session: Any) -> list[list[Order]]:
        pages = []
        for customer in shops.data.customers[:10]:
            before = None
            while True:
                page = services.order_history(
                    session, customer.id, limit=3, before=before
                )
                pages.append(list(page))
                if not page:
                    break
                before = page[-1].id
        return pages

    assert any(shops.compare(walk))


def test_the_latest_orders_come_with_their_customers_and_lines(shops: Shops) -> None:
    def walk(session: Any) -> list[list[Order]]:
        pages = [list(services.latest_orders(session, limit=60))]
        while pages[-1]:
            before = pages[-1][-1].id
            pages.append(list(services.latest_orders(session, limit=60, before=before)))
        return pages

    pages = shops.compare(walk)
    assert sum(map(len, pages)) == 260
    _, order = pages[0][0]
    assert {"customer", "lines"} <= order.keys()


def test_the_latest_orders_at_once_are_as_many_as_asked_for(shops: Shops) -> None:
    """The limit counts orders, not the lines that are joined to them."""
    query = queries.orders.latest_at_once(limit=25)
    found = shops.compare(lambda s: list(services.objects(s, query)))
    assert len(found) == 25
    assert any(len(order["lines"]) > 1 for _, order in found)


def test_a_page_after_no_order_is_not_found(shops: Shops) -> None:
    with shops.four() as session, pytest.raises(NotFound, match="order"):
        services.latest_orders(session, before=shops.data.customers[0].id)


def test_a_report_has_what_its_own_transaction_wrote(shops: Shops) -> None:
    """Before anything is committed, and not after it was rolled back."""
    report = queries.sales.best_sellers(by="revenue", limit=5)

    def raised(session: Any) -> list[Any]:
        before = services.rows(session, report)
        order = session.scalars(
            queries.orders.of_customer(shops.data.customers[1].id)
        ).first() or pytest.fail("this customer has no orders")
        for line in order.lines:
            line.quantity += 1000
        order.status = "shipped"
        inside = services.rows(session, report)
        session.rollback()
        return [before, inside, services.rows(session, report)]

    before, inside, after = shops.compare(raised)
    assert before == after != inside


# Pages as a browser asks for them, with what they take.
PATHS = [
    "/products?text=lamp&order=cheapest",
    "/products?category=furniture&min_price=5000&in_stock=true&page=2&size=3",
    "/orders?limit=10",
    "/reports/best-sellers?by=revenue&limit=5",
    "/reports/category-leaders?places=2",
    "/reports/revenue-by-day",
    "/reports/revenue-by-week",
    "/reports/basket",
    "/reports/order-values",
    "/reports/order-status",
    "/reports/top-customers?limit=5",
    "/reports/dormant-customers?days=45",
    "/reports/never-ordered",
    "/reports/repeat-buyers",
    "/reports/days-between-orders",
    "/reports/cohorts",
    "/reports/stock?below=15",
    "/reports/unsold?days=30",
    "/reports/categories",
]


@pytest.fixture
async def fronts(
    shops: Shops, shard_servers: LocalCluster, urls: Mapping[str, str]
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """The application over each of the two shops."""
    engine = create_async_engine(shops.one_url)
    async with (
        Cluster(dict(urls), redis=shard_servers.redis_url) as cluster,
        AsyncExitStack() as stack,
    ):
        stack.push_async_callback(engine.dispose)
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app=create_app(factory)),
                    base_url="http://shop",
                )
            )
            for factory in (async_sessionmaker(engine), cluster.async_sessionmaker())
        ]
        yield clients[0], clients[1]


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_over_four_servers_is_that_of_one(
    fronts: tuple[httpx.AsyncClient, httpx.AsyncClient], path: str
) -> None:
    one, four = fronts
    expected = await one.get(path)
    assert expected.status_code == 200, expected.text
    assert expected.json()
    assert (await four.get(path)).json() == expected.json()


async def test_a_customers_page_over_four_servers_is_that_of_one(
    shops: Shops, fronts: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    one, four = fronts
    for customer in shops.data.customers[:5]:
        path = f"/customers/{customer.id}/orders/pages/1?size=3"
        expected = (await one.get(path)).json()
        assert (await four.get(path)).json() == expected


def test_ten_typical_statements_are_explained(shops: Shops) -> None:
    named = statements(
        shops.data.customers[0].id, [p.id for p in shops.data.products[:5]]
    )
    with shops.four() as session:
        plans = dict(explained(session, named))
    assert len(plans) == 10
    assert plans["a customer"].startswith("Route to s")


def test_a_generated_past_is_sound(
    shops: Shops, assert_sound: Callable[[], None]
) -> None:
    assert_sound()


def test_a_generated_past_is_the_same_for_the_same_seed() -> None:
    shop = generate(customers=20, products=30)
    orders = generate_orders(shop, orders=40, until=NOW, seed=7)
    assert orders == generate_orders(shop, orders=40, until=NOW, seed=7)
    assert orders != generate_orders(shop, orders=40, until=NOW, seed=8)
    assert all(order.placed_at < NOW for order in orders)
