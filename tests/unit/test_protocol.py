"""The commit protocol's decisions, and a transaction's name."""

from __future__ import annotations

import pytest

from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import Decision, Reply, Seen, decide, verdict

CLUSTER = "0f1e2d3c-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("replies", "decision"),
    [
        ([Reply.PREPARED, Reply.PREPARED], Decision.COMMIT),
        ([Reply.PREPARED, Reply.REFUSED], Decision.ABORT),
        ([Reply.PREPARED, Reply.LOST], Decision.RECOVER),
        ([Reply.REFUSED, Reply.LOST], Decision.ABORT),
        ([Reply.LOST, Reply.LOST], Decision.RECOVER),
    ],
)
def test_what_a_session_decides(replies: list[Reply], decision: Decision) -> None:
    assert decide(replies) is decision


@pytest.mark.parametrize(
    ("seen", "decision"),
    [
        ([Seen.PREPARED, Seen.PREPARED], Decision.COMMIT),
        ([Seen.PREPARED, Seen.COMMITTED], Decision.COMMIT),
        ([Seen.PREPARED, Seen.ABORTED], Decision.ABORT),
        ([Seen.PREPARED, Seen.UNREACHABLE], Decision.RECOVER),
        ([Seen.ABORTED, Seen.UNREACHABLE], Decision.ABORT),
    ],
)
def test_what_a_recoverer_decides(seen: list[Seen], decision: Decision) -> None:
    assert verdict(seen) is decision


def test_a_gid_is_read_back_from_a_branch() -> None:
    gid = Gid.new(CLUSTER, [5, 0, 63])
    assert gid.numbers == (0, 5, 63)
    assert Gid.parse(gid.on(63)) == gid == Gid.parse(str(gid))


def test_a_gid_of_64_participants_is_under_postgresql_s_200_bytes() -> None:
    gid = Gid.new(CLUSTER, range(64))
    assert len(gid.on(63)) < 200


@pytest.mark.parametrize("text", ["", "sa2:0:0:0", "someone's", "sa1:xyz:1:1/1"])
def test_a_gid_that_is_not_ours_is_not_read(text: str) -> None:
    assert Gid.parse(text) is None
