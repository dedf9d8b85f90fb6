"""Processes report while they work; one that fails is not waited for in vain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from shardalchemy.cli.processes import WorkerFailed, Workers


def add_up(parent: Connection, numbers: list[int]) -> None:
    for number in numbers:
        parent.send(number)


def wait_for_a_word(parent: Connection) -> None:
    parent.send("ready")
    parent.send(parent.recv().upper())


def fail(parent: Connection) -> None:
    raise ValueError("a reason")


def die(parent: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(parent: Connection) -> None:
    parent.send(os.getpid())
    time.sleep(600)


def interrupt_oneself(parent: Connection) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    parent.send("still here")


def messages(target: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    with Workers(target, arguments) as workers:
        return list(workers.messages())


def test_messages_of_all_workers_arrive() -> None:
    assert sorted(messages(add_up, ([1, 3],), ([2],), ([],))) == [1, 2, 3]


def test_workers_hear_what_they_are_told() -> None:
    heard = []
    with Workers(wait_for_a_word, [(), ()]) as workers:
        ready = 0
        for message in workers.messages():
            heard.append(message)
            ready += message == "ready"
            if ready == len(workers):
                workers.tell("go")
                ready = 0
    assert heard == ["ready", "ready", "GO", "GO"]


def test_an_error_of_a_worker_comes_with_its_traceback() -> None:
    with pytest.raises(WorkerFailed, match="ValueError: a reason"):
        messages(fail, ())


def test_a_worker_that_was_killed_is_noticed() -> None:
    with pytest.raises(WorkerFailed, match="exit code -9"):
        messages(die, ())


def test_leaving_ends_what_still_works() -> None:
    with Workers(sleep, [()]) as workers:
        pid = next(workers.messages())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interrupt_is_for_the_parent_alone() -> None:
    assert messages(interrupt_oneself, ()) == ["still here"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


class Interrupted(Workers):
    """Workers whose start Ctrl-C falls into."""

    started = 0

    def _start(self, arguments: tuple[Any, ...]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        super()._start(arguments)
        self.started += 1


def test_an_interrupt_during_the_start_waits_for_its_end() -> None:
    workers = Interrupted(sleep, [(), ()])
    with pytest.raises(KeyboardInterrupt):
        workers.__enter__()
    assert workers.started == 2
    assert multiprocessing.active_children() == []
