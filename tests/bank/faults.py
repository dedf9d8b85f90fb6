"""The faults, chosen by a seed alone: a sequence without end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bank.proxy import MESSAGES, MOMENTS

__all__ = ["Fault", "faults"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; ``seconds`` is how long it lasts, ``pause`` what is waited after."""

    kind: str
    target: str
    seconds: float
    pause: float
    message: str = ""
    moment: str = ""

    def __str__(self) -> str:
        details = [self.kind, self.target, self.message, self.moment]
        return f"{' '.join(filter(None, details))} for {self.seconds:.1f} s"


_WEIGHTS = {
    "cut": 12,
    "cut all": 1,
    "deaf": 1,
    "slow": 1,
    "kill server": 2,
    "restart server": 1,
    "crash backend": 1,
    "pause server": 2,
    "kill client": 3,
    "pause client": 2,
}


def faults(seed: int, shards: Sequence[str], clients: Sequence[str]) -> Iterator[Fault]:
    """Yield faults that last up to 8 seconds, about one a second."""
    pick = random.Random(f"faults {seed}")
    while True:
        (kind,) = pick.choices([*_WEIGHTS], [*_WEIGHTS.values()])
        target = pick.choice(clients if kind.endswith("client") else shards)
        # Mostly short, at times longer than what the protocol is patient for.
        seconds = min(8.0, 0.2 + pick.expovariate(1 / 1.3))
        if kind.startswith("kill"):
            seconds = min(seconds, 3.0) if pick.random() < 0.8 else 0.0
        yield Fault(
            kind,
            target,
            round(seconds, 2),
            round(pick.choice([0.1, 0.8, 1.0, 1.2, 1.9]), 2),
            message=pick.choice([*MESSAGES]) if kind == "cut" else "",
            moment=pick.choice(MOMENTS) if kind == "cut" else "",
        )
