"""Work that goes on in a thread beside the sessions of a process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Background"]


class Background:
    """One daemon thread, started by the first who needs it, until it is closed.

    *run* is called in it with the event that ends it. It must not hold the owner of
    this object, but a weak reference: one that is forgotten ends its thread.
    """

    def __init__(self, name: str, run: Callable[[threading.Event], None]) -> None:
        self._name = name
        self._run = run
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def start(self) -> None:
        """Start the thread, if it does not run."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._ending = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._ending,), name=self._name, daemon=True
                )
                self._thread.start()

    def close(self, seconds: float, wake: Callable[[], object] | None = None) -> None:
        """End the thread, which *wake* wakes, and wait for it for so long at most.

        It can be started again.
        """
        with self._lock:
            thread, self._thread = self._thread, None
            self._ending.set()
        if wake is not None:
            wake()
        if thread is not None:
            thread.join(seconds)
