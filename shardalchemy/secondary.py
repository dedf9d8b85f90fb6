"""Rows of many-to-many tables, which the unit of work writes without an object.

It asks for one connection by the related class and sends all rows of the secondary
table over it. `SecondaryRows` stands in for that connection and sends each row to the
shard that its own table says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from shardalchemy.flush import RowConnections

__all__ = ["SecondaryRows"]


class SecondaryRows:
    """Stands where the unit of work expects a ``Connection``."""

    def __init__(self, rows: RowConnections) -> None:
        self._rows = rows

    def execute(self, statement: Any, parameters: Any, **options: Any) -> _Counted:
        """Execute an INSERT, UPDATE or DELETE of a secondary table, row by shard."""
        placement = placement_of(statement.table)
        if placement.kind is Kind.REFERENCE:
            copies = self._rows.for_copies()
            return _Counted([copies.execute(statement, parameters, **options)])
        if placement.kind is Kind.HOME:
            raise UnsupportedQueryError(
                f"{statement.table} connects rows of sharded tables and lives on the"
                " home shard. Declare it with sharded_by(…) the key of one side."
            )
        sets = parameters if isinstance(parameters, list) else [parameters]
        by_connection: dict[Any, list[Any]] = {}
        for values in sets:
            slot = next(
                (
                    slot
                    for key, pin in placement.pins.items()
                    for name in (f"old_{key}", key)
                    if name in values and (slot := pin.slot(values[name])) is not None
                ),
                None,
            )
            if slot is None:
                raise UnsupportedQueryError(
                    f"a row of {statement.table} is written without its shard key"
                    f" {placement.column_name}. Make the key part of the relationship's"
                    " foreign keys, or map the table as a class of its own."
                )
            connection = self._rows.for_slot(slot)
            by_connection.setdefault(connection, []).append(values)
        return _Counted(
            [
                connection.execute(statement, rows, **options)
                for connection, rows in by_connection.items()
            ]
        )


class _Counted:
    """The row count of several results, which is all that is asked of them."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    @property
    def rowcount(self) -> int:
        return sum(result.rowcount for result in self._results)

    def supports_sane_multi_rowcount(self) -> bool:
        return all(result.supports_sane_multi_rowcount() for result in self._results)
