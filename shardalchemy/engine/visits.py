"""Visits to several shards at once, in threads, for work that no session waits for.

A fan-out waits for open connections in one thread. Here connecting is part of the work,
and a server that accepts connections and says nothing is part of life.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Visits"]

T = TypeVar("T")


class Visits:
    """Visits to several shards at once, each in a thread, none waited for too long.

    A shard whose last visit is still under way when it was given up is not visited
    again before that has ended: a server that hangs costs one thread, one connection.
    """

    def __init__(self) -> None:
        self._given_up: dict[str, threading.Thread] = {}

    def at_once(
        self, visit: Callable[[str], T], shards: Iterable[str], deadline: float
    ) -> dict[str, T | Exception]:
        """Call ``visit(shard)`` for all; an error is an answer, lateness an error."""
        answers: dict[str, T | Exception] = {}

        def run(shard: str) -> None:
            try:
                answers[shard] = visit(shard)
            except Exception as error:
                answers[shard] = error

        threads: dict[str, threading.Thread] = {}
        asked = list(shards)
        for shard in asked:
            before = self._given_up.get(shard)
            if before is None or not before.is_alive():
                threads[shard] = threading.Thread(
                    target=run, args=(shard,), name="shardalchemy-visit", daemon=True
                )
                threads[shard].start()
        for shard, thread in threads.items():
            thread.join(max(0.05, deadline - time.monotonic()))
            if thread.is_alive():
                self._given_up[shard] = thread
        late = TimeoutError("it does not answer")
        return {shard: answers.get(shard, late) for shard in asked}
