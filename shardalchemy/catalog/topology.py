"""The topology as a value: which shard owns which slots, at one epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from shardalchemy.ring import SLOTS, Ring, arcs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import URL

__all__ = ["ShardAddress", "Topology"]


@dataclass(frozen=True, slots=True)
class ShardAddress:
    """A shard's permanent number, and where its server listens; no credentials.

    The number is given once and never again: transaction ids name participants by it.
    """

    number: int
    host: str | None
    port: int | None
    database: str | None

    @classmethod
    def of(cls, number: int, url: URL) -> ShardAddress:
        """Return the address that *url* names."""
        return cls(number, url.host, url.port, url.database)


@dataclass(frozen=True, slots=True)
class Topology:
    """Which shard owns which slots, at one epoch; equal topologies are equal values."""

    epoch: int
    cluster: str
    home: str
    addresses: Mapping[str, ShardAddress]
    ring: Ring
    owners: tuple[str, ...] = field(init=False, repr=False, compare=False)
    owning: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """The shards that own slots, in the order of `shards`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", self.ring.owners)
        some = set(self.ring.owners)
        object.__setattr__(
            self, "owning", tuple(s for s in self.addresses if s in some)
        )

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of all shards, those that own no slots yet included."""
        return tuple(self.addresses)

    def owner(self, slot: int) -> str:
        """Return the shard that owns *slot*, 0 to 4095."""
        return self.owners[slot]

    def arcs(self, shard: str) -> list[tuple[int, int]]:
        """Return *shard*'s runs of slots as ``(first, last)``, both included."""
        return arcs(self.owners, shard)

    def document(self) -> dict[str, Any]:
        """Return the topology as JSON values, runs of slots by their length."""
        return {
            "cluster": self.cluster,
            "home": self.home,
            "shards": {
                name: {
                    "number": a.number,
                    "host": a.host,
                    "port": a.port,
                    "database": a.database,
                }
                for name, a in self.addresses.items()
            },
            "slots": [
                [owner, sum(1 for _ in run)] for owner, run in groupby(self.owners)
            ],
        }

    @classmethod
    def from_document(cls, epoch: int, document: Mapping[str, Any]) -> Topology:
        """Return the topology that `document` wrote."""
        owners = tuple(name for name, size in document["slots"] for _ in range(size))
        assert len(owners) == SLOTS
        # jsonb orders the names of an object by length; the numbers are the order.
        shards = sorted(document["shards"].items(), key=lambda item: item[1]["number"])
        return cls(
            epoch,
            document["cluster"],
            document["home"],
            {name: ShardAddress(**address) for name, address in shards},
            Ring(owners),
        )
