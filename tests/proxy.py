"""A TCP proxy that cuts a connection before the request or before the reply."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class CuttingProxy:
    """Forwards to a server on loopback until a client sends the bytes of `cut_on`.

    That request still reaches the server; its reply does not reach the client. With
    `cut_before` the request does not reach it either. Only the first such connection is
    cut, later ones pass, unless `lets_in` is false.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.cut_on: bytes | None = None
        self.cut_before = False
        self.lets_in = True
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            one.close()
        self._thread.join()

    def answered(self, data: bytes) -> bytes:
        """Return what the client gets of what the server has said."""
        return data

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.lets_in:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._open += [client, server]
            cut = threading.Event()
            for source, target, is_request in (
                (client, server, True),
                (server, client, False),
            ):
                threading.Thread(
                    target=self._pump,
                    args=(source, target, is_request, cut),
                    daemon=True,
                ).start()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        is_request: bool,
        cut: threading.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_request and self.cut_on is not None and self.cut_on in data:
                    self.cut_on = None
                    if self.cut_before:
                        self.cuts += 1
                        break
                    cut.set()
                    target.sendall(data)
                    continue
                if not is_request and cut.is_set():
                    # The server has answered, so it has done what was asked.
                    self.cuts += 1
                    break
                target.sendall(data if is_request else self.answered(data))
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
