"""Tallies add up, whatever the processes saw."""

from __future__ import annotations

import pickle

import pytest

from shardalchemy.cli.tally import Tally, quantile


def tally(use_case: str, participants: int, *seconds: float) -> Tally:
    made = Tally(seconds=max(seconds))
    made.latencies[use_case, participants].extend(seconds)
    return made


def test_tallies_of_several_processes_are_one() -> None:
    total = tally("place order", 2, 0.1, 0.3)
    other = tally("place order", 2, 0.2)
    other.refusals["sold out"] += 1
    other.orders.append("an id")
    total.add(pickle.loads(pickle.dumps(other)))
    total.add(tally("fill cart", 1, 0.4))
    assert total.of("place order") == [0.1, 0.3, 0.2]
    assert total.use_cases == ["fill cart", "place order"]
    assert total.by_participants() == {1: [0.4], 2: [0.1, 0.3, 0.2]}
    assert total.by_participants("place order") == {2: [0.1, 0.3, 0.2]}
    assert total.refusals == {"sold out": 1}
    assert total.orders == ["an id"]
    assert total.seconds == 0.4  # at the same time, not one after the other


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100)]
)
def test_a_quantile_is_a_value_that_was_measured(share: float, expected: int) -> None:
    assert quantile(range(100, 0, -1), share) == expected


def test_a_quantile_of_one_value_is_that_value() -> None:
    assert quantile([3.0], 0.5) == quantile([3.0], 0.99) == 3.0
