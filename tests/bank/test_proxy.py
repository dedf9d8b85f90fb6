"""The proxy, before a server that answers each request with ``yes``."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.bank.proxy import MESSAGES, Proxy


class Answering:
    """A server that keeps what it has received."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._answer, args=(connection,), daemon=True
            ).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1024):
                self.received.append(data)
                connection.sendall(b"yes")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.close()


@pytest.fixture
def proxy(server: Answering) -> Iterator[Proxy]:
    with Proxy({"s1": server.port}) as proxy:
        yield proxy


def asked(connection: socket.socket, request: bytes) -> bytes:
    """Return the answer, nothing if the connection is cut."""
    try:
        connection.sendall(request)
        return connection.recv(1024)
    except ConnectionError:
        return b""


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.ports["s1"]), 10) as client:
        assert asked(client, b"hello") == b"yes"
        yield client


def until_cut(proxy: Proxy) -> str:
    end = time.monotonic() + 10
    while not proxy.cuts:
        assert time.monotonic() < end
        time.sleep(0.01)
    return ", ".join(proxy.cuts)


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize(("moment", "arrives"), [("before", 0), ("after", 1)])
def test_a_message_is_lost_or_its_reply(
    server: Answering,
    proxy: Proxy,
    client: socket.socket,
    message: str,
    moment: str,
    arrives: int,
) -> None:
    request = b"INSERT; " + MESSAGES[message].removeprefix(b"; ")
    proxy.cut_next("s1", message, moment)
    # The command has no answer; it takes effect before a request that comes later.
    time.sleep(0.3)
    assert asked(client, b"SELECT") == b"yes"
    assert asked(client, request) == b""
    assert until_cut(proxy) == f"{message} {moment}"
    assert server.received.count(request) == arrives
    # It was one cut: others pass.
    with socket.create_connection(("127.0.0.1", proxy.ports["s1"]), 10) as another:
        assert asked(another, request) == b"yes"


def test_a_message_arrives_though_nobody_waits_for_its_reply(
    server: Answering, proxy: Proxy, client: socket.socket
) -> None:
    proxy.cut_next("s1", "COMMIT PREPARED", "during")
    time.sleep(0.3)
    assert asked(client, b"COMMIT PREPARED 'x'") == b""
    assert until_cut(proxy) == "COMMIT PREPARED during"
    end = time.monotonic() + 10
    while b"COMMIT PREPARED 'x'" not in server.received:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_connections_are_cut_and_new_ones_pass(
    proxy: Proxy, client: socket.socket
) -> None:
    proxy.cut_all("s1")
    assert client.recv(1) == b""
    with socket.create_connection(("127.0.0.1", proxy.ports["s1"]), 10) as another:
        assert asked(another, b"SELECT") == b"yes"


def test_a_deaf_proxy_accepts_and_forwards_nothing_until_it_is_healed(
    server: Answering, proxy: Proxy, client: socket.socket
) -> None:
    proxy.be_deaf("s1", 60.0)
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", proxy.ports["s1"]), 10) as another:
        for one in (client, another):
            one.sendall(b"SELECT")
            one.settimeout(0.3)
            with pytest.raises(TimeoutError):
                one.recv(1)
            one.settimeout(10)
        assert server.received == [b"hello"]
        proxy.heal()
        assert (client.recv(10), another.recv(10)) == (b"yes", b"yes")
