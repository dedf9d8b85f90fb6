"""What the servers hold, asked in plain SQL beside the library."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self, cast

import psycopg
from psycopg import sql
from sqlalchemy import MetaData, make_url

from shardalchemy import Cluster


class Servers:
    """One connection to each shard, outside of any transaction."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self.urls = urls
        self._connections: dict[str, psycopg.Connection[Any]] = {}

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for name, url in self.urls.items():
            address = make_url(url).set(drivername="postgresql")
            self._connections[name] = self._stack.enter_context(
                psycopg.connect(
                    address.render_as_string(hide_password=False), autocommit=True
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, statement: str) -> None:
        """Send *statement* to every server."""
        for connection in self._connections.values():
            connection.execute(cast("Any", statement))

    def empty(self, metadata: MetaData) -> None:
        """Empty every table of *metadata* wherever it is."""
        tables = [table.name for table in reversed(metadata.sorted_tables)]
        for connection in self._connections.values():
            rows = connection.execute(
                "SELECT tablename FROM pg_tables WHERE tablename = ANY(%s)", [tables]
            )
            present = {name for (name,) in rows}
            deletes = [f"DELETE FROM {table}" for table in tables if table in present]
            connection.execute(cast("Any", ";".join(deletes)))

    def rows(self, query: str, *parameters: object) -> dict[str, list[Any]]:
        """Return the rows of each server that has any; of one column, its values."""
        found = {}
        for name, connection in self._connections.items():
            rows = connection.execute(cast("Any", query), parameters or None).fetchall()
            if rows:
                found[name] = [row[0] if len(row) == 1 else row for row in rows]
        return found

    def rows_on(self, shard: str, query: str) -> list[Any]:
        """Return the rows of one server; of one column, its values."""
        rows = self._connections[shard].execute(cast("Any", query)).fetchall()
        return [row[0] if len(row) == 1 else row for row in rows]

    def shards_of(self, table: str, column: str, value: object) -> list[str]:
        """Return the shards with rows of *table* whose *column* is *value*."""
        query = sql.SQL("SELECT 1 FROM {} WHERE {} = %s").format(
            sql.Identifier(table), sql.Identifier(column)
        )
        return [
            name
            for name, connection in self._connections.items()
            if connection.execute(query, [value]).fetchall()
        ]

    def count(self, table: str) -> int:
        """Return how many rows of *table* all servers have together."""
        query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
        total = 0
        for connection in self._connections.values():
            [(number,)] = connection.execute(query).fetchall()
            total += number
        return total

    def prepared(self) -> int:
        """Return how many transactions are prepared and not yet ended."""
        rows = self.rows(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        )
        return sum(map(len, rows.values()))


def keys_on_each_shard(cluster: Cluster, entity: Any, count: int = 1) -> list[int]:
    """Return integer keys, *count* for each shard, in the order of the shards."""
    wanted: dict[str, list[int]] = {name: [] for name in cluster.topology.shards}
    key = 1
    while any(len(keys) < count for keys in wanted.values()):
        keys = wanted[cluster.shard_for(entity, key)]
        if len(keys) < count:
            keys.append(key)
        key += 1
    return [key for keys in wanted.values() for key in keys]
