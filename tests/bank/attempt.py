"""A plan carried out, by a session or ``cluster.run``, and what is known of it then."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from shardalchemy import Cluster, CommitOutcomeUnknown
from tests.bank.history import Outcome
from tests.bank.journal import Reads
from tests.bank.model import Account, List, Notice, Transfer
from tests.bank.plans import Plan

__all__ = ["Attempt", "look"]


def carry_out(session: Session, plan: Plan) -> Reads:
    """Do what a plan says, but for its end; return what was read of lists."""
    if plan.kind == "transfer":
        for account, amount in plan.parts:
            _move(session, plan, account, amount)
        if plan.undone is not None:
            savepoint = session.begin_nested()
            _move(session, plan, *plan.undone, id=-plan.id)
            session.flush()
            savepoint.rollback()
        return []
    if plan.kind == "notice":
        for key, value in plan.appends:
            _append(session, key, value, Notice)
        return []
    if plan.kind == "look":
        return look(session, plan.reads)
    rows = {}
    reads = []
    for key in plan.reads:
        rows[key] = session.get_one(List, key, with_for_update=True)
        reads.append((key, rows[key].items))
    for key, value in plan.appends:
        if key in rows:
            rows[key].items = [*rows[key].items, value]
        else:
            _append(session, key, value)
    if plan.undone is not None:
        session.flush()
        savepoint = session.begin_nested()
        _append(session, *plan.undone)
        savepoint.rollback()
    return reads


def _move(
    session: Session, plan: Plan, account: int, amount: int, id: int | None = None
) -> None:
    if plan.id % 2:
        row = session.get_one(Account, account, with_for_update=True)
        row.balance += amount
    else:
        session.execute(
            update(Account)
            .where(Account.number == account)
            .values(balance=Account.balance + amount)
        )
    session.add(Transfer(account=account, id=id or plan.id, amount=amount))


def _append(
    session: Session, key: int, value: int, model: type[List | Notice] = List
) -> None:
    session.execute(
        update(model)
        .where(model.key == key)
        .values(items=func.array_append(model.items, value))
    )


def look(session: Session, keys: Iterable[int]) -> Reads:
    found = session.execute(select(List.key, List.items).where(List.key.in_(keys)))
    return [(key, items) for key, items in found]


def outcome_after(error: Exception) -> Outcome:
    """Return what a client knows of its transaction by an error.

    Every error claims that nothing was kept, but for the one that does not know.
    """
    if isinstance(error, CommitOutcomeUnknown):
        return Outcome.UNKNOWN
    return Outcome.ROLLED_BACK


class Attempt:
    """A plan being carried out: what was read, and what became of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reads: Reads = []
        self.outcome = Outcome.UNKNOWN

    def __call__(self, session: Session) -> None:
        self.reads = carry_out(session, self.plan)

    def run(self, cluster: Cluster, session: Session | None) -> None:
        """Carry it out in a session, or in one of its own."""
        makers = cluster.sessionmaker(ack=self.plan.ack)
        if session is None and self.plan.way == "retried":
            cluster.run(self, sessionmaker=makers, attempts=4, timeout=10)
            self.outcome = Outcome.COMMITTED
            return
        with makers() if session is None else nullcontext(session) as session:
            self(session)
            if self.plan.way == "abandoned":
                self.outcome = Outcome.ROLLED_BACK
                session.rollback()
            else:
                session.commit()
                self.outcome = Outcome.COMMITTED

    async def run_async(self, cluster: Cluster, session: AsyncSession | None) -> None:
        """Do the same in an event loop."""
        makers = cluster.async_sessionmaker(ack=self.plan.ack)
        if session is None and self.plan.way == "retried":

            async def body(session: Any) -> None:
                await session.run_sync(self)

            await cluster.run_async(body, sessionmaker=makers, attempts=4, timeout=10)
            self.outcome = Outcome.COMMITTED
            return
        async with makers() if session is None else nullcontext(session) as session:
            await session.run_sync(self)
            if self.plan.way == "abandoned":
                self.outcome = Outcome.ROLLED_BACK
                await session.rollback()
            else:
                await session.commit()
                self.outcome = Outcome.COMMITTED

    def failed(self, error: Exception) -> None:
        """Take note of an error, unless the outcome was known before it."""
        if self.outcome is Outcome.UNKNOWN:
            self.outcome = outcome_after(error)
