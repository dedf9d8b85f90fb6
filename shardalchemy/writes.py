"""Writes that are no rows of a flush: which part of one each shard runs.

An INSERT of many rows is cut by where its rows live, an UPDATE or DELETE of many
parameter sets by what each set needs, one by criteria goes whole to every shard that
may hold such rows. The parts run at once, in the session's own transaction, and come
back as one `WriteResult`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Delete, Insert, Update
from sqlalchemy.engine import CursorResult, IteratorResult

from shardalchemy.copies import alike_on_copies
from shardalchemy.engine import fanout
from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.inserts import completed_insert
from shardalchemy.moment import with_one_moment
from shardalchemy.routing import (
    Destination,
    check_not_a_copy,
    home_first,
    named_shard,
    not_on_several,
    owners_of,
    shard_at_hand,
    slots_of,
)
from shardalchemy.rows import row_placement
from shardalchemy.schema import Kind, placement_of
from shardalchemy.selected import (
    inserts_elsewhere,
    selected_rows,
    stays_on_its_shard,
)
from shardalchemy.synchronize import one_synchronizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Connection

    from shardalchemy.planner import Analysis
    from shardalchemy.session import ShardedSession

__all__ = ["Part", "WriteResult", "run_write", "write_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard runs of a write.

    ``places`` are those of its rows among all rows of an INSERT; ``options`` are
    execution options beside the statement's. ``is_whole`` says that it is the statement
    itself, whose result is that of the part.
    """

    statement: Any
    params: Any
    places: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class _Write:
    parts: Mapping[str | None, Part]
    analysis: Analysis | None
    pinned: bool = True


def write_of(statement: Any) -> Any:
    """Return the INSERT, UPDATE or DELETE that *statement* is, or None."""
    if getattr(statement, "_is_lambda_element", False):
        statement = statement._resolved
    return statement if isinstance(statement, Insert | Update | Delete) else None


def run_write(
    session: ShardedSession,
    statement: Any,
    params: Any,
    options: Mapping[str, Any],
    run: Callable[[str | None, Part], Any],
) -> Any:
    """Run a write where its rows live; *run* runs one part on one shard.

    Raises what `destination` raises for any statement, before anything is sent.
    """
    write = _planned(session, statement, params, options)
    parts, analysis = write.parts, write.analysis
    if len(parts) == 1:
        ((shard, part),) = parts.items()
        return session._run_routed(lambda _: run(shard, part), shard, analysis)
    if analysis is not None and analysis.kind is Kind.REFERENCE:
        # Home first, where writers of one row meet.
        results = [
            session._run_routed(lambda s, p=part: run(s, p), shard, analysis)
            for shard, part in parts.items()
        ]
        return results[0]
    where = Destination(tuple(parts), analysis, params, pinned=write.pinned)
    session._cluster._scatter_guard.check(session, statement, options, where)
    if options.get("autoflush", statement._execution_options.get("autoflush", True)):
        session._autoflush()
    shards = [shard for shard in parts if shard is not None]
    connections = {
        s: session._connection_for_bind(session._engines.of(s)) for s in shards
    }
    parts = _at_one_moment(parts, connections[shards[0]])
    session._written_shards.update(shards)
    before = session._routed

    def step(shard: str, _: object) -> Any:
        # The ORM asks for a bulk statement's connection by its mapper alone, before
        # anything is sent and so before another shard's turn.
        session._routed = shard
        return run(shard, parts[shard])

    try:
        with session.no_autoflush:
            outcomes = fanout(step, connections)
    finally:
        session._routed = before
    return _merged([outcomes[s] for s in shards], [parts[s] for s in shards])


def _at_one_moment(
    parts: Mapping[str | None, Part], connection: Connection
) -> Mapping[str | None, Part]:
    known: dict[int, Any] = {}
    for part in parts.values():
        key = id(part.statement)
        if key not in known:
            known[key] = with_one_moment(part.statement, lambda: connection)
    return {s: replace(p, statement=known[id(p.statement)]) for s, p in parts.items()}


def _planned(
    session: ShardedSession, statement: Any, params: Any, options: Mapping[str, Any]
) -> _Write:
    parts: dict[str | None, Part]
    whole = Part(statement, params)
    named = named_shard(session, statement, options)
    if named is not None:
        check_not_a_copy(statement)
        return _Write({named: whole}, None)
    topology = session._topology()
    if isinstance(statement, Insert) and inserts_elsewhere(statement):
        if stays_on_its_shard(session, statement):
            return _each_its_own(session, statement, params)
        selected = selected_rows(session, statement, params)
        if selected.params is None:
            return _Write({shard_at_hand(session, topology): Part(*selected)}, None)
        return _planned(session, *selected, options)
    analysis, extracted = session._cluster._analyser.analyse(statement)
    if analysis.kind is Kind.HOME:
        return _Write({None: whole}, analysis)
    if analysis.kind is Kind.REFERENCE:
        return _Write(
            _on_copies(session, statement, analysis, params, options), analysis
        )
    own = statement._execution_options
    pinned = True
    if isinstance(statement, Insert):
        rows = completed_insert(session, statement, analysis, params, options)
        by_shard: dict[str, list[int]] = {}
        owners = topology.owners
        for place, slot in enumerate(rows.slots):
            by_shard.setdefault(owners[slot], []).append(place)
        if len(by_shard) == 1:
            (shard,) = by_shard
            parts = {shard: Part(rows.statement, rows.params)}
        else:
            parts = {
                s: Part(*rows.share(by_shard[s]), by_shard[s])
                for s in topology.shards
                if s in by_shard
            }
    elif isinstance(params, list | tuple) and params:
        parts, pinned = _by_parameter_sets(
            session, statement, analysis, extracted or (), params, {**own, **options}
        )
    else:
        # A parameter that stands for a pending object's key needs it flushed.
        if extracted is None or any(p.callable is not None for p in extracted):
            session._autoflush()
        _check_keys_kept(statement, analysis, params)
        slots = slots_of(statement, analysis, extracted or (), params)
        pinned = slots is not None
        shards = owners_of(topology, slots) or (shard_at_hand(session, topology),)
        parts = dict.fromkeys(shards, whole)
        if len(parts) > 1:
            how = one_synchronizes(session, statement, {**own, **options}, len(shards))
            parts = {
                shard: Part(how.statement, params, options=how.options[index])
                for index, shard in enumerate(shards)
            }
    if len(parts) > 1 and analysis.scatter_problem is not None:
        raise not_on_several(analysis.scatter_problem, parts)
    return _Write(parts, analysis, pinned)


def _each_its_own(session: ShardedSession, statement: Any, params: Any) -> _Write:
    """Return an INSERT … SELECT of rows that stay on the shards they are read from."""
    analysis, extracted = session._cluster._analyser.analyse(statement.select)
    if extracted is None or any(p.callable is not None for p in extracted):
        session._autoflush()
    slots = slots_of(statement.select, analysis, extracted or (), params)
    topology = session._topology()
    shards = owners_of(topology, slots) or (shard_at_hand(session, topology),)
    parts: dict[str | None, Part] = dict.fromkeys(shards, Part(statement, params))
    return _Write(parts, replace(analysis, writes=True), slots is not None)


def _on_copies(
    session: ShardedSession,
    statement: Any,
    analysis: Analysis,
    params: Any,
    options: Mapping[str, Any],
) -> dict[str | None, Part]:
    statement, params = alike_on_copies(session, statement, analysis, params, options)
    home, *others = home_first(session._topology())
    parts: dict[str | None, Part] = {home: Part(statement, params)}
    options = {}
    if not isinstance(statement, Insert):
        options = {"synchronize_session": False}  # the home shard's part does it
    return parts | dict.fromkeys(others, Part(statement, params, options=options))


def _check_keys_kept(statement: Any, analysis: Analysis, params: Any) -> None:
    """Refuse parameters that would set a column which says where rows live."""
    if params and isinstance(statement, Update):
        assert analysis.table is not None
        for key in placement_of(analysis.table).pins.keys() & set(params):
            raise UnsupportedQueryError(
                f"UPDATE of {analysis.table}.{key}: it says where the row lives. Load"
                " the rows, delete them, and add copies with the new value."
            )


def _by_parameter_sets(
    session: ShardedSession,
    statement: Any,
    analysis: Analysis,
    extracted: Sequence[Any],
    params: Sequence[Any],
    options: Mapping[str, Any],
) -> tuple[dict[str | None, Part], bool]:
    """Return the part of each shard: the parameter sets whose rows it may have.

    Beside it, whether each set pins them.
    """
    topology = session._topology()
    by_identity = _is_by_identity(statement, params, options)
    by_shard: dict[str, list[Any]] = {}
    pinned = True
    for given in params:
        if by_identity:
            slots = _slots_of_identity(statement, given)
        else:
            _check_keys_kept(statement, analysis, given)
            slots = slots_of(statement, analysis, extracted, given)
        pinned = pinned and slots is not None
        for shard in owners_of(topology, slots):
            by_shard.setdefault(shard, []).append(given)
    if not by_shard:
        return {shard_at_hand(session, topology): Part(statement, params)}, pinned
    parts: dict[str | None, Part] = {
        shard: Part(statement, by_shard[shard])
        for shard in topology.shards
        if shard in by_shard
    }
    return parts, pinned


def _is_by_identity(statement: Any, params: Any, options: Mapping[str, Any]) -> bool:
    """Return whether this is the ORM's UPDATE of many rows by primary key."""
    return (
        isinstance(statement, Update)
        and isinstance(params, list)
        and "parententity" in statement.table._annotations
        and options.get("dml_strategy", "auto") in ("auto", "bulk")
    )


def _slots_of_identity(statement: Any, given: Mapping[str, Any]) -> set[int] | None:
    mapper = statement.table._annotations["parententity"].mapper
    rows = row_placement(mapper)
    slot = rows.slot_of_mapping(given)
    return None if slot is None else {slot}


def _merged(results: Sequence[Any], parts: Sequence[Part]) -> Any:
    """Return the results of all parts as one."""
    first = results[0]
    if isinstance(first, CursorResult) and not first.returns_rows:
        return WriteResult(results, parts, ())
    per_part = [list(result._raw_row_iterator()) for result in results]
    places = [part.places for part in parts]
    if all(len(r) == len(p) for r, p in zip(per_part, places, strict=True)):
        # An INSERT's rows come back in the order in which they were given.
        rows = _in_places(per_part, places)
    else:
        rows = [row for some in per_part for row in some]
    return WriteResult(results, parts, rows)


def _in_places(
    per_part: Sequence[Sequence[Any]], places: Sequence[Sequence[int]]
) -> list[Any]:
    whole: list[Any] = [None] * sum(map(len, places))
    for rows, some in zip(per_part, places, strict=True):
        for row, place in zip(rows, some, strict=True):
            whole[place] = row
    return whole


class WriteResult(IteratorResult[Any]):
    """The results of one write on several shards, as one.

    Beside the rows of RETURNING it answers what a ``CursorResult`` of a write does.
    The shards' results stay alive until the last row is read: ``unique()`` knows
    objects by their ``id()``, which one that is gone gives on to another.
    """

    def __init__(
        self, results: Sequence[Any], parts: Sequence[Part], rows: Sequence[Any]
    ) -> None:
        first = results[0]
        super().__init__(
            first._metadata,
            iter(rows),
            _source_supports_scalars=first._source_supports_scalars,
        )
        self._attributes = first._attributes
        self._unique_filter_state = first._unique_filter_state
        self._results = results
        self._parts = parts
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._results[0], name)

    @property
    def rowcount(self) -> int:
        """The number of rows on all shards, -1 where one could not tell."""
        counts = [result.rowcount for result in self._results]
        return -1 if min(counts) < 0 else sum(counts)

    @property
    def inserted_primary_key_rows(self) -> list[Any]:
        """The primary keys of inserted rows, in the order in which they were given."""
        return _in_places(
            [list(result.inserted_primary_key_rows) for result in self._results],
            [part.places for part in self._parts],
        )
