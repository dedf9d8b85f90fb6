"""The checks find what is wrong: each damage done by hand fails its check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import LiteralString

import psycopg
import pytest
from shop_stage import Stage, plain
from sqlalchemy.orm import sessionmaker

from shardalchemy import ShardedSession
from shop import invariants, services


@pytest.fixture
def traded(stage: Stage, Session: sessionmaker[ShardedSession]) -> None:
    """A shop in which something of everything has happened."""
    buyer, lantern = stage.buyer(), stage.product()
    orders = [stage.order(buyer, {lantern: n}) for n in (1, 2, 3)]
    with Session.begin() as session:
        services.cancel_order(session, orders[0])
        services.ship_order(session, orders[1])
        services.refund_order(session, orders[1])
        services.restock(session, lantern, 5)


@pytest.fixture
def connections(urls: Mapping[str, str]) -> Iterator[list[psycopg.Connection]]:
    opened = [plain(url) for url in urls.values()]
    yield opened
    for connection in opened:
        connection.close()


def failing(urls: Mapping[str, str]) -> set[str]:
    return {check.name for check in invariants.check(urls) if not check.ok}


@pytest.mark.usefixtures("traded")
def test_a_shop_that_traded_is_sound(urls: Mapping[str, str]) -> None:
    checks = invariants.check(urls)
    assert all(check.ok for check in checks), checks
    assert len({check.name for check in checks}) == 10


@pytest.mark.usefixtures("traded")
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (
            "UPDATE products SET stock = stock + 1",
            {"Stock is the sum of its movements, never below zero"},
        ),
        (
            "DELETE FROM stock_movements WHERE reason = 'sale'",
            {
                "Stock is the sum of its movements, never below zero",
                "Order lines and stock movements agree",
            },
        ),
        (
            "UPDATE orders SET total = total + 1",
            {"Orders match their lines and payments"},
        ),
        (
            "DELETE FROM order_lines",
            {
                "Orders match their lines and payments",
                "Order lines and stock movements agree",
            },
        ),
        (
            "DELETE FROM payments WHERE kind = 'refund'",
            {
                "Orders match their lines and payments",
                "The ledger sums to zero and its cash was paid",
            },
        ),
        (
            "UPDATE ledger_entries SET amount = amount + 1 WHERE account = 'sales'",
            {
                "Every posting sums to zero",
                "The ledger sums to zero and its cash was paid",
            },
        ),
        (
            "DELETE FROM ledger_entries WHERE posting = 'credit note'",
            {"Orders have the postings of their status"},
        ),
        ("DELETE FROM email_claims", {"Customers and e-mail claims agree"}),
    ],
)
def test_damage_is_found(
    urls: Mapping[str, str],
    connections: list[psycopg.Connection],
    damage: LiteralString,
    names: set[str],
) -> None:
    for connection in connections:
        connection.execute(damage)
    assert failing(urls) == names


@pytest.mark.usefixtures("traded")
def test_rows_that_are_on_two_servers_are_found(urls: Mapping[str, str]) -> None:
    twice = {f"{name}{copy}": url for name, url in urls.items() for copy in "ab"}
    assert "Every row lives on one server" in failing(twice)


def test_a_reference_table_that_differs_is_found(
    urls: Mapping[str, str], connections: list[psycopg.Connection]
) -> None:
    connections[0].execute("UPDATE currencies SET name = 'Taler' WHERE code = 'EUR'")
    try:
        assert failing(urls) == {"Reference tables are the same everywhere"}
    finally:
        connections[0].execute("UPDATE currencies SET name = 'Euro' WHERE code = 'EUR'")


@pytest.mark.usefixtures("empty_shop")
def test_a_transaction_left_prepared_is_found(
    urls: Mapping[str, str], connections: list[psycopg.Connection]
) -> None:
    connections[0].execute("BEGIN; SELECT pg_current_xact_id()")
    connections[0].execute("PREPARE TRANSACTION 'left behind'")
    try:
        assert failing(urls) == {"Nothing is left prepared"}
    finally:
        connections[0].execute("ROLLBACK PREPARED 'left behind'")
