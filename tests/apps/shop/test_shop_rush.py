"""Many at once: nobody buys what is not there, and nothing is half done."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from uuid import UUID

import httpx
import pytest
from shop_stage import Buyer, Stage
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop import data, services
from shop.errors import Conflict, OutOfStock

Factory = sessionmaker[ShardedSession]


@pytest.fixture(autouse=True)
def patient_buyers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine the queue is slow, and that is not what is tested here."""
    monkeypatch.setattr("shop.services.stock.QUEUE_TIMEOUT", 60.0)


@pytest.mark.parametrize("hot", [False, True])
def test_threads_never_oversell(
    stage: Stage, assert_sound: Callable[[], None], hot: bool
) -> None:
    lantern = stage.product(stock=5, hot=hot)
    buyers = [stage.buyer() for _ in range(8)]
    for buyer in buyers:
        stage.fill_cart(buyer, {lantern: 1})

    def outcome(buyer: Buyer) -> str:
        try:
            stage.place(buyer)
        except OutOfStock:
            return "sold out"
        return "bought"

    with ThreadPoolExecutor(len(buyers)) as pool:
        outcomes = Counter(pool.map(outcome, buyers))
    assert outcomes == {"bought": 5, "sold out": 3}
    assert stage.stock(lantern) == 0
    assert_sound()


@pytest.mark.parametrize("hot", [False, True])
async def test_requests_never_oversell(
    client: httpx.AsyncClient,
    stage: Stage,
    assert_sound: Callable[[], None],
    hot: bool,
) -> None:
    lantern = stage.product(stock=5, hot=hot)
    buyers = [stage.buyer() for _ in range(8)]
    for buyer in buyers:
        stage.fill_cart(buyer, {lantern: 1})
    responses = await asyncio.gather(
        *(
            client.post(
                f"/customers/{buyer.id}/orders",
                json={"address_id": str(buyer.address_id)},
                headers={"Idempotency-Key": "1"},
            )
            for buyer in buyers
        )
    )
    assert Counter(r.status_code for r in responses) == {201: 5, 409: 3}
    assert stage.stock(lantern) == 0
    assert_sound()


def test_a_request_sent_twice_at_once_is_one_order(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    with ThreadPoolExecutor(4) as pool:
        orders = set(pool.map(lambda _: stage.place(buyer, key="1"), range(4)))
    assert len(orders) == 1
    assert stage.stock(lantern) == 9
    assert_sound()


def test_an_email_address_wanted_twice_at_once_is_given_once(Session: Factory) -> None:
    def register(number: int) -> bool:
        try:
            with Session.begin() as session:
                services.register(
                    session, name=f"Anna {number}", email="anna@example.com"
                )
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(register, range(4))) == 1


def test_a_mixed_workload_leaves_a_sound_shop(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    """Baskets of several products, some hot, in any order: no deadlock either."""
    products = [stage.product(stock=20, hot=n < 2) for n in range(6)]
    buyers = [stage.buyer() for _ in range(8)]

    def shop(buyer: Buyer) -> Counter[str]:
        random = Random(buyers.index(buyer))
        done: Counter[str] = Counter()
        orders: list[UUID] = []
        for _ in range(12):
            action = random.choice(["order", "order", "cancel", "ship", "restock"])
            try:
                if action == "order":
                    basket = random.sample(products, random.randint(1, 3))
                    orders.append(
                        stage.order(buyer, {p: random.randint(1, 4) for p in basket})
                    )
                else:
                    with Session.begin() as session:
                        if action == "restock":
                            services.restock(session, random.choice(products), 2)
                        elif orders and action == "cancel":
                            services.cancel_order(session, random.choice(orders))
                        elif orders:
                            order = services.ship_order(session, random.choice(orders))
                            if random.random() < 0.5:
                                services.refund_order(session, order.id)
            except Conflict as error:
                action = type(error).__name__
            done[action] += 1
        return done

    with ThreadPoolExecutor(len(buyers)) as pool:
        done = sum(pool.map(shop, buyers), Counter())
    assert {"order", "cancel", "ship", "restock"} <= done.keys()
    assert_sound()


def test_a_generated_shop_is_sound_and_open_for_business(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    generated = data.generate(customers=40, products=60, hot=2)
    data.load(Session, generated)
    assert_sound()
    customer = generated.customers[0]
    with Session() as session:
        [address] = services.addresses(session, customer.id)
        assert address.city == customer.city
    buyer = Buyer(customer.id, address.id)
    stage.order(buyer, {product.id: 1 for product in generated.products[:4]})
    assert_sound()


def test_a_generated_shop_is_the_same_for_the_same_seed() -> None:
    size = {"customers": 20, "products": 30}
    assert data.generate(**size, seed=7) == data.generate(**size, seed=7)
    assert data.generate(**size, seed=7) != data.generate(**size, seed=8)
