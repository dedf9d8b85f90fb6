"""Whether a statement may run on every shard, and for how long any may run.

A statement that pins its shard keys costs what its rows cost. One that does not costs
work on every shard, which a new `Cluster` does not show and a large one does. So it can
be warned of or refused, and one that comes again and again in one transaction is warned
of once. What is pinned is never looked at: an ``IN`` of many keys, each sent to its
owner, may run on every shard as well.

A timeout bounds all that a statement waits for: its own answer from one shard, or those
of every shard and of the one that puts them together.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

from greenlet import getcurrent
from sqlalchemy import exc as sa_exc
from sqlalchemy.util import EMPTY_DICT

from shardalchemy.engine import Deadline
from shardalchemy.errors import (
    ConfigurationError,
    DeadlockDetected,
    ScatterWarning,
    StatementTimeout,
    UnsupportedQueryError,
)
from shardalchemy.explain import explained
from shardalchemy.routing import autoflush

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import FrameType

    from shardalchemy.planner import Analysis
    from shardalchemy.routing import Destination
    from shardalchemy.session import ShardedSession

__all__ = ["Scatter", "ScatterCount", "ScatterGuard", "bounded", "checked_timeout"]

Scatter = Literal["allow", "warn", "forbid"]

ScatterCount = dict[int, tuple["Analysis", int]]
"""How often a transaction has run a statement unpinned, by its analysis's identity."""

_WAY_OUT = (
    "Pin its shard keys (== or IN, on them or on a locator), or say"
    " execution_options(scatter='allow') where it is meant."
)
_MOST_SQL = 500  # characters


def _option(
    session: ShardedSession,
    statement: Any,
    options: Mapping[str, Any],
    name: str,
    default: Any,
) -> Any:
    """Return an execution option: of the call, of the statement, of the session.

    The statements of loaders have those of the statement that they load for.
    """
    if name in options:
        return options[name]
    own = getattr(statement, "_execution_options", EMPTY_DICT)
    if name in own:
        return own[name]
    context = options.get("sa_top_level_orm_context")
    if context is not None:
        return _option(session, context.query, context.execution_options, name, default)
    # SQLAlchemy 2.1 sessions have options of their own.
    whole = getattr(session, "execution_options", EMPTY_DICT)
    return whole.get(name, default)


def checked_timeout(seconds: Any, name: str) -> float | None:
    """Return a timeout in seconds, or None for none; raise ConfigurationError."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigurationError(f"{name} is {seconds!r}; it is a number of seconds.")
    if not seconds > 0:
        raise ConfigurationError(
            f"{name} is {seconds!r}; it is more than 0 seconds, or None for no timeout."
        )
    return seconds


def bounded(
    session: ShardedSession, statement: Any, options: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Return a context in which *statement* runs within its timeout, if it has one.

    What has to be flushed before is flushed here, and does not count. Leaving the
    context raises StatementTimeout where time ran out.
    """
    default = session._cluster.statement_timeout
    seconds = _option(session, statement, options, "timeout", default)
    if seconds is None:
        return _UNBOUNDED
    if seconds is not default:
        checked_timeout(seconds, "execution_options(timeout=…)")
    own = getattr(statement, "_execution_options", EMPTY_DICT)
    autoflush(session, {**own, **options})
    return _Bounded(session, seconds)


_UNBOUNDED = nullcontext()


class _Bounded:
    """The time of one statement; the session covers each connection that it takes."""

    def __init__(self, session: ShardedSession, seconds: float) -> None:
        self._session = session
        self._before = session._deadline
        self._deadline = Deadline(seconds, within=self._before)

    def __enter__(self) -> None:
        self._session._deadline = self._deadline

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._session._deadline = self._before
        self._deadline.end()
        if (
            self._deadline.late
            and isinstance(error, sa_exc.OperationalError)
            and not isinstance(error, StatementTimeout | DeadlockDetected)
        ):
            in_doubt = self._session._in_doubt
            raise _timed_out(error, self._deadline, in_doubt) from error


def _timed_out(
    error: sa_exc.OperationalError, deadline: Deadline, in_doubt: str | None
) -> StatementTimeout:
    assert error.orig is not None
    found = StatementTimeout(
        error.statement,
        error.params,
        error.orig,
        hide_parameters=error.hide_parameters,
        connection_invalidated=error.connection_invalidated,
        ismulti=error.ismulti,
    )
    late = dict.fromkeys(deadline.late)
    found.add_detail(
        f"the statement was not done within its timeout of {deadline.seconds:g} s, on"
        f" shard {', '.join(late)}; it was cancelled. Roll back, then narrow it down,"
        " pin its shard keys, or give it more time with execution_options(timeout=…)"
    )
    if in_doubt is not None:
        found.add_detail(
            f"it waited for a row locked by the in-doubt transaction {in_doubt}"
        )
    return found


class ScatterGuard:
    """Looks at the statements of a cluster that run on shards which nothing pins.

    *scatter* is what becomes of them where no execution option says it; after *loop* of
    one statement in one transaction there is a warning, once in the guard's life.
    """

    def __init__(self, scatter: Scatter, loop: int) -> None:
        self._scatter = _checked(scatter, "Cluster(scatter=…)")
        if not isinstance(loop, int) or loop < 0:
            raise ConfigurationError(
                f"scatter_loop is {loop!r}; it is a number of executions, or 0 for no"
                " warning."
            )
        self._loop = loop
        self._warned: set[Any] = set()

    def check(
        self,
        session: ShardedSession,
        statement: Any,
        options: Mapping[str, Any],
        where: Destination,
    ) -> None:
        """Let a statement pass, warn of it, or raise UnsupportedQueryError."""
        said = _option(session, statement, options, "scatter", None)
        if said is not None:
            _checked(said, "execution_options(scatter=…)")
        if where.pinned:
            return
        scatter = said or self._scatter
        if scatter == "forbid":
            raise UnsupportedQueryError(
                "the statement would run on every shard, which scatter='forbid' does"
                f" not allow.\n{_shown(session, statement, where)}\n{_WAY_OUT}"
            )
        if scatter == "warn":
            _warn(
                "a statement runs on every shard."
                f"\n{_shown(session, statement, where)}\n{_WAY_OUT}"
            )
        elif said is None and self._loop and where.analysis is not None:
            self._count(session, statement, where, where.analysis)

    def _count(
        self,
        session: ShardedSession,
        statement: Any,
        where: Destination,
        analysis: Analysis,
    ) -> None:
        # One cache key has one analysis. It is kept, so that its id() stays its own.
        counts = session._scattered
        _, before = counts.get(id(analysis), (analysis, 0))
        counts[id(analysis)] = (analysis, before + 1)
        if before + 1 != self._loop:
            return
        key = statement._generate_cache_key()
        if key is None or key.key in self._warned:
            return
        self._warned.add(key.key)
        _warn(
            f"one transaction has run a statement on every shard {self._loop} times;"
            " if each is for one key of many, take them together."
            f"\n{_shown(session, statement, where)}\n{_WAY_OUT}"
        )


def _checked(scatter: Any, name: str) -> Scatter:
    if scatter not in get_args(Scatter):
        raise ConfigurationError(
            f"{name} is {scatter!r}; it is 'allow', 'warn' or 'forbid'."
        )
    checked: Scatter = scatter
    return checked


def _shown(session: ShardedSession, statement: Any, where: Destination) -> str:
    """Return the plan, with the statement where its pieces do not show it."""
    plan = explained(session, where)
    if plan.pieces:
        return str(plan)
    from sqlalchemy.dialects import postgresql

    sql = str(statement.compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    sql = textwrap.indent(textwrap.shorten(sql, _MOST_SQL, placeholder=" …"), " " * 7)
    return f"{plan}\n{sql}"


def _warn(message: str) -> None:
    """Warn in the name of the application's line that has run the statement."""
    frame = _calling_frame()
    if frame is None:
        warnings.warn(ScatterWarning(message), stacklevel=2)
        return
    warnings.warn_explicit(
        ScatterWarning(message),
        ScatterWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", "__main__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _calling_frame() -> FrameType | None:
    """Return the innermost frame that is neither SQLAlchemy's nor this package's.

    An async session's statement runs in a greenlet, whose parent is in the event loop.
    """
    frame: FrameType | None = sys._getframe(1)
    running = getcurrent()
    while True:
        while frame is not None:
            package = frame.f_globals.get("__name__", "").partition(".")[0]
            if package not in ("shardalchemy", "sqlalchemy"):
                return frame
            frame = frame.f_back
        running = running.parent
        if running is None:
            return None
        frame = running.gr_frame
