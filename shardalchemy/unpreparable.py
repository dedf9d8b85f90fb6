"""What a session's transaction has done that PostgreSQL does not prepare, by shard.

On the shards where it only notified, or made a temporary table, the transaction commits
plainly, and on a single one it may write as well. Only where it has done so on a shard
that it writes on, and writes on another, is the commit sure to fail: it is refused as
soon as that is certain, not at the commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.obstacles import Obstacle

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Unpreparable"]


class Unpreparable:
    """What keeps one transaction from being prepared, in the order in which it came."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done: list[tuple[str, Obstacle]] = []

    def __len__(self) -> int:
        return len(self._done)

    def add(self, shard: str, obstacle: Obstacle, written: Collection[str]) -> None:
        """Note what is about to be done on *shard*.

        Raises UnsupportedQueryError where the shard, and another, have been *written*.
        """
        if shard in written and len(written) > 1:
            raise _refusal(shard, obstacle, written)
        if (shard, obstacle) not in self._done:
            self._done.append((shard, obstacle))

    def check(self, written: Collection[str]) -> None:
        """Raise UnsupportedQueryError if a shard that is to be prepared cannot be."""
        if len(written) < 2:
            return
        for shard, obstacle in self._done:
            if shard in written:
                raise _refusal(shard, obstacle, written)

    def mark(self) -> int:
        """Return what there is as a savepoint begins."""
        return len(self._done)

    def back_to(self, mark: int) -> None:
        """Forget the notifications since *mark*, which were rolled back.

        A temporary object counts for PostgreSQL even after a rollback to a savepoint.
        """
        self._done[mark:] = [
            (shard, obstacle)
            for shard, obstacle in self._done[mark:]
            if obstacle is Obstacle.TEMPORARY
        ]

    def clear(self) -> None:
        """Forget all."""
        self._done.clear()


def _refusal(
    shard: str, obstacle: Obstacle, written: Collection[str]
) -> UnsupportedQueryError:
    return UnsupportedQueryError(
        f"the transaction {obstacle.what} on shard {shard}, and it writes on"
        f" {', '.join(sorted(written))}: it has to be prepared on each of them, which"
        f" PostgreSQL refuses after that. Roll back. {obstacle.way_out}"
    )
