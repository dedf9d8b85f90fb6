"""Runs one statement of a session where it belongs.

`run_statement` is where every statement of a session comes: from `_execute_internal`,
or, where the application listens for ``do_orm_execute``, from `RouteLast`, which comes
after its listeners. *run* is what executes a part of it on one shard as SQLAlchemy
always does; which parts there are, and what their results are together, is said here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import IteratorResult
from sqlalchemy.util import EMPTY_DICT

from shardalchemy.assembly import assemble
from shardalchemy.engine import fanout
from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.guards import bounded
from shardalchemy.routing import autoflush, destination
from shardalchemy.writes import Part, run_write, write_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.orm import ORMExecuteState

    from shardalchemy.routing import Destination
    from shardalchemy.session import ShardedSession

    Run = Callable[[str | None, Part], Any]

__all__ = ["RouteLast", "run_statement"]


def run_statement(
    session: ShardedSession,
    statement: Any,
    params: Any,
    options: Mapping[str, Any],
    run: Run,
    *,
    may_go_on: bool = False,
) -> Any:
    """Run *statement* where it belongs and return its result.

    *run* gets a shard, None for the home shard by SQLAlchemy's own rules, and what to
    run there. *may_go_on* has None returned for such a one, unrun: whoever called does
    it. Raises UnsupportedQueryError for what would have to run on several shards and
    could not be exact.
    """
    write = write_of(statement)
    if write is not None:
        return run_write(session, write, params, options, run)
    where = destination(session, statement, params, options)
    shards, analysis, params = where[:3]
    if len(shards) > 1 or where.split is not None:
        session._cluster._scatter_guard.check(session, statement, options, where)
        own = getattr(statement, "_execution_options", EMPTY_DICT)
        together = _run_split if where.split is not None else _run_on_all
        return together(session, statement, where, {**own, **options}, run)
    session._note_obstacle(statement, shards[0], analysis)
    whole = Part(statement, params, is_whole=True)
    if analysis is not None and analysis.sets:
        return session._run_setting(lambda shard: run(shard, whole), statement, params)
    if may_go_on and shards[0] is None and session._deadline is None:
        return None
    return session._run_routed(lambda shard: run(shard, whole), shards[0], analysis)


def _run_on_all(
    session: ShardedSession,
    statement: Any,
    where: Destination,
    options: Mapping[str, Any],
    run: Run,
) -> Any:
    """Run a statement on several shards at once; its rows are those of all."""
    autoflush(session, options)
    connections = {
        shard: session._connection_for_bind(session._engines.of(shard))
        for shard in where.shards
        if shard is not None
    }
    with session.no_autoflush:
        results = fanout(
            lambda shard, _: run(shard, Part(statement, where.params_for(shard))),
            connections,
        )
    load = options.get("_sa_orm_load_options")
    first, *others = results.values()
    if (
        options.get("yield_per")
        or options.get("stream_results")
        or (load is not None and load._yield_per)
    ):
        return first.merge(*others)
    return _concatenated([first, *others])


def _run_split(
    session: ShardedSession,
    statement: Any,
    where: Destination,
    options: Mapping[str, Any],
    run: Run,
) -> Any:
    """Run the pieces of a statement on their shards, and the final one over them."""
    assert where.split is not None
    own_keys = where.own
    if getattr(statement, "_is_lambda_element", False):
        # Its parameters are counted otherwise than those of what it stands for.
        statement, own_keys = statement._resolved, {}
    if options.get("schema_translate_map"):
        raise UnsupportedQueryError(
            "a schema_translate_map is not applied to a statement that several shards"
            " answer together. Use tables with the schema that is meant."
        )
    autoflush(session, options)
    with session.no_autoflush:
        return assemble(
            session,
            where.split,
            where.pieces,
            str(where.shards[0]),
            statement,
            where.params,
            options.get("gather_max_rows", session._cluster.gather_max_rows),
            own_keys,
            lambda shard, made, given, more: run(shard, Part(made, given, (), more)),
        )


def _concatenated(results: Sequence[Any]) -> IteratorResult[Any]:
    """Return the rows of all results as one.

    All are fetched first, and stay alive until the last is read: ``unique()`` knows
    objects by their ``id()``, which one that is gone gives on to another.
    """
    first = results[0]
    rows = [row for result in results for row in result._raw_row_iterator()]
    whole: IteratorResult[Any] = IteratorResult(
        first._metadata,
        iter(rows),
        _source_supports_scalars=first._source_supports_scalars,
    )
    # Loaders ask it whether rows repeat.
    whole.context = getattr(first, "context", None)
    whole._attributes = first._attributes
    whole._unique_filter_state = first._unique_filter_state
    return whole


class RouteLast:
    """A ``do_orm_execute`` listener that comes after the application's own."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, state: ORMExecuteState) -> Any:
        """Return the result of *state*'s statement, None to let SQLAlchemy go on."""
        if self._before is not None:
            result = self._before(state)
            if result:
                return result
        session: Any = state.session
        options = state.local_execution_options
        with bounded(session, state.statement, options):
            return run_statement(
                session,
                state.statement,
                state.parameters,
                options,
                _invoking(state),
                may_go_on=True,
            )


def _invoking(state: ORMExecuteState) -> Run:
    """Return what runs a part on one shard as *state*'s own statement."""
    given = state.parameters

    def run(shard: str | None, part: Part) -> Any:
        # invoke_statement() would add parameters to those there are. It reads them
        # before anything is sent, and so before another shard's turn.
        state.parameters = part.params
        try:
            return state.invoke_statement(
                statement=part.statement,
                execution_options=part.options or None,
                bind_arguments=None if shard is None else {"shard": shard},
            )
        finally:
            state.parameters = given

    return run
