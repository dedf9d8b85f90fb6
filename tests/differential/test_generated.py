"""A few hundred statements, always the same; the command line searches further."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardalchemy.local import LocalCluster
from tests.differential.search import Search
from tests.differential.twins import Twins

SEED = 0
STATEMENTS = 300
CHUNK = 38  # so that every profile has its turn


@pytest.fixture(scope="module")
def twins(shard_servers: LocalCluster) -> Iterator[Twins]:
    with Twins(shard_servers) as made:
        yield made


def test_no_answer_is_wrong(twins: Twins) -> None:
    search = Search(twins)
    search.run(STATEMENTS, SEED, CHUNK)
    print(f"\nseeds from {SEED}\n{search.tally.report()}")
    assert not search.failures, "\n\n".join(search.failures)
    assert search.tally.outcomes["not made"] < 0.02 * STATEMENTS
    assert search.tally.outcomes["error on both"] < 0.05 * STATEMENTS
