"""Counts of what has happened to a process's cross-shard transactions."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Counters"]


class Counters:
    """Counts by name, from the start of the process; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Add *count* to a name's."""
        with self._lock:
            self._counts[name] += count

    def read(self) -> Mapping[str, int]:
        """Return all counts, as they are now."""
        with self._lock:
            return dict(sorted(self._counts.items()))
