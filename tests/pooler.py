"""PgBouncer in transaction mode, between a test and its servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg
import pytest
from sqlalchemy import make_url

from shardalchemy.local import LocalCluster
from shardalchemy.local.account import server_account

_CONFIG = """\
[databases]
{databases}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
auth_type = plain
auth_file = {users}
ignore_startup_parameters = extra_float_digits, options
logfile = {log}
"""


def find_pgbouncer() -> str:
    """Return the program; skip the test where there is none, but fail in CI."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if found is None:
        message = "pgbouncer is not installed: apt-get install pgbouncer"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


class Pooler:
    """A PgBouncer over the servers of *local*; ``urls`` lead to it.

    Each shard has *pool_size* connections, which the clients share by transaction.
    """

    def __init__(self, local: LocalCluster, pool_size: int = 3) -> None:
        self._program = find_pgbouncer()
        self._local = local
        self._pool_size = pool_size
        self._account = server_account()
        self._directory = Path(tempfile.mkdtemp(prefix="shardalchemy-pooler-"))
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]

    @property
    def urls(self) -> dict[str, str]:
        """The URLs of the shards through the pooler, where each is a database."""
        return {
            shard: make_url(url)
            .set(port=self.port, database=shard)
            .render_as_string(hide_password=False)
            for shard, url in self._local.urls.items()
        }

    def __enter__(self) -> Self:
        databases, passwords = "", {}
        for shard, text in self._local.urls.items():
            url = make_url(text)
            databases += f"{shard} = host={url.host} port={url.port} dbname=postgres\n"
            passwords[url.username] = url.password
        users = self._directory / "users.txt"
        users.write_text("".join(f'"{u}" "{p}"\n' for u, p in passwords.items()))
        config = self._directory / "pgbouncer.ini"
        config.write_text(
            _CONFIG.format(
                databases=databases,
                port=self.port,
                pool_size=self._pool_size,
                users=users,
                log=self._directory / "pgbouncer.log",
            )
        )
        self._account.own([self._directory, users, config])
        self.start()
        return self

    def start(self) -> None:
        """Start the program and wait until it answers."""
        config = self._directory / "pgbouncer.ini"
        self._process = self._account.spawn(
            [self._program, "-q", config], output=subprocess.DEVNULL
        )
        end = time.monotonic() + 20
        while True:
            try:
                url = next(iter(self.urls.values())).replace("+psycopg", "")
                psycopg.connect(url, prepare_threshold=None).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > end or self._process.poll() is not None:
                    log = self._directory / "pgbouncer.log"
                    raise RuntimeError(
                        f"pgbouncer does not start: {log.read_text()}"
                    ) from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def stop(self) -> None:
        """End the program, and with it every connection through it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
