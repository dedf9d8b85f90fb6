"""What must hold of a shop whatever happened to it, checked behind the library's back.

Each server is asked in plain SQL over a plain connection, and what spans servers is put
together in Python: a mistake of the library cannot hide itself here. Servers are read
one after another, so check a shop in which nothing is going on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from sqlalchemy.engine import make_url

# Products whose stock is not the sum of its movements, or is below zero.
WRONG_STOCK = """
SELECT p.id, p.stock, coalesce(sum(m.quantity), 0) AS moved
FROM products p LEFT JOIN stock_movements m ON m.product_id = p.id
GROUP BY p.id
HAVING p.stock < 0 OR p.stock <> coalesce(sum(m.quantity), 0)
"""

# Orders whose total is not that of their lines, that were not charged it once, or were
# not paid back exactly if they should have been.
WRONG_TOTALS = """
SELECT o.id, o.status, o.total, l.total, p.charged, p.refunded
FROM orders o
LEFT JOIN LATERAL (
    SELECT coalesce(sum(quantity * unit_price), 0) AS total
    FROM order_lines l WHERE (l.customer_id, l.order_id) = (o.customer_id, o.id)
) l ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(amount) FILTER (WHERE kind = 'charge'), 0) AS charged,
           coalesce(sum(amount) FILTER (WHERE kind = 'refund'), 0) AS refunded
    FROM payments p WHERE (p.customer_id, p.order_id) = (o.customer_id, o.id)
) p ON true
WHERE (o.total, o.total) <> (l.total, p.charged)
   OR p.refunded
      <> CASE WHEN o.status IN ('cancelled', 'refunded') THEN o.total ELSE 0 END
"""

# Postings that do not sum to zero.
UNBALANCED_POSTINGS = """
SELECT order_id, posting, sum(amount)
FROM ledger_entries
GROUP BY order_id, posting
HAVING sum(amount) <> 0
"""

# Orders whose postings are not those that their status calls for.
WRONG_POSTINGS = """
SELECT o.id, o.status, e.postings
FROM orders o
LEFT JOIN LATERAL (
    SELECT array_agg(DISTINCT posting::text ORDER BY posting::text) AS postings
    FROM ledger_entries e WHERE (e.customer_id, e.order_id) = (o.customer_id, o.id)
) e ON true
WHERE e.postings IS DISTINCT FROM CASE o.status
    WHEN 'cancelled' THEN ARRAY['cancellation', 'charge', 'refund', 'sale']
    WHEN 'refunded' THEN ARRAY['charge', 'credit note', 'refund', 'sale']
    ELSE ARRAY['charge', 'sale']
END
"""

PREPARED = """
SELECT gid, prepared FROM pg_prepared_xacts WHERE database = current_database()
"""

LEDGER_TOTALS = """
SELECT currency, account, sum(amount) FROM ledger_entries GROUP BY currency, account
"""

PAID = """
SELECT currency, sum(CASE kind WHEN 'charge' THEN amount ELSE -amount END)
FROM payments GROUP BY currency
"""

# The movements that there should be.
LINES_AS_MOVEMENTS = """
SELECT order_id, product_id, 'sale', -quantity FROM order_lines
UNION ALL
SELECT l.order_id, l.product_id, 'cancellation', l.quantity
FROM order_lines l JOIN orders o ON (o.customer_id, o.id) = (l.customer_id, l.order_id)
WHERE o.status = 'cancelled'
"""

MOVEMENTS = """
SELECT order_id, product_id, reason, quantity
FROM stock_movements WHERE order_id IS NOT NULL
"""

CLAIMS = "SELECT email, customer_id FROM email_claims"
CUSTOMERS = "SELECT email, id FROM customers"

KEYS = """
SELECT 'customer', id::text FROM customers
UNION ALL SELECT 'e-mail', email FROM email_claims
UNION ALL SELECT 'product', id::text FROM products
UNION ALL SELECT 'order', id::text FROM orders
"""

REFERENCE_ROWS = """
SELECT 'currency', code, name, exponent::text FROM currencies
UNION ALL SELECT 'category', id::text, slug, name FROM categories
"""

Row = tuple[Any, ...]

# As many counterexamples as a person reads.
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: whether it holds, and what was counted or what breaks it."""

    name: str
    ok: bool
    detail: str


def check(urls: Mapping[str, str]) -> list[Check]:
    """Check a shop on the servers at ``urls``: SQLAlchemy or libpq URLs by name."""
    with ExitStack() as stack:
        servers = _Servers(
            {
                name: stack.enter_context(psycopg.connect(_libpq(url)))
                for name, url in urls.items()
            }
        )
        return list(_checks(servers))


class _Servers:
    def __init__(self, connections: Mapping[str, psycopg.Connection]) -> None:
        self._connections = connections

    def by_server(self, query: LiteralString) -> dict[str, list[Row]]:
        return {
            name: connection.execute(query).fetchall()
            for name, connection in self._connections.items()
        }

    def rows(self, query: LiteralString) -> list[Row]:
        return [row for rows in self.by_server(query).values() for row in rows]


def _checks(servers: _Servers) -> Iterator[Check]:
    for name, query in (
        ("Stock is the sum of its movements, never below zero", WRONG_STOCK),
        ("Orders match their lines and payments", WRONG_TOTALS),
        ("Every posting sums to zero", UNBALANCED_POSTINGS),
        ("Orders have the postings of their status", WRONG_POSTINGS),
        ("Nothing is left prepared", PREPARED),
    ):
        wrong = servers.by_server(query)
        yield _check(
            name,
            [
                f"{_words(row)} on {server}"
                for server, rows in wrong.items()
                for row in rows
            ],
        )
    yield _ledger(servers)
    yield _difference(
        "Order lines and stock movements agree",
        servers.rows(LINES_AS_MOVEMENTS),
        servers.rows(MOVEMENTS),
    )
    yield _difference(
        "Customers and e-mail claims agree",
        servers.rows(CUSTOMERS),
        servers.rows(CLAIMS),
    )
    counts = Counter(servers.rows(KEYS))
    yield _check(
        "Every row lives on one server",
        [f"{_words(key)} on {n} servers" for key, n in counts.items() if n > 1],
        f"{counts.total()} rows",
    )
    copies = {frozenset(rows) for rows in servers.by_server(REFERENCE_ROWS).values()}
    yield _check(
        "Reference tables are the same everywhere",
        [] if len(copies) == 1 else [f"{len(copies)} different copies"],
    )


def _ledger(servers: _Servers) -> Check:
    """Compare the whole ledger with itself and with what was paid."""
    balance: Counter[str] = Counter()
    cash: Counter[str] = Counter()
    for currency, account, amount in servers.rows(LEDGER_TOTALS):
        balance[currency] += int(amount)
        if account == "cash":
            cash[currency] += int(amount)
    paid: Counter[str] = Counter()
    for currency, amount in servers.rows(PAID):
        paid[currency] += int(amount)
    wrong = [f"{currency} off by {n}" for currency, n in balance.items() if n]
    wrong += [
        f"{currency} in cash {cash[currency]}, in payments {paid[currency]}"
        for currency in cash.keys() | paid.keys()
        if cash[currency] != paid[currency]
    ]
    takings = ", ".join(f"{amount} {currency}" for currency, amount in paid.items())
    return _check("The ledger sums to zero and its cash was paid", wrong, takings)


def _difference(name: str, expected: list[Row], found: list[Row]) -> Check:
    missing = Counter(expected) - Counter(found)
    surplus = Counter(found) - Counter(expected)
    return _check(
        name,
        [f"missing {_words(row)}" for row in missing]
        + [f"surplus {_words(row)}" for row in surplus],
        f"{len(found)} rows",
    )


def _check(name: str, wrong: list[str], detail: str = "") -> Check:
    if not wrong:
        return Check(name, True, detail)
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return Check(name, False, "; ".join(wrong[:SHOWN]) + more)


def _words(row: Row) -> str:
    return " ".join(map(str, row))


def _libpq(url: str) -> str:
    return (
        make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    )
