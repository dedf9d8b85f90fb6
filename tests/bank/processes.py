"""The bank's processes: servers, the proxies before them, and the clients."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from sqlalchemy.engine import make_url

from shardalchemy.local import LocalCluster
from tests.bank.config import CLIENTS, READER, Config
from tests.bank.model import (
    ACCOUNTS,
    BOARD,
    GENERATION,
    OPENING,
    Account,
    Base,
    List,
    Notice,
    keys_of,
)
from tests.bank.proxy import Proxy
from tests.bank.stacks import SIGNAL
from tests.conftest import Servers

__all__ = ["Bank", "ClientProcess"]

_ROOT = Path(__file__).parents[2]
_MORE = 20
"""Generations of lists beyond those that the faults last for."""


class ClientProcess:
    """One client, and its next incarnations."""

    def __init__(self, config: Config, number: int) -> None:
        self.name = f"c{number}"
        self.log = Path(config.directory, f"{self.name}.log")
        self.incarnation = 0
        self._config = config
        self._number = number
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.incarnation += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.bank.client"),
                    *(self._config.path, str(self._number), str(self.incarnation)),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
            )

    def kill(self) -> None:
        self._running.kill()
        self._end()

    def pause(self) -> None:
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def print_stacks(self) -> None:
        """Let it say in its log where it is."""
        self._running.send_signal(SIGNAL)

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._running.poll()

    @property
    def is_quiet(self) -> bool:
        name = f"{self.name}.{self.incarnation}.jsonl"
        path = Path(self._config.directory, name)
        return path.exists() and '"quiet"' in path.read_text().rpartition("\n{")[2]

    def ask_to_stop(self) -> None:
        """Let it close its cluster, and end."""
        assert self._running.stdin is not None
        self._running.stdin.close()

    def wait(self, timeout: float) -> int | None:
        """Return its exit status, or None if it does not end and was killed."""
        try:
            return self._running.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _end(self) -> None:
        self._running.wait()
        assert self._running.stdin is not None
        self._running.stdin.close()


class Bank:
    """Four servers, their proxies and the clients, for faults of some seconds."""

    def __init__(self, directory: Path, seed: int, seconds: float) -> None:
        self.directory = directory
        self._seed = seed
        self._generations = int(seconds / GENERATION) + _MORE
        self.local = LocalCluster(
            4,
            with_redis=False,
            settings={"log_line_prefix": "%m [%p] ", "log_timezone": "UTC"},
        )
        self.clients: dict[str, ClientProcess] = {}

    def __enter__(self) -> Self:
        self.local.start()
        try:
            ports = {name: s.port for name, s in self.local.servers.items()}
            self.proxy = Proxy(ports)
            self._open_bank()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients.values():
            if client.exit_status is None:
                client.kill()
        if hasattr(self, "proxy"):
            self.proxy.__exit__()
        self.local.stop()

    @property
    def servers(self) -> Servers:
        """Plain SQL on each server, past the proxies."""
        return Servers(self.local)

    def _open_bank(self) -> None:
        keys = [key for g in range(self._generations) for key in keys_of(g)]
        with self.local.cluster() as cluster:
            cluster.create_all(Base.metadata)
            with cluster.sessionmaker().begin() as session:
                session.add_all(Account(number=n, balance=OPENING) for n in ACCOUNTS)
                session.add_all(List(key=key, items=[]) for key in keys)
                session.add(Notice(key=BOARD, items=[]))
            home = {n: cluster.shard_for(Account, n) for n in ACCOUNTS}
        accounts = {s: [n for n in ACCOUNTS if home[n] == s] for s in self.local.urls}
        urls = {
            name: make_url(url)
            .set(port=self.proxy.ports[name])
            .render_as_string(hide_password=False)
            for name, url in self.local.urls.items()
        }
        self.config = Config(
            urls, str(self.directory), self._seed, time.time(), accounts
        )
        self.config.write()
        for number in range(CLIENTS + 1):
            client = ClientProcess(self.config, number)
            self.clients[client.name] = client
            client.start()

    @property
    def reader(self) -> str:
        """The name of the client that only looks."""
        return f"c{READER}"

    def logs(self) -> Iterator[tuple[str, Path]]:
        """Yield the log of every server and client, by its name."""
        for name, server in self.local.servers.items():
            yield name, server.log
        for name, client in self.clients.items():
            yield name, client.log
