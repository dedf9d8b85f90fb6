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
from multiprocessing import resource_tracker
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
        try:
            with _interrupts_later():
                for arguments in self._arguments:
                    self._start(arguments)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, arguments: tuple[Any, ...]) -> None:
        ours, theirs = _spawning.Pipe()
        process = _spawning.Process(
            target=_work, args=(self._target, theirs, arguments), daemon=True
        )
        process.start()
        theirs.close()  # or its end would never be seen
        self._processes[ours] = process

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
def _interrupts_later() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, and take one that comes afterwards.

    A terminal sends it to all of its processes, and only the parent can end in order.
    They inherit what this thread blocks. Another thread of ours may receive it even so;
    then it is kept, for a start that is interrupted leaves half a process behind.
    """
    resource_tracker.ensure_running()  # its start, with the first process, unblocks
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
