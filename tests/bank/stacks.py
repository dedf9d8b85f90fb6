"""Where everything in a process is, for one that does not end: a signal prints it."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import signal
import sys
import traceback
from typing import Any

from greenlet import greenlet

__all__ = ["SIGNAL", "print_on_signal", "print_tasks_on_signal"]

SIGNAL = signal.SIGUSR1


def print_on_signal() -> None:
    """Print all stacks to stderr when the signal comes, also in the middle of C."""
    faulthandler.register(SIGNAL, all_threads=True, chain=True)


def print_tasks_on_signal() -> None:
    """Print those of the running event loop's tasks and greenlets as well."""
    faulthandler.unregister(SIGNAL)
    asyncio.get_running_loop().add_signal_handler(SIGNAL, _print_tasks)


def _print_tasks() -> None:
    faulthandler.dump_traceback(all_threads=True)
    for task in asyncio.all_tasks():
        print(f"-- {task.get_name()}", file=sys.stderr)
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(
                awaited, "gi_frame", None
            )
            if frame is None:
                print(f"  {awaited!r}", file=sys.stderr)
            else:
                traceback.print_stack(frame, limit=1)
            awaited = getattr(awaited, "cr_await", None) or getattr(
                awaited, "gi_yieldfrom", None
            )
    for one in gc.get_objects():
        if isinstance(one, greenlet) and one.gr_frame is not None:
            print("-- a greenlet", file=sys.stderr)
            traceback.print_stack(one.gr_frame)
    sys.stderr.flush()
