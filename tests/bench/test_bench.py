"""The measurements run, and name every peer; how fast they are fails nothing."""

from __future__ import annotations

from tests.bench import queries, snapshots, streaming
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


def test_the_queries_have_every_row_and_no_wrong_answer_of_ours() -> None:
    printed = queries.main(rows=2_000, rounds=1)
    for way in (
        "count(*) of 2,000 rows",
        "bare psycopg, 4 connections",
        "postgres_fdw, 4 partitions",
        "horizontal_shard (wrong: 4 rows, not 1)",
        "1,000 keys in one IN",
        "a report of one key, cold",
        "2,000 rows by one ORM INSERT",
    ):
        assert way in printed
    assert "ShardedSession (wrong" not in printed
    assert "partitions (wrong" not in printed


def test_streaming_reads_every_row_once() -> None:
    printed = streaming.main(rows=5_000)
    assert printed.count("| 5,000 |") == 2
    assert "wrong" not in printed


def test_snapshots_are_measured_and_tear_nothing() -> None:
    printed = snapshots.main(rounds=2, seconds=1)
    for way in ("in turn, bare psycopg", "cluster.snapshot()", "strict=True", "slower"):
        assert way in printed
