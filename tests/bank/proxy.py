"""A proxy before each server, in a process of its own, that breaks what it is told to.

It cuts a connection at a message of the commit protocol: before the server gets it
("before"), when it has got it ("during"), or when it has answered ("after"). It cuts
all connections of a server, is deaf for a while, or slow.

Commands come as JSON lines on stdin, events go as JSON lines to stdout; `Proxy` is the
other end of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

__all__ = ["MESSAGES", "MOMENTS", "Proxy"]

MESSAGES = {
    "PREPARE TRANSACTION": b"PREPARE TRANSACTION",
    "COMMIT PREPARED": b"COMMIT PREPARED",
    # Of a single shard, behind its marker, at the end of a message.
    "COMMIT": b"; COMMIT\x00",
}
MOMENTS = ("before", "during", "after")


class Proxy:
    """The proxies of some servers; a context manager. ``ports`` are the proxies'."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self.cuts: Counter[str] = Counter()
        """How often a connection was cut, by message and moment."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bank.proxy", json.dumps(dict(ports))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.ports: dict[str, int] = json.loads(self._output.readline())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._output):
            assert pipe is not None
            pipe.close()

    def cut_next(self, shard: str, message: str, moment: str) -> None:
        """Cut the next connection that sends one of `MESSAGES`."""
        self._tell("cut_next", shard, message, moment)

    def cut_all(self, shard: str) -> None:
        """Cut all connections to a shard; new ones pass."""
        self._tell("cut_all", shard)

    def be_deaf(self, shard: str, seconds: float) -> None:
        """Accept connections, and forward nothing."""
        self._tell("be_deaf", shard, seconds)

    def be_slow(self, shard: str, seconds: float, delay: float) -> None:
        """Wait before each piece that is forwarded, in both directions."""
        self._tell("be_slow", shard, seconds, delay)

    def heal(self) -> None:
        """Forward everything, cut nothing."""
        self._tell("heal")

    @property
    def _output(self):  # type: ignore[no-untyped-def]
        assert self._process.stdout is not None
        return self._process.stdout

    def _tell(self, *command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):
            for line in self._output:
                message, moment = json.loads(line)
                self.cuts[f"{message} {moment}"] += 1


# -- the process -----------------------------------------------------------------------


class _Gate:
    """What goes on before one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._hearing = asyncio.Event()
        self._hearing.set()
        self._deaf_until = self._slow_until = 0.0
        self._delay = 0.0
        self._armed: list[tuple[str, str]] = []
        self._open: set[asyncio.StreamWriter] = set()

    def cut_next(self, message: str, moment: str) -> None:
        self._armed.append((message, moment))

    def cut_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    def be_deaf(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._deaf_until = max(self._deaf_until, loop.time() + seconds)
        self._hearing.clear()
        loop.call_at(self._deaf_until, self._hear_again)

    def _hear_again(self) -> None:
        if asyncio.get_running_loop().time() >= self._deaf_until:
            self._hearing.set()

    def be_slow(self, seconds: float, delay: float) -> None:
        self._slow_until = asyncio.get_running_loop().time() + seconds
        self._delay = delay

    def heal(self) -> None:
        self._armed.clear()
        self._deaf_until = self._slow_until = 0.0
        self._hearing.set()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await self._hearing.wait()
            to_server = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        both = (writer, to_server[1])
        self._open.update(both)
        connection = _Connection(self)
        pumps = [
            asyncio.create_task(connection.pump_requests(reader, to_server[1])),
            asyncio.create_task(connection.pump_replies(to_server[0], writer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for one in both:
            # What was forwarded still arrives; nothing else does.
            one.close()
        self._open.difference_update(both)

    async def passed(self) -> None:
        """Wait until something may be forwarded."""
        await self._hearing.wait()
        if asyncio.get_running_loop().time() < self._slow_until:
            await asyncio.sleep(self._delay)

    def taken(self, data: bytes) -> tuple[str, str] | None:
        """Return the cut that these bytes of a request are for."""
        for cut in self._armed:
            if MESSAGES[cut[0]] in data:
                self._armed.remove(cut)
                return cut
        return None


class _Connection:
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._cut: tuple[str, str] | None = None

    async def pump_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._gate.passed()
                cut = self._gate.taken(data)
                if cut is not None:
                    if cut[1] == "before":
                        return _say(cut)
                    self._cut = cut
                writer.write(data)
                await writer.drain()
                if cut is not None and cut[1] == "during":
                    return _say(cut)

    async def pump_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._gate.passed()
                if self._cut is not None:
                    return _say(self._cut)
                writer.write(data)
                await writer.drain()


def _say(event: object) -> None:
    print(json.dumps(event), flush=True)


async def _run(ports: Mapping[str, int]) -> None:
    gates = {shard: _Gate(port) for shard, port in ports.items()}
    listeners = {
        shard: await asyncio.start_server(gate.serve, "127.0.0.1", 0)
        for shard, gate in gates.items()
    }
    _say({s: one.sockets[0].getsockname()[1] for s, one in listeners.items()})
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    while line := await commands.readline():
        name, *arguments = json.loads(line)
        if name == "heal":
            for gate in gates.values():
                gate.heal()
        else:
            shard, *rest = arguments
            getattr(gates[shard], name)(*rest)


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.argv[1])))
