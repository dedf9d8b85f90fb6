"""Locator ids: primary keys that say where their row lives.

A locator is a UUIDv7 (RFC 9562) whose 12 bits of ``rand_a`` are the slot of its row's
shard key. So ``session.get(Order, id)`` and ``WHERE id = …`` go to one shard although
the table is sharded by another column, and ids still sort by time. A CHECK on the
table holds each row's id to its key's slot, whoever writes it.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid
from sqlalchemy.orm import mapped_column

from shardalchemy.errors import ShardKeyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine.default import DefaultExecutionContext
    from sqlalchemy.orm import MappedColumn

__all__ = ["LOCATOR_SLOT_SQL", "Locator", "locator_id", "locator_slot", "new_locator"]

LOCATOR_SLOT_SQL = (
    "((pg_catalog.get_byte(pg_catalog.uuid_send({0}), 6) & 15) << 8"
    " | pg_catalog.get_byte(pg_catalog.uuid_send({0}), 7))"
)
"""The SQL expression of a locator's slot, with ``{0}`` for the column."""


@dataclass(frozen=True, slots=True)
class Locator:
    """The mark in ``Column.info`` of a column that holds locators."""


def new_locator(slot: int) -> uuid.UUID:
    """Return a new locator for a row in *slot*, 0 to 4095.

    >>> locator_slot(new_locator(4095))
    4095
    """
    milliseconds = time.time_ns() // 1_000_000 & 0xFFFFFFFFFFFF
    random = int.from_bytes(os.urandom(8), "big") & 0x3FFFFFFFFFFFFFFF
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | slot << 64 | 2 << 62 | random)


def locator_slot(value: object) -> int | None:
    """Return the slot that a locator names, or None where *value* is no UUID.

    Any UUID has the bits. One that was not made by `new_locator` names some slot too,
    and no row anywhere can have it in another, so looking there alone is exact.
    """
    if type(value) is str:
        try:
            value = uuid.UUID(value)
        except ValueError:
            return None
    if isinstance(value, uuid.UUID):
        return value.int >> 64 & 0xFFF
    return None


def _default(context: DefaultExecutionContext) -> uuid.UUID:
    """Make the locator of a row that is inserted without one, from its shard key."""
    # Imported here because schema reads the Locator marks of this module.
    from shardalchemy.schema import placement_of

    column = context.current_column
    placement = placement_of(column.table)
    parameters: Mapping[str, Any] = context.get_current_parameters()  # type: ignore[no-untyped-call]
    slot = placement.slot_of_values(parameters)
    if slot is None:
        raise ShardKeyError(
            f"{column.table}.{column.name} cannot be generated: the INSERT gives no"
            f" value for the shard key {placement.column_name}. Give the key in the"
            " same statement."
        )
    return new_locator(slot)


def locator_id(*args: Any, **kwargs: Any) -> MappedColumn[uuid.UUID]:
    """Return a primary key column (a ``mapped_column``) that holds locators.

    Takes what ``sqlalchemy.orm.mapped_column`` takes, but for the type and the default.
    The table must be ``sharded_by`` another column. The value is generated when the row
    is flushed, or by a Core INSERT that gives the shard key.

        class Order(Base):
            __tablename__ = "orders"
            __table_args__ = {"info": sharded_by("customer_id")}
            id: Mapped[UUID] = locator_id()
            customer_id: Mapped[int]
    """
    kwargs.setdefault("primary_key", True)
    info = {**kwargs.pop("info", {}), "shardalchemy": Locator()}
    return mapped_column(*args, type_=Uuid(), default=_default, info=info, **kwargs)
