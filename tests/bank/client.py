"""A client process: ``python -m tests.bank.client CONFIG NUMBER INCARNATION``.

It works until a file says to be quiet, and then stays, its cluster open, until its
stdin is closed. Even numbers work with threads, odd ones in an event loop; the last
number only looks, in snapshots.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sqlalchemy import exc, func, select
from sqlalchemy.orm import Session

from shardalchemy import Cluster
from tests.bank.attempt import Attempt, look
from tests.bank.config import READER, WORKERS, Config
from tests.bank.journal import Journal, Reads
from tests.bank.model import Account, keys_of
from tests.bank.plans import Choices
from tests.bank.stacks import print_on_signal, print_tasks_on_signal

logger = logging.getLogger("bank")


class Client:
    """The workers of one process, and their journal."""

    def __init__(self, config: Config, number: int, incarnation: int) -> None:
        self._config = config
        self._number = number
        self._incarnation = incarnation
        name = f"c{number}.{incarnation}"
        self._journal = Journal(Path(config.directory, f"{name}.jsonl"))
        self._ended = threading.Event()
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()

    def _wait_for_the_end(self) -> None:
        os.read(0, 1)
        self._ended.set()

    def _is_over(self) -> bool:
        return self._ended.is_set() or self._config.quiet.exists()

    def _choices(self, worker: int) -> Choices:
        who = self._number * 1000 + self._incarnation
        return Choices(
            f"{self._config.seed} {who} {worker}",
            (who * 10 + worker) * 1_000_000,
            self._config.accounts,
        )

    def _next(self, choices: Choices, *, one_session: bool) -> Attempt:
        plan = choices.next(self._config.generation())
        if one_session:
            plan = replace(plan, ack="prepared")
        self._journal.intend(plan)
        return Attempt(plan)

    def _note(self, attempt: Attempt, error: Exception | None) -> None:
        said = None
        if error is not None:
            attempt.failed(error)
            said = f"{type(error).__name__}: {error}"[:600]
        self._journal.told(attempt.plan, attempt.outcome, attempt.reads, said)
        if error is not None and not isinstance(error, exc.SQLAlchemyError):
            text = "".join(traceback.format_exception(error))
            self._journal.failed(f"transaction {attempt.plan.id}", text)

    def run(self) -> None:
        """Work with threads."""
        with self._config.cluster() as cluster:
            self._know(cluster)
            work: Callable[[Cluster, int], None] = self._work
            workers = range(WORKERS)
            if self._number == READER:
                work, workers = self._look, range(2)
            threads = [
                threading.Thread(target=work, args=(cluster, w), daemon=True)
                for w in workers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self._journal.quiet()
            self._ended.wait()

    def _work(self, cluster: Cluster, worker: int) -> None:
        choices = self._choices(worker)
        # The first has one session for all, so that each of its commits waits for what
        # the one before has left to do.
        session = None if worker else cluster.sessionmaker(ack="prepared")()
        while not self._is_over():
            attempt = self._next(choices, one_session=session is not None)
            error = None
            try:
                attempt.run(cluster, session)
            except Exception as caught:
                error = caught
            if error and session is not None:
                # SQLAlchemy may raise there of a connection that was lost meanwhile.
                with suppress(exc.SQLAlchemyError):
                    session.close()
            self._note(attempt, error)
            time.sleep(choices.pause() + (0.2 if error else 0))

    async def run_async(self) -> None:
        """Work in an event loop."""
        print_tasks_on_signal()
        async with self._config.cluster() as cluster:
            await asyncio.to_thread(self._know, cluster)
            await asyncio.gather(
                *(self._work_async(cluster, worker) for worker in range(WORKERS))
            )
            self._journal.quiet()
            await asyncio.to_thread(self._ended.wait)

    async def _work_async(self, cluster: Cluster, worker: int) -> None:
        choices = self._choices(worker)
        session = None if worker else cluster.async_sessionmaker(ack="prepared")()
        while not self._is_over():
            attempt = self._next(choices, one_session=session is not None)
            error = None
            try:
                await attempt.run_async(cluster, session)
            except Exception as caught:
                error = caught
            if error and session is not None:
                with suppress(exc.SQLAlchemyError):
                    await session.close()
            self._note(attempt, error)
            await asyncio.sleep(choices.pause() + (0.2 if error else 0))

    def _know(self, cluster: Cluster) -> None:
        """Read the topology; at first a server may be away."""
        while not self._is_over():
            try:
                logger.info("epoch %d", cluster.topology.epoch)
                return
            except exc.SQLAlchemyError as error:
                logger.info("no topology yet: %s", error)
                time.sleep(0.2)

    def _look(self, cluster: Cluster, worker: int) -> None:
        """Look at everything in snapshots; the second does so in an event loop."""
        if worker:
            asyncio.run(self._look_async(cluster))
        turns = itertools.cycle([False, True])
        while not self._is_over():
            began, strict = time.time(), next(turns)
            try:
                with cluster.snapshot(timeout=10, strict=strict) as session:
                    self._journal.snapshot(began, strict, *self._sums(session))
            except Exception as error:
                self._not_seen(error)
            time.sleep(0.3)

    async def _look_async(self, cluster: Cluster) -> None:
        turns = itertools.cycle([False, True])
        while not self._is_over():
            began, strict = time.time(), next(turns)
            try:
                async with cluster.snapshot(timeout=10, strict=strict) as session:
                    seen = await session.run_sync(self._sums)
                    self._journal.snapshot(began, strict, *seen)
            except Exception as error:
                self._not_seen(error)
            await asyncio.sleep(0.3)

    def _sums(self, session: Session) -> tuple[int, int, Reads]:
        generation = self._config.generation()
        keys = [*keys_of(max(0, generation - 1)), *keys_of(generation)]
        sums = select(func.sum(Account.balance), func.count())
        total, accounts = session.execute(sums.select_from(Account)).one()
        return total, accounts, look(session, keys)

    def _not_seen(self, error: Exception) -> None:
        if isinstance(error, exc.SQLAlchemyError):
            logger.info("no snapshot: %s", error)
        else:
            text = "".join(traceback.format_exception(error))
            self._journal.failed("snapshot", text)


def main() -> None:
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d %(levelname)s %(threadName)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    for name in ("shardalchemy", "bank"):
        logging.getLogger(name).setLevel(logging.INFO)
    print_on_signal()
    path, number, incarnation = sys.argv[1:]
    client = Client(Config.read(path), int(number), int(incarnation))
    if int(number) % 2:
        asyncio.run(client.run_async())
    else:
        client.run()


if __name__ == "__main__":
    main()
