"""Settings that a transaction makes, on every shard that it reaches.

``SET LOCAL timezone`` and its like are plain SQL that runs on the home shard. What the
transaction does on other shards must not come out unlike, so it is repeated there: at
once where the transaction is already, else before its first statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Settings"]


class Settings:
    """The settings of one transaction, in the order in which they were made."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []
        self._reached: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._made)

    def add(self, shard: str, statement: Any, params: Any) -> None:
        """Add what was executed on *shard*."""
        if self._reached.get(shard, 0) == len(self._made):
            self._reached[shard] = len(self._made) + 1
        self._made.append((statement, params))

    def repeat(self, shard: str, connection: Connection) -> None:
        """Execute on *shard* what it does not know yet."""
        known = self._reached.get(shard, 0)
        if known < len(self._made):
            self._reached[shard] = len(self._made)
            for statement, params in self._made[known:]:
                connection.execute(statement, params or {})

    def back_to(self, count: int) -> None:
        """Forget all but the first *count*: a savepoint was rolled back."""
        del self._made[count:]
        self._reached = {s: min(n, count) for s, n in self._reached.items()}

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()
        self._reached.clear()
