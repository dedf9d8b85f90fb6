"""Run one step on many connections at once, in one thread or one event loop.

psycopg describes every exchange with a server as a generator that yields when it would
wait, and leaves the waiting to ``Connection.wait``. For the length of a fan-out each
connection's ``wait`` is shadowed by one that switches to a hub greenlet, which polls
all sockets. So four shards are waited for at once without a thread, and the step is
ordinary blocking code. In an event loop the same is ``greenlet_spawn`` and tasks.

An error on one shard, a `Deadline` that passes, or a Ctrl-C, cancels what the others
are doing and waits for them to say so. One that does not within `CANCEL_TIMEOUT`
seconds is closed: it never goes back to a pool in an unknown state.
"""

from __future__ import annotations

import asyncio
import select
import time
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from greenlet import getcurrent, greenlet
from psycopg.waiting import Wait
from sqlalchemy.exc import StatementError
from sqlalchemy.util import await_only, greenlet_spawn

from shardalchemy.engine.deadline import CANCEL_AGAIN, CANCEL_TIMEOUT, earliest
from shardalchemy.engine.wire import driver_of, is_busy
from shardalchemy.errors import TransactionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection

__all__ = ["CANCEL_TIMEOUT", "attempt_all", "fanout"]

T = TypeVar("T")

EVENTS = {
    int(Wait.R): select.POLLIN,
    int(Wait.W): select.POLLOUT,
    int(Wait.RW): select.POLLIN | select.POLLOUT,
}
_READY_TO_READ = select.POLLIN | select.POLLHUP | select.POLLERR
_AT_ONCE = 16
_TICK = 0.5  # seconds between looks at a Ctrl-C


def ready_state(events: int) -> int:
    """Return what poll() says of a socket as psycopg's ``Ready`` has it."""
    ready = 1 if events & _READY_TO_READ else 0
    return ready | (2 if events & select.POLLOUT else 0)


def _is_writable(descriptor: int) -> bool:
    """Return whether a socket takes bytes now and has none to be read first."""
    poll = select.poll()
    poll.register(descriptor, EVENTS[int(Wait.RW)])
    return poll.poll(0) == [(descriptor, select.POLLOUT)]


def fanout(
    step: Callable[[str, Connection], T], connections: Mapping[str, Connection]
) -> dict[str, T]:
    """Run ``step(shard, connection)`` for each connection at once; return the results.

    The connections must be open already, and all sync or all async; an async one
    needs SQLAlchemy's greenlet around this call. Raises the first error of any step,
    which names its shard, after the others have been cancelled.
    """
    results: dict[str, T] = {}
    failures: list[tuple[str, _Failure]] = []
    for shard, outcome in _run(step, connections, cancel=True).items():
        if isinstance(outcome, _Failure):
            failures.append((shard, outcome))
        else:
            results[shard] = outcome
    if failures:
        # One that only says that another shard has failed is not the first.
        shard, failure = min(
            failures,
            key=lambda f: (
                isinstance(f[1].error, TransactionFailed),
                not f[1].was_first,
            ),
        )
        error = failure.error
        raise _placed(error, shard) if len(connections) > 1 else error
    return results


def _placed(error: BaseException, shard: str) -> BaseException:
    """Return *error*, which says now on which shard it arose.

    In its own message where SQLAlchemy has a place for it, beside it otherwise.
    """
    if isinstance(error, StatementError):
        if f"on shard {shard}" not in error.detail:
            error.add_detail(f"on shard {shard}")
    else:
        error.add_note(f"on shard {shard}")
    return error


def attempt_all(
    step: Callable[[str, Connection], T], connections: Mapping[str, Connection]
) -> dict[str, T | Exception]:
    """Run a step as `fanout` does, but let every shard finish: an error is a result."""
    outcomes: dict[str, T | Exception] = {}
    for shard, outcome in _run(step, connections, cancel=False).items():
        if isinstance(outcome, _Failure):
            if not isinstance(outcome.error, Exception):
                raise outcome.error
            outcomes[shard] = outcome.error
        else:
            outcomes[shard] = outcome
    return outcomes


class _Failure:
    """A step's error; ``was_first`` unless another's error had cancelled it."""

    __slots__ = ("error", "was_first")

    def __init__(self, error: BaseException, was_first: bool) -> None:
        self.error = error
        self.was_first = was_first


def _run(
    step: Callable[[str, Connection], T],
    connections: Mapping[str, Connection],
    *,
    cancel: bool,
) -> dict[str, T | _Failure]:
    drivers = {shard: driver_of(c) for shard, c in connections.items()}
    if any(isinstance(d, psycopg.AsyncConnection) for d in drivers.values()):
        outcomes: dict[str, T | _Failure] = await_only(
            _run_in_loop(step, connections, drivers, cancel=cancel)
        )
        return outcomes
    if len(connections) == 1:
        ((shard, connection),) = connections.items()
        try:
            return {shard: step(shard, connection)}
        except Exception as error:
            return {shard: _Failure(error, True)}
    return _Hub(step, connections, drivers, cancel=cancel).run()


class _Hub:
    """One fan-out in one thread: a greenlet per shard, and this one, which polls."""

    def __init__(
        self,
        step: Callable[[str, Connection], T],
        connections: Mapping[str, Connection],
        drivers: Mapping[str, Any],
        *,
        cancel: bool,
    ) -> None:
        self._step = step
        self._connections = connections
        self._drivers = drivers
        self._cancel_others = cancel
        self._outcomes: dict[str, Any] = {}
        self._waiting: dict[int, tuple[greenlet, str]] = {}
        self._poll = select.poll()
        self._must_cancel = False
        self._cancelled_at: float | None = None
        self._cancel_again_at = 0.0
        self._waits = {s: vars(driver).get("wait") for s, driver in drivers.items()}
        self._deadline = earliest(list(self._waits.values()))

    def run(self) -> dict[str, Any]:
        self._hub = getcurrent()
        for shard, driver in self._drivers.items():
            driver.wait = self._waiter(shard, driver)
        try:
            for shard in self._connections:
                attempt = greenlet(self._attempt, self._hub)
                attempt.gr_context = copy_context()  # a greenlet starts with none
                attempt.switch(shard)
                if self._must_cancel:
                    break
            self._wait_for_all()
        except BaseException:  # a Ctrl-C, or what another signal's handler raises
            self._must_cancel = True
            self._wait_for_all()
            for shard, driver in self._drivers.items():
                # Interrupted between its answer and who waits for it.
                if shard not in self._outcomes and is_busy(driver):
                    driver.pgconn.finish()
            raise
        finally:
            for shard, driver in self._drivers.items():
                vars(driver).pop("wait", None)
                if self._waits[shard] is not None:
                    driver.wait = self._waits[shard]
        return self._outcomes

    def _attempt(self, shard: str) -> None:
        try:
            self._outcomes[shard] = self._step(shard, self._connections[shard])
        except BaseException as error:
            self._outcomes[shard] = _Failure(error, self._cancelled_at is None)
            # Only the hub may wake others: what this greenlet woke would not return.
            if self._cancel_others or not isinstance(error, Exception):
                self._must_cancel = True

    def _waiter(self, shard: str, driver: Any) -> Callable[..., Any]:
        """Return what stands in for ``Connection.wait`` during the fan-out."""

        def wait(gen: Any, *args: object, **kwargs: object) -> Any:
            room = 0  # messages that may be sent before asking whether more fit
            try:
                wanted = int(next(gen))
                while True:
                    descriptor = driver.pgconn.socket
                    if wanted & Wait.W:
                        # Many rows are a message each. Going on while there is room
                        # gives one server all of them before the others' turns.
                        if not room and _is_writable(descriptor):
                            room = _AT_ONCE
                        if room:
                            room -= 1
                            wanted = int(gen.send(int(Wait.W)))
                            continue
                    self._poll.register(descriptor, EVENTS[wanted])
                    self._waiting[descriptor] = (getcurrent(), shard)
                    wanted = int(gen.send(self._hub.switch()))
            except StopIteration as stop:
                return stop.value

        return wait

    def _wait_for_all(self) -> None:
        while self._waiting:
            if self._cancelled_at is None and (self._must_cancel or self._is_late()):
                self._cancel()
            for descriptor, events in self._poll.poll(self._tick() * 1000):
                waiter, _ = self._waiting.pop(descriptor)
                self._poll.unregister(descriptor)
                waiter.switch(ready_state(events))
            if self._cancelled_at is not None:
                now = time.monotonic()
                late = now - self._cancelled_at > CANCEL_TIMEOUT
                self._close_waiting(all_of_them=late)
                # One that reaches a server before its statement does has no effect.
                if now >= self._cancel_again_at:
                    # One that reached a server before its statement had no effect.
                    self._cancel()

    def _tick(self) -> float:
        """Return for how many seconds to wait at most before looking around."""
        if self._cancelled_at is not None:
            return CANCEL_AGAIN
        if self._deadline is None:
            return _TICK
        return min(_TICK, max(0.0, self._deadline.left))

    def _is_late(self) -> bool:
        """Return whether the deadline has passed; note for whom."""
        if self._deadline is None or self._deadline.left > 0:
            return False
        self._deadline.late += [shard for _, shard in self._waiting.values()]
        return True

    def _cancel(self) -> None:
        """Ask the servers to end what the waiting shards are doing."""
        if self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
        for _, shard in list(self._waiting.values()):
            driver = self._drivers[shard]
            try:
                driver.cancel_safe(timeout=CANCEL_TIMEOUT)
            except psycopg.Error:
                driver.pgconn.finish()
        self._cancel_again_at = time.monotonic() + CANCEL_AGAIN

    def _close_waiting(self, *, all_of_them: bool) -> None:
        """Close connections that could not be cancelled, and let their steps see it."""
        for descriptor, (waiter, shard) in list(self._waiting.items()):
            driver = self._drivers[shard]
            if not all_of_them and not driver.closed:
                continue
            driver.pgconn.finish()
            del self._waiting[descriptor]
            self._poll.unregister(descriptor)
            waiter.throw(
                psycopg.OperationalError(f"shard {shard} did not answer a cancellation")
            )


async def _cancel_in_loop(pending: Mapping[asyncio.Future[Any], Any]) -> None:
    """Have the servers end what tasks wait for, each on a driver's connection.

    The servers and not the tasks are asked: SQLAlchemy would close the connection of a
    cancelled task.
    """
    until = time.monotonic() + CANCEL_TIMEOUT
    left = set(pending)
    while left and time.monotonic() < until:
        await asyncio.gather(
            *(pending[task].cancel_safe(timeout=CANCEL_TIMEOUT) for task in left),
            return_exceptions=True,
        )
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN)


async def _run_in_loop(
    step: Callable[[str, Connection], T],
    connections: Mapping[str, Connection],
    drivers: Mapping[str, Any],
    *,
    cancel: bool,
) -> dict[str, T | _Failure]:
    tasks = {
        asyncio.ensure_future(greenlet_spawn(step, shard, connection)): shard
        for shard, connection in connections.items()
    }
    until = asyncio.FIRST_EXCEPTION if cancel else asyncio.ALL_COMPLETED
    try:
        done, pending = await asyncio.wait(tasks, return_when=until)
        first = {task for task in done if task.exception() is not None}
        if pending:
            await _cancel_in_loop({task: drivers[tasks[task]] for task in pending})
    finally:
        # Reached with tasks left only if this task was cancelled, or a server did not
        # answer; each then cancels its statement, waits, and closes its connection.
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
    outcomes: dict[str, T | _Failure] = {}
    for task, shard in tasks.items():
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        outcomes[shard] = (
            task.result() if error is None else _Failure(error, task in first)
        )
    return outcomes
