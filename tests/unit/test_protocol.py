"""The commit protocol's decisions, and a transaction's name."""

from __future__ import annotations

import pytest

from shardalchemy.commit.gid import Gid
from shardalchemy.commit.protocol import (
    Coordinator,
    Decision,
    Recoverer,
    Reply,
    Request,
)

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
    first = Coordinator.of("ab")
    assert first.decision is None
    assert first.requests == {"a": Request.PREPARE, "b": Request.PREPARE}
    assert first.after({"a": replies[0]}).requests == {"b": Request.PREPARE}
    assert first.after(dict(zip("ab", replies, strict=True))).decision is decision


def test_what_is_prepared_is_told_the_decision_until_it_hears_it() -> None:
    both = Coordinator.of("ab").after({"a": Reply.PREPARED, "b": Reply.PREPARED})
    assert both.requests == {"a": Request.COMMIT, "b": Request.COMMIT}
    half = both.after({"a": Reply.DONE, "b": Reply.LOST})
    assert half.requests == {"b": Request.COMMIT}
    one = Coordinator.of("ab").after({"a": Reply.PREPARED, "b": Reply.REFUSED})
    assert one.requests == {"a": Request.ROLLBACK}
    assert one.after({"a": Reply.DONE}).requests == {}


@pytest.mark.parametrize(
    ("seen", "decision", "requests"),
    [
        ([Reply.PREPARED, Reply.PREPARED], Decision.COMMIT, "commit a b"),
        ([Reply.PREPARED, Reply.COMMITTED], Decision.COMMIT, "commit a"),
        ([Reply.PREPARED, Reply.ABORTED], Decision.ABORT, "roll back a"),
        ([Reply.PREPARED, Reply.UNREACHABLE], Decision.RECOVER, ""),
        ([Reply.UNREACHABLE, Reply.ABORTED], Decision.ABORT, ""),
        ([Reply.UNREACHABLE, Reply.COMMITTED], Decision.COMMIT, ""),
        ([Reply.PREPARED, Reply.ABSENT], None, "fence b"),
        ([Reply.PREPARED, Reply.BUSY], None, "look b"),
        ([Reply.PREPARED, Reply.LOST], None, "look b"),
    ],
)
def test_what_a_recoverer_decides(
    seen: list[Reply], decision: Decision | None, requests: str
) -> None:
    found = Recoverer.of("ab").after(dict(zip("ab", seen, strict=True)))
    assert found.decision is decision
    asked = {request: [] for request in found.requests.values()}
    for name, request in found.requests.items():
        asked[request].append(name)
    assert " ".join([w for r, n in asked.items() for w in (r.value, *n)]) == requests


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
