"""Choices drawn from Hypothesis, so that a failure shrinks to the first of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

__all__ = ["Choices", "Replay"]


@functools.cache
def _below(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n - 1)


class Choices:
    """Picks; what comes first in a list is what shrinking ends at."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.made: list[int] = []

    def below(self, n: int) -> int:
        """Return an int from 0 to n - 1."""
        self.made.append(0 if n < 2 else int(self._draw(_below(n))))
        return self.made[-1]

    def chance(self, percent: int) -> bool:
        """Return True in so many of a hundred."""
        return self.below(100) >= 100 - percent

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def pick(self, *options: Any) -> Any:
        return self.one(options)

    def some(self, options: Sequence[Any], least: int, most: int) -> list[Any]:
        """Return some of the options, without repeats, in any order."""
        left = list(options)
        count = least + self.below(most - least + 1)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]

    def weighted(self, options: Sequence[tuple[int, Any]]) -> Any:
        """Return one of (weight, option) pairs, the heavier the likelier."""
        left = self.below(sum(weight for weight, _ in options))
        for weight, option in options:
            if left < weight:
                return option
            left -= weight
        raise AssertionError("unreachable")


class Replay(Choices):
    """The choices that were made before, once more."""

    def __init__(self, made: Sequence[int]) -> None:
        self._left = iter(made)

    def below(self, n: int) -> int:
        return next(self._left)
