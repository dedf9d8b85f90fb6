"""A request's transaction: runs a use case, shapes its result, commits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Concatenate, ParamSpec, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel

from shardalchemy import AsyncShardedSession, ShardedSession

P = ParamSpec("P")
T = TypeVar("T")
View = TypeVar("View", bound=BaseModel)


class Transaction:
    """Commits when the use case returns, rolls back when it raises.

    Views are made while the transaction is open, so that what a view shows of an
    order's relationships is of the same moment, and may still be loaded.
    """

    def __init__(self, session: AsyncShardedSession) -> None:
        self._session = session

    async def run(
        self,
        use_case: Callable[Concatenate[ShardedSession, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        async with self._session.begin():
            return await self._session.run_sync(use_case, *args, **kwargs)

    async def one(
        self,
        view: type[View],
        use_case: Callable[Concatenate[ShardedSession, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> View:
        def shaped(session: ShardedSession) -> View:
            return view.model_validate(use_case(session, *args, **kwargs))

        return await self.run(shaped)

    async def many(
        self,
        view: type[View],
        use_case: Callable[Concatenate[ShardedSession, P], Iterable[object]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[View]:
        def shaped(session: ShardedSession) -> list[View]:
            return [
                view.model_validate(item) for item in use_case(session, *args, **kwargs)
            ]

        return await self.run(shaped)


async def _transaction(request: Request) -> AsyncIterator[Transaction]:
    async with request.app.state.session_factory() as session:
        yield Transaction(session)


InTransaction = Annotated[Transaction, Depends(_transaction)]
