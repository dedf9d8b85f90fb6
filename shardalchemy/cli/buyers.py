"""A process of the sale: its buyers, a thread each, and what they do.

Threads, because both were measured: as tasks over an AsyncShardedSession the same
purchases took half as much CPU time again, and 32 buyers in 4 processes on 2 cores,
which had no time to spare, placed a third fewer orders a second.
"""

from __future__ import annotations

import logging
import threading
import time
from random import Random
from typing import TYPE_CHECKING, Any

from shardalchemy.cli import participants
from shardalchemy.cli.shop import errors, models, services
from shardalchemy.cli.tally import Tally
from shardalchemy.cluster import Cluster
from shardalchemy.errors import LockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from uuid import UUID

    from sqlalchemy.orm import sessionmaker

    from shardalchemy.cli.sale import Sale
    from shardalchemy.session import ShardedSession

__all__ = ["HERE", "OPEN", "attend"]

HERE, OPEN = "here", "open"
"""What a process says when its buyers wait at the door, and hears when it opens."""

# How many visits are for a hot product: while the buyer knows of one that is left, and
# later, because of those that others give back; and how many orders are cancelled.
_WANTS_HOT, _STILL_HOPES, _CHANGES_MIND = 0.8, 0.2, 0.04
# Seconds: between reports, and for what was begun to end after the sale has closed.
_REPORT, _CLOSING = 0.25, 30.0


def attend(parent: Connection[Any, Any], sale: Sale, part: int) -> None:
    """Let this process's share of the buyers buy; send what they saw to *parent*."""
    shop = sale.size.generate()
    logged = _Warnings()
    logging.getLogger("shardalchemy").addHandler(logged)
    participants.observe(models.Base)
    numbers = range(part, sale.buyers, sale.processes)
    with Cluster(
        sale.urls, redis=sale.redis, ack=sale.ack, pool_size=len(numbers) + 2
    ) as cluster:
        # Asked for once, instead of by all buyers at the same time.
        assert cluster.topology
        buyers = [
            Buyer(
                cluster.sessionmaker(),
                name=f"{sale.size.seed}/{number}",
                # No customer has two buyers; the hot products come first.
                customers=[c.id for c in shop.customers[number :: sale.buyers]],
                hot=[p.id for p in shop.products if p.hot],
                ordinary=[p.id for p in shop.products if not p.hot],
            )
            for number in numbers
        ]
        parent.send(HERE)
        parent.recv()
        total = _watch(parent, buyers, sale.seconds)
    total.warnings = logged.counts
    parent.send(total)


def _watch(parent: Connection[Any, Any], buyers: list[Buyer], seconds: int) -> Tally:
    """Run the buyers, report on them, and return the sum of what they saw."""
    start = time.monotonic()
    threads = [
        threading.Thread(target=buyer.buy_until, args=(start + seconds,), daemon=True)
        for buyer in buyers
    ]
    for thread in threads:
        thread.start()
    reported = (0, 0)
    while any(thread.is_alive() for thread in threads):
        if time.monotonic() > start + seconds + _CLOSING:
            break
        time.sleep(_REPORT)
        orders = sum(len(buyer.tally.orders) for buyer in buyers)
        refusals = sum(buyer.tally.refusals.total() for buyer in buyers)
        parent.send((orders - reported[0], refusals - reported[1]))
        reported = (orders, refusals)
    total = Tally()
    for buyer, thread in zip(buyers, threads, strict=True):
        if thread.is_alive():
            total.errors[f"a buyer still waited {_CLOSING:.0f} s after the sale"] += 1
        else:
            buyer.tally.seconds -= start
            total.add(buyer.tally)
    return total


class Buyer:
    """One customer after another of those who came through the same door."""

    def __init__(
        self,
        sessions: sessionmaker[ShardedSession],
        *,
        name: str,
        customers: list[UUID],
        hot: list[UUID],
        ordinary: list[UUID],
    ) -> None:
        self.tally = Tally()
        self._sessions = sessions
        self._random = Random(name)
        self._name = name
        self._customers = customers
        self._hot = self._wanted = hot
        self._ordinary = ordinary
        self._visits = 0

    def buy_until(self, end: float) -> None:
        """Visit the shop again and again until ``time.monotonic()`` is *end*."""
        while time.monotonic() < end:
            self._visits += 1
            try:
                with self._sessions() as session:
                    self._visit(session)
            except LockTimeout:
                # The shop lets nobody queue for longer; its API answers 503 here.
                self.tally.refusals["queue too long"] += 1
            except Exception as error:
                self.tally.errors[_in_a_line(error)] += 1
                time.sleep(0.1)  # not to count a server that is away by the thousand
        self.tally.seconds = time.monotonic()

    def _visit(self, session: ShardedSession) -> None:
        customer = self._random.choice(self._customers)
        address = self._timed(
            session, "fill cart", _fill_cart, customer, self._basket()
        )
        try:
            order = self._place_order(session, customer, address)
        except errors.OutOfStock as error:
            self.tally.refusals["sold out"] += 1
            gone = error.product_ids
            self._wanted = [product for product in self._wanted if product not in gone]
            # What is left in the cart is for this customer's next visit.
            self._timed(session, "clear cart", _take_back, customer, gone)
            return
        if self._random.random() < _CHANGES_MIND:
            self._timed(session, "cancel order", services.cancel_order, order)

    def _basket(self) -> list[UUID]:
        """Return one to three products, rarely from one shard alone."""
        random = self._random
        basket = []
        if random.random() < (_WANTS_HOT if self._wanted else _STILL_HOPES):
            basket.append(random.choice(self._wanted or self._hot))
        fewest = 0 if basket else 1
        return basket + random.sample(self._ordinary, random.randint(fewest, 2))

    def _place_order(
        self, session: ShardedSession, customer: UUID, address: UUID
    ) -> UUID:
        order: UUID = self._timed(
            session,
            "place order",
            _order,
            customer,
            address,
            f"{self._name}/{self._visits}",
        )
        self.tally.orders.append(str(order))
        return order

    def _timed(
        self,
        session: ShardedSession,
        name: str,
        use_case: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """Run a use case in a transaction, and note what it cost if it commits."""
        start = time.perf_counter()
        with session.begin():
            participants.forget(session)
            result = use_case(session, *arguments)
        seconds = time.perf_counter() - start
        self.tally.latencies[name, participants.count(session)].append(seconds)
        return result


def _fill_cart(session: ShardedSession, customer: UUID, basket: list[UUID]) -> Any:
    for product in basket:
        services.put_in_cart(session, customer, product, 1)
    return services.addresses(session, customer)[0].id


def _order(session: ShardedSession, customer: UUID, address: UUID, key: str) -> Any:
    order = services.place_order(
        session, customer, address_id=address, idempotency_key=key
    )
    return order.id  # while it is loaded: a commit expires it


def _take_back(session: ShardedSession, customer: UUID, products: list[UUID]) -> None:
    for product in products:
        services.remove_from_cart(session, customer, product)


def _in_a_line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


class _Warnings(logging.Handler):
    """Counts what the library logs, by the message without its parameters."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts = Tally().warnings

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record."""
        self.counts[str(record.msg)] += 1
