"""Types of shard keys: what a value must be, its slot, and the same slot in SQL.

Only values that PostgreSQL would compare in the key's own type have a slot here. A
float against a bigint key, for example, is compared after a conversion that Python
does not repeat, so it pins nothing: `KeyType.slot` returns None and the statement goes
where it would go without that comparison.
"""

from __future__ import annotations

import datetime
import uuid
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING

from shardalchemy.ring.hashing import slot_bytes, slot_int8

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KEY_TYPES", "KeyType"]

_EPOCH = datetime.date(2000, 1, 1).toordinal()


@dataclass(frozen=True, slots=True)
class KeyType:
    """One type of shard key.

    ``slot`` maps a Python value to its slot, 0 to 4095, or to None where the value is
    not exactly of this type. ``hash_sql`` is the SQL expression of the same hash, with
    ``{}`` for the column. ``accepts`` says in words what ``slot`` takes.
    """

    name: str
    slot: Callable[[object], int | None]
    hash_sql: str
    accepts: str


def _int8_slot(value: object) -> int | None:
    if type(value) is not int:
        # A bool is refused: PostgreSQL has no comparison of boolean with bigint.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            return None
        value = index(value)  # numpy's integers, for example
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return slot_int8(value)
    return None


def _text_slot(value: object) -> int | None:
    if type(value) is not str:
        return None
    try:
        return slot_bytes(value.encode())
    except UnicodeEncodeError:  # a lone surrogate, which PostgreSQL refuses as well
        return None


def _uuid_slot(value: object) -> int | None:
    if isinstance(value, uuid.UUID):
        return slot_bytes(value.bytes)
    if type(value) is str:
        try:
            return slot_bytes(uuid.UUID(value).bytes)
        except ValueError:
            return None
    return None


def _bytea_slot(value: object) -> int | None:
    if isinstance(value, bytes | bytearray | memoryview):
        return slot_bytes(bytes(value).hex().encode())
    return None


def _date_slot(value: object) -> int | None:
    # A datetime is a date to Python, but not to PostgreSQL.
    if type(value) is datetime.date:
        return slot_int8(value.toordinal() - _EPOCH)
    return None


KEY_TYPES = {
    key_type.name: key_type
    for key_type in (
        KeyType(
            "int8",
            _int8_slot,
            "pg_catalog.hashint8extended({}::bigint, 0)",
            "an int within 64 bits",
        ),
        KeyType(
            "text", _text_slot, "pg_catalog.hashtextextended({}::text, 0)", "a str"
        ),
        KeyType(
            "uuid",
            _uuid_slot,
            "pg_catalog.uuid_hash_extended({}, 0)",
            "a uuid.UUID or its text",
        ),
        # PostgreSQL 15 to 17 have no hash of bytea that SQL may call.
        KeyType(
            "bytea",
            _bytea_slot,
            "pg_catalog.hashtextextended(pg_catalog.encode({}, 'hex'), 0)",
            "bytes",
        ),
        KeyType(
            "date",
            _date_slot,
            "pg_catalog.hashint8extended(({} - '2000-01-01'::date)::bigint, 0)",
            "a datetime.date",
        ),
    )
}
"""All types of shard keys by name: int8, text, uuid, bytea, date."""
