"""Statements over many rows: merged from four shards, pinned to one, or inserted.

Every way is asked once before it is measured, and its answer compared with that of one
server that has all the rows. What is refused, or wrong, is shown as such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from sqlalchemy import Select, func, insert, select
from sqlalchemy.dialects.postgresql import psycopg as dialect
from sqlalchemy.orm import Session, sessionmaker

from shardalchemy import UnsupportedQueryError
from shardalchemy.engine import fanout
from shardalchemy.local import LocalCluster
from tests.bench.bare import BareReads
from tests.bench.paired import Row, in_turn, table
from tests.bench.peers import Peers
from tests.bench.sales import Receipt, Sale, Sales

__all__ = ["main"]

MERGED: Mapping[str, Select[Any]] = {
    "count(*)": select(func.count()).select_from(Sale),
    "sum(…) GROUP BY": select(Sale.category, func.sum(Sale.amount)).group_by(
        Sale.category
    ),
    "top 100": select(Sale.id, Sale.weight).order_by(Sale.weight, Sale.id).limit(100),
    "top 100 by an index": select(Sale.id, Sale.amount)
    .order_by(Sale.amount, Sale.id)
    .limit(100),
}
KEYS = 1_000
BULK = 10_000

Read = Callable[[], list[tuple[Any, ...]]]


def merged(peers: Peers, sales: Sales, rounds: int) -> list[Row]:
    """Aggregates and ordered limits over all shards.

    The bare connections run what a shard has to, at once, and do not merge.
    """
    bare = BareReads(peers)
    rows = []
    for what, statement in MERGED.items():
        ways = {
            "ShardedSession": reading(peers.sharded(), statement),
            "horizontal_shard": reading(peers.horizontal(), statement),
        }
        if sales.fdw is not None:
            ways["postgres_fdw, 4 partitions"] = reading(
                sessionmaker(sales.fdw), statement
            )
        found = measured(
            f"{what} of {sales.rows:,} rows",
            {"bare psycopg, 4 connections, not merged": pushed_down(bare, statement)},
            ways,
            sales.expected(statement),
            rounds,
            ordered=bool(statement._order_by_clauses),
        )
        limit = 1.3 * found[0].median + 1e-3
        target = f"≤ {limit * 1e3:.2f} ms (1.3 x + 1 ms)"
        rows += [
            replace(row, target=target) if "ShardedSession" in row.way else row
            for row in found
        ]
    bare.close()
    return rows


def many_keys(peers: Peers, sales: Sales, rounds: int) -> list[Row]:
    """A thousand keys in one IN."""
    step = max(sales.rows // KEYS, 1)
    keys = [1 + number * step for number in range(min(KEYS, sales.rows))]
    own: dict[str, list[int]] = {shard: [] for shard in peers.shards}
    for key in keys:
        own[peers.cluster.shard_for(Sale, key)].append(key)

    def wanted(keys: list[int]) -> Select[Any]:
        return select(Sale.id, Sale.amount).where(Sale.id.in_(keys))

    def at_once(keys_of: Callable[[str], list[int]]) -> Read:
        """Run a plain Session on each shard, at once; the keys are sorted before."""
        statements = {shard: wanted(keys_of(shard)) for shard in peers.shards}

        def step(shard: str, connection: Any) -> list[Any]:
            with Session(connection) as session:
                return list(session.execute(statements[shard]).all())

        def run() -> list[tuple[Any, ...]]:
            connections = {s: e.connect() for s, e in peers.engines.items()}
            try:
                parts = fanout(step, connections)
            finally:
                for connection in connections.values():
                    connection.close()
            return [row for part in parts.values() for row in part]

        return run

    ways = {
        "ShardedSession": reading(peers.sharded(), wanted(keys)),
        "4 plain Sessions at once, each its own keys": at_once(own.__getitem__),
        "horizontal_shard, all keys to each": reading(peers.horizontal(), wanted(keys)),
    }
    if sales.fdw is not None:
        ways["postgres_fdw, 4 partitions"] = reading(
            sessionmaker(sales.fdw), wanted(keys)
        )
    return measured(
        f"{len(keys):,} keys in one IN",
        {"4 plain Sessions at once, all keys to each": at_once(lambda _: keys)},
        ways,
        sales.expected(wanted(keys)),
        rounds,
    )


def pinned(peers: Peers, sales: Sales, rounds: int) -> list[Row]:
    """One shard's statements, their plans known; and after all has been forgotten."""
    mine = [
        n
        for n in range(1, min(sales.rows, 4_000) + 1)
        if peers.cluster.shard_for(Sale, n) == "s1"
    ]
    makers = {"plain Session": peers.plain("s1"), "ShardedSession": peers.sharded()}
    with peers.sharded()() as session:
        engine = session.get_bind(shard="s1")

    def row(session: Any, turn: int) -> None:
        key = mine[turn % len(mine)]
        session.scalars(select(Sale).where(Sale.id == key)).one()

    def report(session: Any, turn: int) -> None:
        """Ask for what would have to be merged, were it not of one key."""
        running = func.sum(func.sum(Sale.amount)).over(order_by=Sale.category)
        session.execute(
            select(Sale.category, func.count(), running)
            .where(Sale.id == mine[turn % len(mine)])
            .group_by(Sale.category)
            .order_by(func.sum(Sale.amount).desc(), Sale.category)
            .limit(10)
        ).one()

    def warm(run: Callable[..., None], make: Any) -> Callable[[int], None]:
        def once(turn: int) -> None:
            with make() as session:
                run(session, turn)

        return once

    def cold(run: Callable[..., None], make: Any) -> Callable[[int], float]:
        def once(turn: int) -> float:
            peers.engines["s1"].clear_compiled_cache()
            engine.clear_compiled_cache()
            # What is known of statements depends on the guarded names: none is new,
            # but all is looked at again.
            peers.cluster._analyser.guard(())
            start = time.perf_counter()
            with make() as session:
                run(session, turn)
            return time.perf_counter() - start

        return once

    rows = []
    for what, run in (("a row by its key", row), ("a report of one key", report)):
        for state, how, target in (("warm", warm, "≤ 1.10"), ("cold", cold, "")):
            rows += in_turn(
                f"{what}, {state}",
                {way: how(run, make) for way, make in makers.items()},
                rounds * 10,
                {"ShardedSession": target},
            )
    return rows


def bulk(peers: Peers, sales: Sales, rounds: int) -> list[Row]:
    """Ten thousand rows in one INSERT of the ORM, and in one flush, committed."""
    size = min(BULK, sales.rows)
    numbers = count(1)

    def rows_of(many: int) -> list[dict[str, Any]]:
        return [
            {"id": n, "amount": n % 1000, "name": f"receipt {n}"}
            for n, _ in zip(numbers, range(many), strict=False)
        ]

    def executed(make: Any, many: int = size) -> float:
        rows = rows_of(many)
        start = time.perf_counter()
        with make.begin() as session:
            session.execute(insert(Receipt), rows)
        return time.perf_counter() - start

    def flushed(make: Any, many: int = size) -> float:
        rows = [Receipt(**row) for row in rows_of(many)]
        start = time.perf_counter()
        with make.begin() as session:
            session.add_all(rows)
        return time.perf_counter() - start

    makers: dict[str, Any] = {
        "plain Session, one server": sessionmaker(sales.one),
        "ShardedSession": peers.sharded(),
    }
    found = []
    for what, insert_rows in (
        ("one ORM INSERT", executed),
        ("one flush", flushed),
    ):
        label = f"{size:,} rows by {what}"
        answering = {}
        refused = []
        for way, make in makers.items():
            try:
                insert_rows(make, 10)
            except UnsupportedQueryError:
                refused.append(_refused(label, way))
            else:
                answering[way] = lambda _, make=make, run=insert_rows: run(make)
        found += in_turn(
            label, answering, max(rounds // 4, 1), {"ShardedSession": "≤ 1.11"}
        )
        found += refused
    return found


def reading(make: Any, statement: Any) -> Read:
    """Return what executes *statement* in a session of its own."""

    def run() -> list[tuple[Any, ...]]:
        with make() as session:
            return list(session.execute(statement).all())

    return run


def pushed_down(bare: BareReads, statement: Select[Any]) -> Read:
    """Return what has every server run *statement* over its own rows, at once."""
    sql = statement.compile(
        dialect=dialect.dialect(), compile_kwargs={"literal_binds": True}
    )
    return lambda: bare.read(str(sql))


def measured(
    what: str,
    baseline: Mapping[str, Read],
    ways: Mapping[str, Read],
    expected: list[tuple[Any, ...]],
    rounds: int,
    *,
    ordered: bool = False,
) -> list[Row]:
    """Measure the ways that answer; say of each whether its answer is right.

    The *baseline* comes first and is what the others are compared with; it merges
    nothing, so its answer is not looked at. The order counts where it is *ordered*.
    """
    answering = dict(baseline)
    refused = []
    for way, run in ways.items():
        try:
            found = [tuple(row) for row in run()]
        except UnsupportedQueryError:
            refused.append(_refused(what, way))
            continue
        answering[way + _verdict(found, expected, ordered)] = run
    runs = {way: _in_a_turn(run) for way, run in answering.items()}
    return [*in_turn(what, runs, rounds), *refused]


def _in_a_turn(run: Read) -> Callable[[int], None]:
    def once(_: int) -> None:
        run()

    return once


def _verdict(
    found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], ordered: bool
) -> str:
    if len(found) != len(expected):
        return f" (wrong: {len(found)} rows, not {len(expected)})"
    if not ordered:
        found, expected = sorted(found), sorted(expected)
    return "" if found == expected else " (wrong: other rows)"


def _refused(what: str, way: str) -> Row:
    return Row(what, f"{way}: refused", math.nan, math.nan)


ALL = (merged, many_keys, pinned, bulk)


def main(rows: int = 1_000_000, rounds: int = 20) -> str:
    """Measure statements over *rows* rows on servers of its own; return the table."""
    with LocalCluster(4, with_redis=False) as local, local.cluster() as cluster:
        peers = Peers(cluster, local.urls)
        start = time.perf_counter()
        sales = Sales(cluster, local.urls, rows)
        loaded = time.perf_counter() - start
        try:
            found = [row for measure in ALL for row in measure(peers, sales, rounds)]
        finally:
            sales.close()
            peers.close()
    note = "" if sales.fdw is not None else " postgres_fdw is not available."
    return (
        f"{table(found)}\n\n{rows:,} rows in each of two tables were made in"
        f" {loaded:.1f} s.{note}"
    )
