"""The flash sale, seen from where it is held: what it is, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardalchemy.cli import buyers
from shardalchemy.cli.processes import Workers
from shardalchemy.cli.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardalchemy.cli.shop import ShopSize
    from shardalchemy.commit import Ack

__all__ = ["Sale", "hold"]


@dataclass(frozen=True, slots=True)
class Sale:
    """A sale of *seconds* in the shop at *urls*, which *size* describes.

    Its *buyers* come in several *processes*; *redis* is where they queue for hot
    products, *ack* when their commits return.
    """

    urls: Mapping[str, str]
    redis: str
    size: ShopSize
    seconds: int
    buyers: int
    processes: int
    ack: Ack


def hold(sale: Sale, progress: Callable[[int, int], object]) -> Tally:
    """Hold the sale and return what all buyers saw.

    *progress* is called a few times a second with how many orders were placed and how
    many refused since its last call; the first time, with zeros, when the sale opens.
    """
    total = Tally()
    arriving = sale.processes
    with Workers(
        buyers.attend, [(sale, part) for part in range(sale.processes)]
    ) as workers:
        for message in workers.messages():
            if isinstance(message, Tally):
                total.add(message)
            elif message != buyers.HERE:
                progress(*message)
            elif (arriving := arriving - 1) == 0:
                # At the same time for all, with every import and connection behind.
                workers.tell(buyers.OPEN)
                progress(0, 0)
    return total
