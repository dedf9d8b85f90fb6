"""Keeping a connection from its next statement while the present one is cancelled.

A cancellation names a server process, not a statement: one that arrives late hits what
the process does next. The thread that waits for a statement cannot send the next one
before its own cancellation has arrived; another thread's has to be waited for.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["next_statement_held"]


@contextmanager
def next_statement_held(driver: Any) -> Iterator[None]:
    """Let *driver*, a psycopg connection, begin no statement within a ``with`` block.

    What it is doing goes on. May be called in any thread.
    """
    # psycopg takes the connection's lock for each exchange with the server, and so does
    # `wire`. The one that runs has taken it; the next one finds this in its place.
    held = _Held(driver.lock)
    driver.lock = held
    try:
        yield
    finally:
        driver.lock = held.lock
        held.opened.set_result(None)


class _Held:
    """Stands in for a connection's lock: waits, and then takes the lock itself."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.opened: Future[None] = Future()

    def __enter__(self) -> None:
        self.opened.result()
        self.lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(*error)

    async def __aenter__(self) -> None:
        # A task that is cancelled meanwhile leaves what others wait for as it is.
        await asyncio.shield(asyncio.wrap_future(self.opened))
        await self.lock.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self.lock.__aexit__(*error)
