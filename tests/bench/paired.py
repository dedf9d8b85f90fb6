"""Measuring several ways to do one thing, in turn."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

__all__ = ["Row", "in_turn", "in_turn_async", "shuffled", "table"]


@dataclass(frozen=True, slots=True)
class Row:
    """One way's median, in seconds, and its ratio to the first way's.

    Both are NaN of a way that has no answer.
    """

    what: str
    way: str
    median: float
    ratio: float
    target: str = ""


def in_turn(
    what: str,
    ways: Mapping[str, Callable[[int], float | None]],
    rounds: int,
    targets: Mapping[str, str] | None = None,
) -> list[Row]:
    """Run each way once a round; a way may return its own measure of the time."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(min(rounds, 20)):
        for run in ways.values():
            run(turn)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for way in shuffled(ways, turn):
                start = time.perf_counter()
                own = ways[way](turn)
                elapsed = time.perf_counter() - start
                times[way].append(elapsed if own is None else own)
    finally:
        gc.enable()
    return _rows(what, times, targets or {})


def in_turn_async(
    what: str,
    ways: Mapping[str, Callable[[int], Awaitable[None]]],
    rounds: int,
    targets: Mapping[str, str] | None = None,
    *,
    at_the_end: Callable[[], Awaitable[None]],
) -> list[Row]:
    """Do the same for coroutines, in one event loop, with a last one to clean up."""

    async def measured() -> dict[str, list[float]]:
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 5):
            for way in shuffled(ways, turn):
                start = time.perf_counter()
                await ways[way](turn)
                times[way].append(time.perf_counter() - start)
        await at_the_end()
        return {way: found[5:] for way, found in times.items()}

    return _rows(what, asyncio.run(measured()), targets or {})


def shuffled(ways: Mapping[str, object], turn: int) -> list[str]:
    """Return the ways in an order of this turn's own.

    In a fixed or a merely reversed order, one way would always find the caches as the
    same other, or it itself, has left them.
    """
    order = list(ways)
    random.Random(turn).shuffle(order)
    return order


def _rows(
    what: str, times: Mapping[str, list[float]], targets: Mapping[str, str]
) -> list[Row]:
    medians = {way: statistics.median(found) for way, found in times.items()}
    first = next(iter(medians.values()))
    return [
        Row(what, way, median, median / first, targets.get(way, ""))
        for way, median in medians.items()
    ]


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | way | median | ratio | target |", "|---|---|---:|---:|---|"]
    before = None
    for row in rows:
        unit, scale = ("ms", 1e3) if row.median >= 1e-3 else ("µs", 1e6)
        what = row.what if row.what != before else ""
        before = row.what
        median, ratio = f"{row.median * scale:.2f} {unit}", f"{row.ratio:.2f}"
        if math.isnan(row.median):
            median = ratio = "-"
        lines.append(f"| {what} | {row.way} | {median} | {ratio} | {row.target} |")
    return "\n".join(lines)
