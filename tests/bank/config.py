"""What every process of a run has to know, in a file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shardalchemy import Cluster
from tests.bank.model import GENERATION

__all__ = ["CLIENTS", "READER", "WORKERS", "Config"]

CLIENTS = 8
READER = CLIENTS
"""The number of one more process, which looks in snapshots."""
WORKERS = 3
"""Threads or tasks of a client."""


@dataclass(frozen=True, slots=True)
class Config:
    """What a client has to know."""

    urls: dict[str, str]
    directory: str
    seed: int
    began: float
    accounts: dict[str, list[int]]

    @property
    def path(self) -> Path:
        return Path(self.directory, "config.json")

    @property
    def quiet(self) -> Path:
        """The file that ends the work."""
        return Path(self.directory, "quiet")

    def write(self) -> None:
        self.path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Config:
        return cls(**json.loads(Path(path).read_text()))

    def generation(self) -> int:
        return int((time.time() - self.began) / GENERATION)

    def cluster(self) -> Cluster:
        # The timeouts end a wait for rows of a transaction that is in doubt, or whose
        # client has been stopped.
        return Cluster(
            self.urls,
            connect_args={
                "connect_timeout": 10,
                "options": "-c lock_timeout=3s -c statement_timeout=20s",
            },
        )
