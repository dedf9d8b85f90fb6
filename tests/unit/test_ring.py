"""The ring without a server: allocation, arcs, key types."""

from __future__ import annotations

import datetime
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardalchemy.ring import (
    KEY_TYPES,
    SLOTS,
    allocate,
    arcs,
    multirange,
    reallocate,
    slot_of_hash,
)
from shardalchemy.ring.bulk import slots_int8
from shardalchemy.ring.hashing import hash_bytes, hash_int8, slot_bytes, slot_int8

bigints = st.integers(-(2**63), 2**63 - 1)


def test_the_published_vectors_of_postgresql() -> None:
    assert hash_int8(42) == 8010225493015854792
    assert hash_bytes(b"abc") == -6747756470228489321


@given(bigints)
def test_the_short_path_of_an_integer_gives_its_hash_s_slot(key: int) -> None:
    assert slot_int8(key) == slot_of_hash(hash_int8(key))


@given(st.binary(max_size=100))
def test_the_slot_of_bytes_is_its_hash_s_slot(key: bytes) -> None:
    assert slot_bytes(key) == slot_of_hash(hash_bytes(key))


@given(st.lists(bigints, max_size=50))
def test_bulk_slots_are_the_single_ones(keys: list[int]) -> None:
    assert slots_int8(keys) == [slot_int8(key) for key in keys]


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1])
def test_bulk_slots_refuse_what_is_no_bigint(key: int) -> None:
    with pytest.raises(OverflowError):
        slots_int8([key])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("int8", True),
        ("int8", 1.0),
        ("int8", "1"),
        ("int8", 2**63),
        ("text", b"a"),
        ("text", "\ud800"),
        ("uuid", "not a uuid"),
        ("uuid", 5),
        ("bytea", "text"),
        ("date", datetime.datetime(2026, 1, 1)),
        ("date", "2026-01-01"),
    ],
)
def test_a_value_of_another_type_has_no_slot(name: str, value: object) -> None:
    assert KEY_TYPES[name].slot(value) is None


def test_texts_of_a_uuid_are_the_uuid() -> None:
    value = uuid.uuid4()
    slot = KEY_TYPES["uuid"].slot
    assert slot(str(value)) == slot(value) == slot(value.hex.upper())


weights = st.dictionaries(
    st.sampled_from([f"s{n}" for n in range(12)]),
    st.floats(0.1, 10),
    min_size=1,
    max_size=12,
)


@given(weights, st.lists(weights, max_size=4))
def test_any_series_of_changes_stays_even_and_moves_the_least(
    first: dict[str, float], changes: list[dict[str, float]]
) -> None:
    ring = allocate(first)
    for change in changes:
        before = ring.counts()
        ring_after = reallocate(ring, change)
        after = ring_after.counts()
        total = sum(change.values())
        for shard, weight in change.items():
            assert abs(after.get(shard, 0) - SLOTS * weight / total) < 1
        assert set(after) <= set(change)
        moved = sum(a != b for a, b in zip(ring.owners, ring_after.owners, strict=True))
        gained = sum(max(0, after[s] - before.get(s, 0)) for s in after)
        assert moved == gained
        ring = ring_after


def test_a_new_ring_is_one_arc_a_shard() -> None:
    ring = allocate(["a", "b", "c"])
    assert sorted(ring.counts().values()) == [1365, 1365, 1366]
    assert [len(arcs(ring.owners, shard)) for shard in "abc"] == [1, 1, 1]


def test_adding_a_fifth_shard_moves_one_fifth() -> None:
    ring = allocate(["a", "b", "c", "d"])
    grown = reallocate(ring, dict.fromkeys("abcde", 1.0))
    moved = sum(a != b for a, b in zip(ring.owners, grown.owners, strict=True))
    assert moved == grown.counts()["e"] == 819


@pytest.mark.parametrize("bad", [{}, {"a": -1.0}, {"a": 0.0}, {"a": float("nan")}])
def test_weights_that_share_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        allocate(bad)


def test_the_last_arc_has_no_upper_bound() -> None:
    ring = allocate(["a", "b"])
    assert multirange(ring.owners, "a") == "{[-9223372036854775808,0)}"
    assert multirange(ring.owners, "b") == "{[0,)}"
    assert multirange(ring.owners, "c") == "{}"
