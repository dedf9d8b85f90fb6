"""Processes that work at the same time, and report while they do.

Python runs one thread at a time in a process, so one process of buyers would measure
itself. These are started afresh instead of forked: a fork would share the sockets and
the locks of the cluster that the parent has open.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

__all__ = ["WorkerFailed", "Workers"]

_spawning = multiprocessing.get_context("spawn")


class WorkerFailed(RuntimeError):
    """A process ended before its work did; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class _Failure:
    traceback: str


class Workers:
    """Processes that run ``target(parent, *arguments)``, one for each *arguments*.

    ``parent`` is a Connection, on which a worker sends its messages and receives what
    it is told. Leaving the context ends those that are still at work.
    """

    def __init__(
        self, target: Callable[..., None], arguments: Iterable[tuple[Any, ...]]
    ) -> None:
        self._target = target
        self._arguments = list(arguments)
        self._processes: dict[Connection[Any, Any], Any] = {}

    def __len__(self) -> int:
        return len(self._arguments)

    def __enter__(self) -> Self:
        with _without_interrupts():
            for arguments in self._arguments:
                ours, theirs = _spawning.Pipe()
                process = _spawning.Process(
                    target=_work, args=(self._target, theirs, arguments), daemon=True
                )
                process.start()
                theirs.close()  # or its end would never be seen
                self._processes[ours] = process
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join()
            process.close()
            connection.close()

    def tell(self, message: object) -> None:
        """Send *message* to every worker."""
        for connection in self._processes:
            connection.send(message)

    def messages(self) -> Iterator[Any]:
        """Yield the workers' messages as they come, until all workers have ended.

        Raises WorkerFailed as soon as one of them has failed.
        """
        working = dict(self._processes)
        while working:
            ready = wait(working)
            for connection in [c for c in working if c in ready]:
                try:
                    message = connection.recv()
                except EOFError:
                    process = working.pop(connection)
                    process.join()
                    if process.exitcode != 0:
                        raise WorkerFailed(
                            f"a process ended with exit code {process.exitcode}."
                        ) from None
                    continue
                if isinstance(message, _Failure):
                    raise WorkerFailed(message.traceback)
                yield message


def _work(
    target: Callable[..., None],
    parent: Connection[Any, Any],
    arguments: tuple[Any, ...],
) -> None:
    try:
        target(parent, *arguments)
    except Exception:
        try:
            parent.send(_Failure(traceback.format_exc()))
        except OSError:
            return  # the parent was killed; nobody wants to know any more


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while processes are started, which is what they inherit.

    A terminal sends it to all of its processes, and only the parent can end in order.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
