"""The same use cases over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from shop_stage import CATEGORY, Buyer, Stage
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop.models import Product


async def place(
    client: httpx.AsyncClient, buyer: Buyer, key: str = "first"
) -> httpx.Response:
    return await client.post(
        f"/customers/{buyer.id}/orders",
        json={"address_id": str(buyer.address_id)},
        headers={"Idempotency-Key": key},
    )


async def test_from_registration_to_a_refund(
    client: httpx.AsyncClient, assert_sound: Callable[[], None]
) -> None:
    async def post(path: str, json: object = None, **options: Any) -> Any:
        response = await client.post(path, json=json, **options)
        assert response.is_success, response.text
        return response.json()

    customer = await post(
        "/customers", {"name": "Anna Baker", "email": "anna@example.com"}
    )
    mine = f"/customers/{customer['id']}"
    address = await post(
        f"{mine}/addresses",
        {"street": "1 Mill Lane", "postal_code": "1010", "city": "Vienna"},
    )
    product = await post(
        "/products",
        {
            "name": "Brass lantern",
            "category_slug": CATEGORY,
            "price": 2500,
            "currency": "EUR",
            "stock": 1,
            "hot": True,
        },
    )
    item = f"{mine}/cart/{product['id']}"
    assert (await client.put(item, json={"quantity": 3})).status_code == 200
    restocked = await post(f"/products/{product['id']}/restock", {"quantity": 4})
    assert restocked["stock"] == 5
    [line] = (await client.get(f"{mine}/cart")).json()
    assert (line["product"]["name"], line["amount"]) == ("Brass lantern", 7500)

    order = await post(
        f"{mine}/orders",
        {"address_id": address["id"]},
        headers={"Idempotency-Key": "1"},
    )
    assert (order["status"], order["total"]) == ("placed", 7500)
    assert (await client.get(f"{mine}/cart")).json() == []
    await post(f"/orders/{order['id']}/ship")
    refunded = await post(f"/orders/{order['id']}/refund")
    assert [payment["kind"] for payment in refunded["payments"]] == ["charge", "refund"]
    assert (await client.get(f"/orders/{order['id']}")).json() == refunded
    [summary] = (await client.get(f"{mine}/orders")).json()
    assert (summary["id"], summary["status"]) == (order["id"], "refunded")
    assert_sound()


async def test_the_catalogue_is_browsed_by_category(
    client: httpx.AsyncClient, stage: Stage
) -> None:
    stage.product(name="Paper lantern", stock=0)
    stage.product(name="Brass lantern")
    categories = (await client.get("/categories")).json()
    assert {"slug": CATEGORY, "name": "Lighting"} in categories
    path = f"/categories/{CATEGORY}/products"
    names = [product["name"] for product in (await client.get(path)).json()]
    assert names == ["Brass lantern", "Paper lantern"]
    [product] = (await client.get(path, params={"in_stock": True})).json()
    assert (await client.get(f"/products/{product['id']}")).json() == product


async def test_a_customers_pages_show_what_is_theirs(
    client: httpx.AsyncClient, stage: Stage
) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    orders = [stage.order(buyer, {lantern: 1}) for _ in range(3)]
    mine = f"/customers/{buyer.id}"
    assert (await client.get(mine)).json()["name"] == "Clara Weber"
    [address] = (await client.get(f"{mine}/addresses")).json()
    assert address["id"] == str(buyer.address_id)
    first = (await client.get(f"{mine}/orders", params={"limit": 2})).json()
    assert [order["id"] for order in first] == [str(orders[2]), str(orders[1])]
    rest = await client.get(f"{mine}/orders", params={"before": first[-1]["id"]})
    assert [order["id"] for order in rest.json()] == [str(orders[0])]


async def test_an_item_is_taken_out_of_the_cart(
    client: httpx.AsyncClient, stage: Stage
) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    path = f"/customers/{buyer.id}/cart/{lantern}"
    assert (await client.delete(path)).status_code == 204
    assert (await client.delete(path)).status_code == 404


async def test_out_of_stock_is_a_conflict_that_names_the_products(
    client: httpx.AsyncClient, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer, plenty, scarce = stage.buyer(), stage.product(), stage.product(stock=0)
    stage.fill_cart(buyer, {plenty: 1, scarce: 1})
    response = await place(client, buyer)
    assert response.status_code == 409
    assert response.json()["product_ids"] == [str(scarce)]
    assert stage.stock(plenty) == 10
    assert_sound()


async def test_a_repeated_request_returns_the_first_order(
    client: httpx.AsyncClient, stage: Stage
) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    first = await place(client, buyer)
    assert first.status_code == 201
    assert (await place(client, buyer)).json() == first.json()
    assert (await place(client, buyer, "second")).status_code == 409
    assert stage.stock(lantern) == 9


async def test_an_email_address_that_is_taken_is_a_conflict(
    client: httpx.AsyncClient,
) -> None:
    anna = {"name": "Anna Baker", "email": "anna@example.com"}
    assert (await client.post("/customers", json=anna)).status_code == 201
    assert (await client.post("/customers", json=anna)).status_code == 409


async def test_a_shipped_order_cannot_be_cancelled(
    client: httpx.AsyncClient, stage: Stage
) -> None:
    order = stage.order(stage.buyer(), {stage.product(): 1})
    assert (await client.post(f"/orders/{order}/ship")).status_code == 200
    response = await client.post(f"/orders/{order}/cancel")
    assert response.status_code == 409
    assert "shipped" in response.json()["detail"]


async def test_cancelling_puts_the_goods_back(
    client: httpx.AsyncClient, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    lantern = stage.product(stock=10)
    order = stage.order(stage.buyer(), {lantern: 4})
    response = await client.post(f"/orders/{order}/cancel")
    assert response.json()["status"] == "cancelled"
    assert stage.stock(lantern) == 10
    assert_sound()


@pytest.mark.parametrize(
    "path", ["/customers/{}", "/customers/{}/cart", "/products/{}", "/orders/{}"]
)
async def test_what_does_not_exist_is_not_found(
    client: httpx.AsyncClient, path: str
) -> None:
    ident = uuid4()
    response = await client.get(path.format(ident))
    assert response.status_code == 404
    assert str(ident) in response.json()["detail"]


async def test_malformed_requests_are_refused_before_the_database_is_asked(
    client: httpx.AsyncClient,
) -> None:
    nobody = UUID(int=0)
    for response in (
        await client.post("/customers", json={"name": "Anna", "email": "anna"}),
        await client.put(f"/customers/{nobody}/cart/{nobody}", json={"quantity": 0}),
        await client.post(
            f"/customers/{nobody}/orders", json={"address_id": str(nobody)}
        ),
        await client.get("/orders/first"),
        await client.get(f"/customers/{nobody}/orders", params={"limit": 101}),
    ):
        assert response.status_code == 422


async def test_a_buyer_whose_turn_does_not_come_is_asked_to_try_again(
    client: httpx.AsyncClient,
    stage: Stage,
    Session: sessionmaker[ShardedSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shop.services.stock.QUEUE_TIMEOUT", 0.2)
    buyer, lantern = stage.buyer(), stage.product(hot=True)
    stage.fill_cart(buyer, {lantern: 1})
    with Session.begin() as session:
        session.lock_row(Product, lantern, timeout=5.0)
        response = await place(client, buyer)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert (await place(client, buyer)).status_code == 201


async def test_openapi_describes_every_operation(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    tags = {tag["name"] for tag in document["tags"]}
    operations = [
        operation for path in document["paths"].values() for operation in path.values()
    ]
    assert len(operations) == 37
    for operation in operations:
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
