"""The name of a cross-shard transaction.

Each participant's prepared transaction is called ``sa1:<cluster>:<transaction>:
<participants>/<number>``: the version of this format, the first 8 digits of the
cluster's id, a UUIDv7, the numbers of all participants as a hexadecimal bit set, and
this participant's own number. So any prepared transaction, seen alone, tells whose it
is and where its other parts are. Without the last part it is the marker's key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardalchemy.ids import new_locator

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Gid"]

_FORMAT = re.compile(r"sa1:([0-9a-f]{8}):([0-9a-f]{32}):([0-9a-f]+)(?:/(\d+))?")


@dataclass(frozen=True, slots=True)
class Gid:
    """A cross-shard transaction's name; ``numbers`` are its participants', sorted."""

    cluster: str
    transaction: str
    numbers: tuple[int, ...]

    @classmethod
    def new(cls, cluster: str, numbers: Iterable[int]) -> Gid:
        """Return a new name for a transaction on the shards with these numbers.

        *cluster* is the cluster's id, a UUID as text.
        """
        # A locator is a UUIDv7; here its slot bits carry nothing.
        return cls(cluster[:8], new_locator(0).hex, tuple(sorted(numbers)))

    def __str__(self) -> str:
        bits = sum(1 << number for number in self.numbers)
        return f"sa1:{self.cluster}:{self.transaction}:{bits:x}"

    def on(self, number: int) -> str:
        """Return the name of the prepared transaction on one participant."""
        return f"{self}/{number}"

    @classmethod
    def parse(cls, text: str) -> Gid | None:
        """Return the transaction that *text* names, or None if it is not ours."""
        match = _FORMAT.fullmatch(text)
        if match is None:
            return None
        bits = int(match[3], 16)
        numbers = tuple(n for n in range(bits.bit_length()) if bits >> n & 1)
        return cls(match[1], match[2], numbers)

    @classmethod
    def parse_all(cls, rows: Iterable[tuple[str | None, ...]]) -> list[Gid]:
        """Return the transactions that the first values of *rows* name, if ours."""
        found = (cls.parse(row[0]) for row in rows if row[0] is not None)
        return [gid for gid in found if gid is not None]
