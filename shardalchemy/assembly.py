"""Runs a split statement: the pieces on their shards, the final one over their rows.

The rows stay as PostgreSQL wrote them: each shard answers with one array literal for
each column, the literals of all shards are joined to one, and the final statement has
PostgreSQL read it. Python looks at no value. Everything runs on the session's own
connections, so it sees what the transaction itself has written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import EMPTY_DICT

from shardalchemy.engine import fanout
from shardalchemy.errors import UnsupportedQueryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect

    from shardalchemy.planner import OwnKeys
    from shardalchemy.planner.split import ColumnType, Piece, Split
    from shardalchemy.session import ShardedSession

__all__ = ["COMPILED", "OneCompiled", "assemble"]

COMPILED = "compiled_cache"
"""The execution option by which SQLAlchemy is given what was compiled here."""


@dataclass(slots=True)
class _Gathered:
    """The rows of one piece: how many, and an array literal for each column."""

    rows: int = 0
    arrays: list[list[str]] = field(default_factory=list)

    def add(self, rows: int, arrays: Sequence[str | None]) -> None:
        """Add what one shard has answered."""
        self.rows += rows
        if rows:
            self.arrays.append([(array or "{}")[1:-1] for array in arrays])

    def column(self, index: int) -> str:
        """Return the literal of all values of a column."""
        return "{" + ",".join(arrays[index] for arrays in self.arrays) + "}"


def assemble(
    session: ShardedSession,
    split: Split,
    shards: Mapping[str, Sequence[str]],
    final_shard: str,
    statement: Any,
    params: Any,
    most_rows: int,
    own: OwnKeys,
    run: Callable[[str, Any, Any, Mapping[str, Any]], Any],
) -> Any:
    """Return the result of *statement*, which *split* has in pieces.

    *shards* are those of each piece, by its name. ``run(shard, statement, params,
    options)`` executes on one shard as the session always does; with what it is given
    here, that is the final statement. *own* has the keys of lists by shard. Raises
    UnsupportedQueryError where the pieces have over *most_rows* rows.
    """
    from shardalchemy.planner import final as sql

    split = split.for_one_execution()
    names = dict.fromkeys([final_shard, *(s for some in shards.values() for s in some)])
    connections = {
        shard: session._connection_for_bind(session._engines.of(shard))
        for shard in names
    }
    given = dict(params or EMPTY_DICT)
    if split.tells_time:
        given[sql.TRANSACTION_TIME] = session._transaction_time(
            connections[final_shard]
        )
    bounded = {**given, sql.MOST_ROWS: most_rows + 1}
    types = _types(split, connections[final_shard], statement, bounded)
    gathered = {piece.name: _Gathered() for piece in split.pieces}

    def compile_fetch(piece: Piece, dialect: Dialect) -> Any:
        return sql.fetch(piece, types, split, dialect)

    def fetch(shard: str, connection: Connection) -> list[tuple[str, Any]]:
        answers = []
        for piece in now:
            if shard in shards[piece.name]:
                compiled, lists = split.compiled(
                    connection.dialect, piece.name, partial(compile_fetch, piece)
                )
                # Of a long list of keys a shard needs those that it owns.
                keys = {
                    name: own[place][1].get(shard, [])
                    for place, name in lists.items()
                    if place in own
                }
                values = {**bounded, **keys}
                row = _execute(connection, statement, compiled, values).one()
                answers.append((piece.name, row))
        return answers

    for level in sorted({piece.level for piece in split.pieces}):
        now = [piece for piece in split.pieces if piece.level == level]
        working = {
            shard: connection
            for shard, connection in connections.items()
            if any(shard in shards[piece.name] for piece in now)
        }
        for answers in fanout(fetch, working).values() if working else ():
            for name, (settings, rows, *arrays) in answers:
                sql.check_settings(settings)
                gathered[name].add(rows, arrays)
        for piece in now:
            for index in range(len(piece.columns)):
                given[sql.array_name(piece, index)] = gathered[piece.name].column(index)
        if any(piece.level > level for piece in split.pieces):
            bounded.update(given)
    if sum(piece.rows for piece in gathered.values()) > most_rows:
        raise UnsupportedQueryError(
            f"the statement needs more than {most_rows} rows on one shard"
            f" ({', '.join(piece.title for piece in split.pieces)}). Narrow it down,"
            " aggregate, or allow more with execution_options(gather_max_rows=…) or"
            " Cluster(gather_max_rows=…)."
        )
    final = split.compiled(
        connections[final_shard].dialect,
        "final",
        lambda dialect: sql.final(types, split, dialect),
    )
    statement, options = _with_compiled(statement, final, connections[final_shard])
    return run(final_shard, statement, given, options)


def _types(
    split: Split,
    connection: Connection,
    statement: Any,
    params: Mapping[str, Any],
) -> Mapping[str, Sequence[ColumnType]]:
    """Return the types of the pieces' columns; ask a shard the first time."""
    from shardalchemy.planner import final as sql

    if split.types is None:
        found = {}
        for piece in split.pieces:
            compiled = sql.probe(piece, split, connection.dialect)
            row = _execute(connection, statement, compiled, params).one()
            found[piece.name] = sql.told_types(piece, row)
        split.types = found
    return split.types


def _execute(
    connection: Connection, statement: Any, compiled: Any, params: Mapping[str, Any]
) -> Any:
    """Execute what was compiled for *statement*, with its parameters' values."""
    statement, options = _with_compiled(statement, compiled, connection)
    return connection.execute(statement, params, execution_options=options)


def _with_compiled(
    statement: Any, compiled: Any, connection: Connection
) -> tuple[Any, dict[str, Any]]:
    """Return a statement and execution options that run *compiled* in its place."""
    if compiled.cache_key is not None:
        others = connection.engine._compiled_cache
        return statement, {COMPILED: OneCompiled(compiled, others)}
    alone = statement._clone()
    alone._compiler = lambda *_, **__: compiled
    return alone, {}


class OneCompiled:
    """A cache of compiled statements from which the first to be had is *compiled*.

    The statements of loaders, which may inherit the option, are then found in *others*.
    """

    __slots__ = ("_compiled", "_others")

    def __init__(self, compiled: Any, others: Any) -> None:
        self._compiled = compiled
        self._others = {} if others is None else others

    def get(self, key: Any) -> Any:
        """Return what is compiled; *key* is SQLAlchemy's, with the statement's second.

        The plan was made for one statement: that it is this one is made sure of.
        """
        compiled, self._compiled = self._compiled, None
        if compiled is None:
            return self._others.get(key)
        if key[1] != compiled.cache_key.key:
            raise AssertionError("another statement was executed than was split")
        return compiled

    def __setitem__(self, key: Any, compiled: Any) -> None:
        self._others[key] = compiled
