"""The commit protocol's machines in every interleaving that `model` explores."""

from __future__ import annotations

import pytest

from tests.commit.model import BUGS, SIZES, Bug, Exploration, Size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_transaction_ends_alike_everywhere_and_as_its_session_was_told(
    size: Size,
) -> None:
    outcome = Exploration(size).run()
    assert outcome.violation is None, "\n".join([outcome.violation, *outcome.trace])
    # An exploration that something keeps from going far proves nothing.
    assert outcome.states > 10_000


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_exploration_finds_a_seeded_bug(bug: Bug) -> None:
    assert bug.found().violation is not None
