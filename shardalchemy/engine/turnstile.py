"""A lock for code that runs in threads and under event loops alike."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OneAtATime"]


class OneAtATime:
    """Lets one thread at a time in, and one task at a time of each event loop.

    Under a loop it must be used within SQLAlchemy's greenlet; a waiting task lets the
    loop go on, where a thread's lock would stop the task that holds it.
    """

    def __init__(self) -> None:
        self._thread = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
            WeakKeyDictionary()
        )

    @contextmanager
    def held(self, *, is_async: bool) -> Iterator[None]:
        """Hold the lock for the length of a ``with`` block."""
        if not is_async:
            with self._thread:
                yield
            return
        lock = self._loops.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        await_only(lock.acquire())
        try:
            yield
        finally:
            lock.release()
