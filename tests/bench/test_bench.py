"""The measurements run, and name every peer; how fast they are fails nothing."""

from __future__ import annotations

from tests.bench.__main__ import main


def test_the_table_has_every_row() -> None:
    printed = main(2)
    for peer in (
        "plain Session",
        "horizontal_shard",
        "AsyncShardedSession",
        "Session(twophase=True)",
        "uhashring",
    ):
        assert peer in printed
    assert "uneven by 0 slots" in printed
