"""A program whose children run one thing each, and die where they are told to.

    python -m tests.commit.crasher

It reads one `Task` a line, as JSON, and forks a child for it, which has imported
everything and read the topology before it was born, and shares no connection and no
thread with anybody. For each task that has ended it writes one line: what the child had
said before its end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.commit.failpoints import Death, install

APPLICATION = "crasher"
"""The ``application_name`` of the children's connections."""


@dataclass(frozen=True)
class Task:
    """What a child does: *do* is ``transfer``, ``recover`` or ``clean``.

    It moves 1 from the first of *numbers* to each other. *thread* is where *death* is
    met: ``MainThread``, the start of another's name, or None for any.
    """

    do: str
    urls: dict[str, str]
    numbers: tuple[int, ...] = ()
    is_async: bool = False
    ack: str = "committed"
    thread: str | None = "MainThread"
    death: Death | None = None


@dataclass(frozen=True)
class End:
    """How a child ended; ``told`` is what it had heard by then, or None."""

    died: bool
    told: Any = None
    reached: tuple[Death, ...] = field(default=(), repr=False)


class Crasher:
    """The running program; a context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.commit.crasher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def run(self, tasks: Iterable[Task]) -> Iterator[End]:
        """Run each task in a child of its own, two at a time; yield their ends."""
        lines = [json.dumps(asdict(task)) for task in tasks]
        print(len(lines), *lines, sep="\n", file=self._process.stdin, flush=True)
        for _ in lines:
            answer = self._process.stdout.readline()
            assert answer, "the crasher has ended; it says why on stderr"
            end = json.loads(answer)
            assert "failed" not in end, end["failed"]
            reached = tuple(Death(*death) for death in end.get("reached", ()))
            yield End(end["died"], end.get("told"), reached)


_AT_ONCE = 2


def main() -> None:
    """Serve until the input ends."""
    recorder = install()
    import psycopg  # noqa: F401
    from sqlalchemy.ext.asyncio import async_sessionmaker  # noqa: F401

    from shardalchemy import Cluster
    from shardalchemy.commit import finisher
    from tests.commit.accounts import Account

    # So that a child's last deed is to delete the markers.
    finisher.RETENTION = 0.0

    clusters: dict[tuple[str, ...], Cluster] = {}

    def opened(task: Task) -> Cluster:
        """Return a cluster that knows the servers, without a connection to any."""
        key = (*task.urls.values(), task.ack)
        if key not in clusters:
            cluster = clusters[key] = Cluster(
                task.urls,
                ack=task.ack,
                recover_in_background=False,
                connect_args={"application_name": APPLICATION},
            )
            assert cluster.topology
            asyncio.run(warmed(cluster, task.numbers))
        return clusters[key]

    async def warmed(cluster: Cluster, numbers: tuple[int, ...]) -> None:
        with cluster.sessionmaker()() as session:
            for number in numbers:
                session.get(Account, number)
        async with cluster.async_sessionmaker()() as session:
            for number in numbers:
                await session.get(Account, number)
        cluster._transactions.waits.close()
        await cluster._shards.dispose_async()

    def run(task: Task, say: Callable[..., None]) -> None:
        cluster = opened(task)
        with cluster:
            if task.do == "recover":
                recorder.arm(task.thread, task.death)
                report = cluster.recover(grace=0)
                say(told=asdict(report))
            elif task.do == "clean":
                cleaner = cluster._transactions.housekeeping
                recorder.arm(task.thread, task.death)
                # What the first round notes, the second deletes.
                say(told=cleaner.clean(age=0) + cleaner.clean(age=0))
            elif task.is_async:
                asyncio.run(transfer_in_loop(cluster, task, say))
            else:
                transfer(cluster, task, say)
        recorder.is_armed = False
        say(reached=[(d.point, d.time) for d in recorder.deaths])

    def move(accounts: list[Account]) -> None:
        accounts[0].balance -= len(accounts) - 1
        for account in accounts[1:]:
            account.balance += 1

    def transfer(cluster: Cluster, task: Task, say: Callable[..., None]) -> None:
        with cluster.sessionmaker()() as session:
            move([session.get_one(Account, n) for n in task.numbers])
            session.flush()
            recorder.arm(task.thread, task.death)
            session.commit()
            say(told="committed")

    async def transfer_in_loop(
        cluster: Cluster, task: Task, say: Callable[..., None]
    ) -> None:
        async with cluster.async_sessionmaker()() as session:
            move([await session.get_one(Account, n) for n in task.numbers])
            await session.flush()
            recorder.arm(task.thread, task.death)
            await session.commit()
            say(told="committed")
        await cluster.aclose()

    while line := sys.stdin.readline():
        tasks = [_task(json.loads(sys.stdin.readline())) for _ in range(int(line))]
        for task in tasks:
            opened(task)
        assert threading.active_count() == 1, threading.enumerate()
        gc.freeze()
        _run_all(tasks, run)


def _task(fields: dict[str, Any]) -> Task:
    death = fields.pop("death")
    return Task(**fields, death=None if death is None else Death(**death))


def _run_all(tasks: list[Task], run: Callable[..., None]) -> None:
    """Run tasks in children, `_AT_ONCE` of them; write their ends in their order."""
    ends: dict[int, str] = {}
    running: dict[int, tuple[int, int, bytes]] = {}  # by the pipe it speaks through
    begun = written = 0
    while written < len(tasks):
        while begun < len(tasks) and len(running) < _AT_ONCE:
            pipe, child = _forked(tasks[begun], run)
            running[pipe] = (begun, child, b"")
            begun += 1
        for pipe in select.select(running, [], [])[0]:
            number, child, said = running[pipe]
            data = os.read(pipe, 1 << 20)
            if data:
                running[pipe] = (number, child, said + data)
                continue
            os.close(pipe)
            del running[pipe]
            _, status = os.waitpid(child, 0)
            end: dict[str, Any] = {"died": os.WIFSIGNALED(status)}
            for line in said.splitlines():
                end |= json.loads(line)
            ends[number] = json.dumps(end)
        while written in ends:
            print(ends[written], flush=True)
            written += 1


def _forked(task: Task, run: Callable[..., None]) -> tuple[int, int]:
    """Return the pipe through which a child speaks, and its process's id."""
    ours, its = os.pipe()
    child = os.fork()
    if child:
        os.close(its)
        return ours, child

    def say(**what: Any) -> None:
        os.write(its, json.dumps(what).encode() + b"\n")

    try:
        run(task, say)
    except BaseException as error:
        say(failed=repr(error))
    os._exit(0)


if __name__ == "__main__":
    main()
