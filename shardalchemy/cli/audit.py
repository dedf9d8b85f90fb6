"""What the servers hold after the sale, in plain SQL and behind the library's back."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, LiteralString

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from shardalchemy.cli.shop import invariants, models
from shardalchemy.ring import multirange
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardalchemy.catalog import Topology
    from shardalchemy.cli.tally import Tally

__all__ = ["Audit", "Check", "audit"]

# Rows of a table, and those of them that the ring has on another shard.
_ROWS = """
SELECT count(*), count(*) FILTER (WHERE NOT {arcs}::int8multirange @> {hash})
FROM {table}
"""

_HOT = "SELECT count(*), count(*) FILTER (WHERE stock = 0) FROM products WHERE hot"

_ORDERS = "SELECT id::text FROM orders"

# The orders that have left anything on a server, as customer or for its products.
_TRACES = """
SELECT id::text FROM orders
UNION SELECT order_id::text FROM stock_movements WHERE order_id IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: whether it holds, and what was counted or what breaks it."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Rows by table and shard, how many hot products are sold out, the invariants."""

    rows: Mapping[str, Mapping[str, int]]
    hot: int
    sold_out: int
    checks: tuple[Check, ...]

    @property
    def sound(self) -> bool:
        """Whether every invariant holds."""
        return all(check.ok for check in self.checks)


def audit(urls: Mapping[str, str], topology: Topology, tally: Tally) -> Audit:
    """Read all servers, in which nothing may be going on, and compare.

    With each other, with the ring of *topology*, and with what the buyers' *tally*
    says they were told.
    """
    rows: defaultdict[str, dict[str, int]] = defaultdict(dict)
    strays: list[str] = []
    hot: Counter[str] = Counter()
    stored: set[str] = set()
    servers_of: Counter[str] = Counter()
    for shard, url in urls.items():
        with psycopg.connect(_libpq(url)) as connection:
            for name, query in _row_counts(topology, shard).items():
                rows[name][shard], astray = connection.execute(query).fetchone() or ()
                if astray:
                    strays.append(f"{astray} of {name} on {shard}")
            products, sold_out = connection.execute(_HOT).fetchone() or ()
            hot += Counter(products=products, sold_out=sold_out)
            stored |= _column(connection, _ORDERS)
            servers_of.update(_column(connection, _TRACES))
    checks = [
        *(Check(c.name, c.ok, c.detail) for c in invariants.check(urls)),
        _placement(strays),
        _acknowledged(set(tally.orders), stored),
        _participants(tally, Counter(servers_of.values())),
    ]
    return Audit(rows, hot["products"], hot["sold_out"], tuple(checks))


def _row_counts(topology: Topology, shard: str) -> dict[str, sql.Composed]:
    """Return the statement that counts each sharded table on *shard*."""
    arcs = multirange(topology.owners, shard)
    statements = {}
    for table in models.Base.metadata.sorted_tables:
        placement = placement_of(table)
        if placement.kind is Kind.SHARDED and placement.pin is not None:
            key = sql.Identifier(placement.column_name)
            statements[table.name] = sql.SQL(_ROWS).format(
                arcs=sql.Literal(arcs),
                hash=sql.SQL(placement.pin.hash_sql).format(key),
                table=sql.Identifier(table.name),
            )
    return statements


def _column(connection: psycopg.Connection, query: LiteralString) -> set[str]:
    return {row[0] for row in connection.execute(query)}


def _placement(strays: list[str]) -> Check:
    return Check("Every row is where the ring says", not strays, "; ".join(strays))


def _acknowledged(told: set[str], stored: set[str]) -> Check:
    """Compare the orders that buyers were told of with those that there are."""
    wrong = []
    if lost := told - stored:
        wrong.append(f"{len(lost)} lost, such as {min(lost)}")
    if surplus := stored - told:
        wrong.append(f"{len(surplus)} nobody was told of, such as {min(surplus)}")
    return Check(
        "Orders acknowledged are orders stored",
        not wrong,
        "; ".join(wrong) or f"{len(stored)} orders",
    )


def _participants(tally: Tally, found: Counter[int]) -> Check:
    """Compare the shards that sessions wrote orders on with where their rows are."""
    counted = Counter(
        {
            number: len(latencies)
            for number, latencies in tally.by_participants("place order").items()
        }
    )
    return Check(
        "Orders are on as many servers as sessions wrote on",
        counted == found,
        _by_number(counted)
        if counted == found
        else f"sessions: {_by_number(counted)}; servers: {_by_number(found)}",
    )


def _by_number(orders: Counter[int]) -> str:
    return ", ".join(f"{n} on {number}" for number, n in sorted(orders.items()))


def _libpq(url: str) -> str:
    return (
        make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    )
