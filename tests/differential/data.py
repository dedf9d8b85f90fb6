"""The rows of both sides: awkward values, in distributions that break merges.

A data set is made from a profile and a seed, so that both name it exactly.
"""

from __future__ import annotations

import datetime
import ipaddress
import random
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects.postgresql import Range

from shardalchemy.schema import placement_of
from tests.differential import models as m

__all__ = ["PROFILES", "Rows", "make_rows"]

Rows = dict[Table, list[dict[str, Any]]]

PROFILES = {
    "mixed": "rows on every shard, a little of everything",
    "ties": "few distinct values, so that most rows tie",
    "lonely": "every key on one shard, the others empty",
    "sparse": "two or three keys, most shards empty",
    "empty": "no sharded row at all",
}

WORDS = [
    *("a", "b", "B", "A", "ä", "Ä", "z", "Z", "e", "é", "e\u0301", "ss", "ß", "ñ"),
    *("", " ", "a b", "ab", "a-b", "A B", "10", "9", "x%y", "O'Hara", '"q"', "\\"),
    *("日本", "🙂", "İ", "i", "I", "\u0131", "long" * 9, "null", "NULL"),
]
LABELS = ["a", "b", "B", "ä", "x y", "", "c001", "long" * 9, "A", "日本", "9", "10"]
UTC = datetime.UTC
STAMPS = [
    datetime.datetime(2024, 3, 10, 6, 59, 59, tzinfo=UTC),  # New York's lost hour
    datetime.datetime(2024, 3, 10, 7, 30, tzinfo=UTC),
    datetime.datetime(2024, 11, 3, 5, 30, tzinfo=UTC),  # and the doubled one
    datetime.datetime(2024, 11, 3, 6, 30, tzinfo=UTC),
    datetime.datetime(2024, 1, 1, 3, 0, tzinfo=UTC),  # still last year over there
    datetime.datetime(2024, 1, 1, 23, 59, 59, 999999, tzinfo=UTC),
    datetime.datetime(1969, 12, 31, 23, 0, tzinfo=UTC),
]
DOCS: list[Any] = [
    None,
    {},
    {"a": 1, "b": "x"},
    {"a": 1.0, "b": None},
    {"a": -2, "b": "X", "c": [1, 2, 3]},
    {"a": "1", "c": ["x", "y"]},
    {"b": {"d": True}, "c": []},
    [1, 2],
    "text",
]


def make_rows(profile: str, seed: int, owner: Callable[[int], str]) -> Rows:
    """Return the rows of a data set; *owner* tells the shard of a slot."""
    return _Maker(profile, seed, owner).rows()


class _Maker:
    def __init__(self, profile: str, seed: int, owner: Callable[[int], str]) -> None:
        self.rng = random.Random(f"{profile} {seed}")
        self.profile = profile
        self.owner = owner

    def v(self) -> int | None:
        if self.profile == "ties":
            return self.rng.choice([None, 1, 1, 2])
        return self.rng.choice([None, -3, 0, 1, 2, 3, 4, 5, 6])

    def maybe(self, *values: Any) -> Any:
        """Return one of the values, or None; one of a few where rows are to tie."""
        if self.profile == "ties":
            values = values[:2]
        return self.rng.choice([None, *values])

    def word(self) -> str:
        return self.rng.choice(WORDS[:4] if self.profile == "ties" else WORDS)

    def keys(self, table: Table, candidates: list[Any], at_least: int = 0) -> list[Any]:
        """Return those of the candidates that the profile lets be rows."""
        if self.profile == "empty":
            return []
        candidates = list(dict.fromkeys(candidates))
        if self.profile == "lonely":
            pin = placement_of(table).pin
            assert pin is not None
            shard = "s3"
            found = [c for c in candidates if self.owner(pin.slot(c) or 0) == shard]
            return found or candidates[:at_least]
        if self.profile == "sparse":
            return self.rng.sample(candidates, min(len(candidates), 3))
        return candidates

    def locator(self, slot: int) -> uuid.UUID:
        bits = self.rng.getrandbits
        return uuid.UUID(int=bits(48) << 80 | 7 << 76 | slot << 64 | 2 << 62 | bits(62))

    def rows(self) -> Rows:
        rng = self.rng
        regions = [
            {"code": code, "name": name, "v": self.v(), "parent_code": parent}
            for code, name, parent in [
                ("de", "D", None),
                ("fr", "F", None),
                ("by", "B", "de"),
                ("muc", "M", "by"),
                ("xx", "D", None),
            ]
        ]
        ids = self.keys(m.Account.__table__, [*range(1, 14), -3, 2**40, *range(50, 60)])
        if self.profile == "mixed":
            ids = ids[:15]
        accounts = [self.account(i) for i in ids]
        specimens = [self.specimen(i) for i in ids if rng.random() < 0.8]
        pin = placement_of(m.Account.__table__).pin
        assert pin is not None
        purchases: list[dict[str, Any]] = []
        for i in ids:
            mine: list[dict[str, Any]] = []
            slot = pin.slot(i)
            assert slot is not None
            for _ in range(rng.choice([0, 1, 2, 3, 5])):
                mine.append(self.purchase(i, slot, [p["id"] for p in mine]))
            purchases += mine
        items = [
            {
                "purchase_id": p["id"],
                "no": no,
                "account_id": p["account_id"],
                "v": self.v(),
                "sku": rng.choice(["s1", "s2", "S1", "é"]),
                "price": self.maybe(Decimal("1.25"), Decimal("0.10"), Decimal(-3)),
            }
            for p in purchases
            for no in range(rng.randrange(4))
        ]
        named = [None, *ids[:6], 99]
        event_ids = self.keys(
            m.Event.__table__, [uuid.UUID(int=rng.getrandbits(128)) for _ in range(20)]
        )
        events = [
            {
                "id": i,
                "account_id": rng.choice(named),
                "v": self.v(),
                "kind": rng.choice(["view", "buy", "View"]),
                "at": rng.choice(STAMPS),
            }
            for i in event_ids
        ]
        labels = [
            {"label": w, "account_id": rng.choice(named), "v": self.v()}
            for w in self.keys(m.Label.__table__, LABELS)
        ]
        devices = [
            {"code": i, "account_id": rng.choice(named), "v": self.v()}
            for i in self.keys(m.Device.__table__, list(range(1, 9)))
        ]
        parties, firms = self.parties()
        memos = [
            {
                "id": i,
                "account_id": rng.choice(named),
                "v": self.v(),
                "body": self.word(),
            }
            for i in range(1, 9)
        ]
        return {
            m.Region.__table__: regions,
            m.Account.__table__: accounts,
            m.Specimen.__table__: specimens,
            m.Purchase.__table__: purchases,
            m.Item.__table__: items,
            m.Event.__table__: events,
            m.Label.__table__: labels,
            m.Device.__table__: devices,
            m.Party.__table__: parties,
            m.Firm.__table__: firms,
            m.Memo.__table__: memos,
        }

    def account(self, i: int) -> dict[str, Any]:
        rng = self.rng
        return {
            "id": i,
            "name": self.word(),
            "email": self.maybe("a@x", "A@x", f"m{i}@y"),
            "v": self.v(),
            "active": rng.choice([None, True, False]),
            "balance": self.maybe(
                Decimal("0.00"), Decimal("-10.50"), Decimal("9999999999.99"), Decimal(3)
            ),
            "score": self.maybe(0.25, -1.5, 3.0, 1024.125),
            "status": self.maybe(*m.Status),
            "joined": self.maybe(*STAMPS),
            "region_code": self.maybe("de", "fr", "by"),
        }

    def purchase(self, account: int, slot: int, earlier: list[Any]) -> dict[str, Any]:
        rng = self.rng
        return {
            "id": self.locator(slot),
            "account_id": account,
            "parent_id": rng.choice([None, *earlier]),
            "v": self.v(),
            "status": rng.choice(["new", "paid", "Paid"]),
            "placed": datetime.date(2024, rng.randrange(1, 4), rng.randrange(1, 5)),
            "total": Decimal(rng.choice(["0.00", "1.50", "20.25", "-4.75", "20.25"])),
            "tags": self.maybe(["a"], ["b", "a"], [], ["ä", "x y"], ["a", None]),
            "doc": rng.choice(DOCS),
        }

    def specimen(self, i: int) -> dict[str, Any]:
        maybe = self.maybe
        return {
            "id": i,
            "v": self.v(),
            "i_small": maybe(0, 1, -(2**15), 2**15 - 1),
            "i_int": maybe(0, 1, -(2**31), 2**31 - 1),
            "i_big": maybe(0, 1, -(2**63), 2**63 - 1, 2**53 + 1),
            "n_fixed": maybe(
                Decimal("1.000000"), Decimal("-0.000001"), Decimal("99999999999.999999")
            ),
            "n_free": maybe(
                *map(Decimal, ["1.0", "1.00", "1", "-0.5", "1e30", "1e-20", "NaN"])
            ),
            "f_real": maybe(0.5, -0.25, 2.0),
            "f_double": maybe(0.5, -0.25, 1e300, float("inf"), float("nan")),
            "flag": maybe(True, False),
            "t_text": maybe(*WORDS),
            "t_varchar": maybe(*WORDS),
            "t_char": maybe("a", "A", "ab", "b"),
            "t_c": maybe(*WORDS),
            "d_date": maybe(
                datetime.date(2024, 2, 29),
                datetime.date(2024, 1, 1),
                datetime.date(1, 1, 1),
                datetime.date(9999, 12, 31),
            ),
            "d_time": maybe(datetime.time(0), datetime.time(23, 59, 59, 999999)),
            "d_timetz": maybe(
                datetime.time(12, tzinfo=UTC),
                datetime.time(
                    12, tzinfo=datetime.timezone(datetime.timedelta(hours=2))
                ),
            ),
            "d_stamp": maybe(
                datetime.datetime(2024, 1, 1), datetime.datetime(1900, 1, 1, 0, 0, 1)
            ),
            "d_stamptz": maybe(*STAMPS),
            "d_span": maybe(
                datetime.timedelta(days=1),
                datetime.timedelta(hours=24),
                datetime.timedelta(seconds=-1),
            ),
            "u": maybe(uuid.UUID(int=1), uuid.UUID(int=2**127)),
            "raw": maybe(b"", b"\x00", b"\xff\x00", b"a"),
            "doc": self.rng.choice(DOCS),
            "numbers": maybe([1, 2, 2], [3], [], [1, None]),
            "span": maybe(Range(1, 5), Range(3, None), Range(empty=True)),
            "address": maybe(
                ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("192.168.1.9")
            ),
            "body": maybe("the quick fox", "quick brown", "Fox fox", ""),
            "code": maybe(1, 2, 3),
            "x": maybe(0, 1),
            "y": maybe(0, 1),
        }

    def parties(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        parties, firms = [], []
        for i in self.keys(m.Party.__table__, list(range(1, 16))):
            kind = ("party", "person", "firm")[i % 3]
            nick = self.word() if kind == "person" else None
            parties.append({"id": i, "type": kind, "v": self.v(), "nick": nick})
            if kind == "firm":
                firms.append({"id": i, "vat": f"V{i % 2}"})
        return parties, firms
