"""The use cases, called synchronously."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest
from shop_stage import CATEGORY, Stage
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop import services
from shop.errors import (
    EmailTaken,
    EmptyCart,
    MixedCurrencies,
    NotFound,
    OutOfStock,
    WrongStatus,
)
from shop.models import Account, OrderStatus, PaymentKind

Factory = sessionmaker[ShardedSession]


def test_a_registered_customer_is_found_with_a_normalised_email(
    Session: Factory,
) -> None:
    with Session.begin() as session:
        ident = services.register(
            session, name="Anna Baker", email=" Anna.Baker@Example.com"
        ).id
    with Session() as session:
        customer = services.customer(session, ident)
        assert (customer.name, customer.email) == (
            "Anna Baker",
            "anna.baker@example.com",
        )


def test_an_email_address_has_one_account(Session: Factory) -> None:
    with Session.begin() as session:
        services.register(session, name="Anna Baker", email="anna@example.com")
    with pytest.raises(EmailTaken), Session.begin() as session:
        services.register(session, name="Anna Other", email="ANNA@example.com")


def test_addresses_are_listed_oldest_first(Session: Factory, stage: Stage) -> None:
    buyer = stage.buyer()
    with Session.begin() as session:
        services.add_address(
            session,
            buyer.id,
            street="2 High Street",
            postal_code="10115",
            city="Berlin",
        )
    with Session() as session:
        cities = [a.city for a in services.addresses(session, buyer.id)]
    assert cities == ["Vienna", "Berlin"]


def test_browsing_lists_a_category_by_name(Session: Factory, stage: Stage) -> None:
    for name in ("Paper lantern", "Brass lantern", "Opal pendant"):
        stage.product(name=name)
    stage.product(name="Arc lamp", stock=0)
    with Session() as session:
        everything = services.browse(session, CATEGORY)
        assert [product.name for product in everything] == [
            "Arc lamp",
            "Brass lantern",
            "Opal pendant",
            "Paper lantern",
        ]
        available = services.browse(session, CATEGORY, in_stock=True)
        assert [product.name for product in available] == [
            "Brass lantern",
            "Opal pendant",
            "Paper lantern",
        ]
        assert services.browse(session, "toys") == []
        names = [category.name for category in services.categories(session)]
        assert names == sorted(names)
        assert {"Lighting", "Toys"} <= set(names)


def test_a_product_on_offer_starts_with_its_opening_stock(
    Session: Factory, assert_sound: Callable[[], None]
) -> None:
    with Session.begin() as session:
        ident = services.add_product(
            session,
            name="Brass lantern",
            category_slug=CATEGORY,
            price=2500,
            currency="EUR",
            stock=7,
        ).id
    with Session() as session:
        assert services.product(session, ident).stock == 7
    assert_sound()


@pytest.mark.parametrize(
    "unknown", [{"currency": "XXX"}, {"category_slug": "submarines"}]
)
def test_a_product_needs_a_known_category_and_currency(
    Session: Factory, unknown: dict[str, str]
) -> None:
    known = {"currency": "EUR", "category_slug": CATEGORY}
    with pytest.raises(NotFound), Session.begin() as session:
        services.add_product(session, name="Lamp", price=1, stock=1, **known | unknown)


def test_a_cart_holds_the_last_quantity_at_todays_price(
    Session: Factory, stage: Stage
) -> None:
    buyer = stage.buyer()
    lantern = stage.product(name="Brass lantern", price=2500)
    pendant = stage.product(name="Opal pendant", price=4000)
    stage.fill_cart(buyer, {pendant: 1, lantern: 5})
    stage.fill_cart(buyer, {lantern: 2})
    with Session() as session:
        lines = services.cart(session, buyer.id)
        assert [(line.product.id, line.quantity, line.amount) for line in lines] == [
            (lantern, 2, 5000),
            (pendant, 1, 4000),
        ]


def test_what_is_removed_from_the_cart_is_gone(Session: Factory, stage: Stage) -> None:
    buyer, lantern = stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    with Session.begin() as session:
        services.remove_from_cart(session, buyer.id, lantern)
    with Session() as session:
        assert services.cart(session, buyer.id) == []
        with pytest.raises(NotFound):
            services.remove_from_cart(session, buyer.id, lantern)


def test_an_order_takes_stock_charges_and_empties_the_cart(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer = stage.buyer()
    lantern = stage.product(name="Brass lantern", stock=10, price=2500)
    pendant = stage.product(name="Opal pendant", stock=3, price=4000, hot=True)
    ident = stage.order(buyer, {lantern: 2, pendant: 3})
    with Session() as session:
        order = services.order(session, ident)
        assert (order.status, order.total, order.currency) == (
            OrderStatus.PLACED,
            17000,
            "EUR",
        )
        assert [(n.product_name, n.quantity, n.unit_price) for n in order.lines] == [
            ("Brass lantern", 2, 2500),
            ("Opal pendant", 3, 4000),
        ]
        assert [(p.kind, p.amount) for p in order.payments] == [
            (PaymentKind.CHARGE, 17000)
        ]
        assert (
            sum(e.amount for e in order.entries if e.account is Account.CASH) == 17000
        )
        assert services.cart(session, buyer.id) == []
    assert (stage.stock(lantern), stage.stock(pendant)) == (8, 0)
    assert_sound()


def test_an_order_that_is_out_of_stock_changes_nothing(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer = stage.buyer()
    plenty, scarce = stage.product(stock=10), stage.product(stock=1, hot=True)
    stage.fill_cart(buyer, {plenty: 1, scarce: 2})
    with pytest.raises(OutOfStock) as caught:
        stage.place(buyer)
    assert caught.value.product_ids == [scarce]
    assert (stage.stock(plenty), stage.stock(scarce)) == (10, 1)
    with Session() as session:
        assert len(services.cart(session, buyer.id)) == 2
        assert services.order_history(session, buyer.id) == []
    assert_sound()


def test_an_order_placed_again_with_its_key_is_the_same_order(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer, lantern = stage.buyer(), stage.product(stock=10)
    stage.fill_cart(buyer, {lantern: 1})
    first = stage.place(buyer, key="checkout-1")
    stage.fill_cart(buyer, {lantern: 4})
    assert stage.place(buyer, key="checkout-1") == first
    assert stage.stock(lantern) == 9
    with Session() as session:
        assert len(services.order_history(session, buyer.id)) == 1
    assert stage.place(buyer, key="checkout-2") != first
    assert_sound()


def test_two_customers_may_choose_the_same_key(stage: Stage) -> None:
    one, other, lantern = stage.buyer(), stage.buyer(), stage.product()
    for buyer in (one, other):
        stage.fill_cart(buyer, {lantern: 1})
    assert stage.place(one, key="1") != stage.place(other, key="1")


def test_an_empty_cart_cannot_be_ordered(stage: Stage) -> None:
    with pytest.raises(EmptyCart):
        stage.place(stage.buyer())


def test_an_order_has_one_currency(stage: Stage) -> None:
    buyer = stage.buyer()
    products = [stage.product(currency=code) for code in ("EUR", "USD")]
    stage.fill_cart(buyer, dict.fromkeys(products, 1))
    with pytest.raises(MixedCurrencies, match="EUR, USD"):
        stage.place(buyer)


def test_an_order_goes_only_to_an_address_of_its_customer(
    Session: Factory, stage: Stage
) -> None:
    buyer, neighbour, lantern = stage.buyer(), stage.buyer(), stage.product()
    stage.fill_cart(buyer, {lantern: 1})
    for address_id in (neighbour.address_id, uuid4()):
        with pytest.raises(NotFound, match="address"), Session.begin() as session:
            services.place_order(
                session, buyer.id, address_id=address_id, idempotency_key="1"
            )


def test_cancelling_returns_goods_and_money(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    buyer = stage.buyer()
    lantern, pendant = stage.product(stock=10), stage.product(stock=5, hot=True)
    ident = stage.order(buyer, {lantern: 2, pendant: 5})
    with Session.begin() as session:
        services.cancel_order(session, ident)
    assert (stage.stock(lantern), stage.stock(pendant)) == (10, 5)
    with Session() as session:
        order = services.order(session, ident)
        assert order.status is OrderStatus.CANCELLED
        assert {p.kind for p in order.payments} == set(PaymentKind)
        balance = dict.fromkeys(Account, 0)
        for entry in order.entries:
            balance[entry.account] += entry.amount
        assert set(balance.values()) == {0}
    assert_sound()


def test_refunding_returns_the_money_of_a_shipped_order(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None]
) -> None:
    lantern = stage.product(stock=10, price=2500)
    ident = stage.order(stage.buyer(), {lantern: 2})
    with Session.begin() as session:
        services.ship_order(session, ident)
    with Session.begin() as session:
        services.refund_order(session, ident)
    with Session() as session:
        order = services.order(session, ident)
        assert order.status is OrderStatus.REFUNDED
        booked = {e.account: e.amount for e in order.entries if e.amount > 0}
        assert booked[Account.REFUNDS] == 5000
    assert stage.stock(lantern) == 8
    assert_sound()


@pytest.mark.parametrize(
    ("before", "attempt"),
    [
        ([], services.refund_order),
        ([services.cancel_order], services.cancel_order),
        ([services.cancel_order], services.ship_order),
        ([services.ship_order], services.cancel_order),
        ([services.ship_order, services.refund_order], services.refund_order),
    ],
    ids=lambda steps: (
        "-".join(
            step.__name__ for step in (steps if isinstance(steps, list) else [steps])
        )
        or "placed"
    ),
)
def test_an_order_takes_only_the_steps_of_its_status(
    Session: Factory,
    stage: Stage,
    assert_sound: Callable[[], None],
    before: list[Callable[..., object]],
    attempt: Callable[..., object],
) -> None:
    ident = stage.order(stage.buyer(), {stage.product(): 1})
    for step in before:
        with Session.begin() as session:
            step(session, ident)
    with pytest.raises(WrongStatus), Session.begin() as session:
        attempt(session, ident)
    assert_sound()


@pytest.mark.parametrize("hot", [False, True])
def test_a_delivery_adds_to_the_stock(
    Session: Factory, stage: Stage, assert_sound: Callable[[], None], hot: bool
) -> None:
    lantern = stage.product(stock=1, hot=hot)
    with Session.begin() as session:
        assert services.restock(session, lantern, 4).stock == 5
    assert stage.stock(lantern) == 5
    assert_sound()


def test_a_locked_product_is_read_anew(Session: Factory, stage: Stage) -> None:
    """Stock that was read before waiting for the row would be another buyer's past."""
    for hot in (False, True):
        lantern = stage.product(stock=10, hot=hot)
        with Session.begin() as session:
            assert services.product(session, lantern).stock == 10
            stage.order(stage.buyer(), {lantern: 3})
            assert services.restock(session, lantern, 1).stock == 8


def test_order_history_pages_from_the_newest(Session: Factory, stage: Stage) -> None:
    buyer, lantern = stage.buyer(), stage.product(stock=100)
    placed = [stage.order(buyer, {lantern: 1}) for _ in range(5)]
    stage.order(stage.buyer(), {lantern: 1})
    with Session() as session:
        page = services.order_history(session, buyer.id, limit=2)
        assert [order.id for order in page] == [placed[4], placed[3]]
        stage.order(buyer, {lantern: 1})
        page = services.order_history(session, buyer.id, limit=9, before=page[-1].id)
        assert [order.id for order in page] == [placed[2], placed[1], placed[0]]


@pytest.mark.parametrize(
    "use_case",
    [
        services.customer,
        services.addresses,
        services.cart,
        services.order_history,
        services.order,
        services.cancel_order,
        services.product,
        lambda session, ident: services.restock(session, ident, 1),
        lambda session, ident: services.put_in_cart(session, ident, uuid4(), 1),
        lambda session, _: services.browse(session, "submarines"),
    ],
)
def test_what_does_not_exist_is_not_found(
    Session: Factory, use_case: Callable[..., object]
) -> None:
    with Session() as session, pytest.raises(NotFound):
        use_case(session, uuid4())
