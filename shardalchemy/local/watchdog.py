"""The process that stops the servers when the one that owns them has died.

A program that is killed runs no ``finally`` and no ``atexit``. So a LocalCluster starts
this file as a script of its own, tells it through a pipe each process that it starts,
and says ``done`` at the end. If the pipe closes without that, or the watchdog finds
itself with another parent (a forked child may hold the pipe open), it stops what it was
told of, and nothing else, and removes the cluster's temporary directory.

The script is run with ``-I -S`` and imports nothing but the standard library, so that
it is up at once and cannot be broken by the application's environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

__all__ = ["Process", "Watchdog", "look_up", "process_table", "send_signal"]

_LOOK_AT_PARENT_EVERY = 0.25
_PATIENCE = 5.0


class Process(NamedTuple):
    """One line of the process table; ``started`` tells a pid's users apart."""

    parent: int
    state: str
    started: str


def look_up(pid: int) -> Process | None:
    """Return the process of that pid, or None if it is gone or only a zombie."""
    if os.path.isdir("/proc/self"):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            return None
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = stat[stat.rindex(b")") + 2 :].decode().split()
        process = Process(int(fields[1]), fields[0], fields[19])
        return None if process.state in "ZX" else process
    return _ps().get(pid)


def process_table() -> dict[int, Process]:
    """Return every live process by its pid."""
    if not os.path.isdir("/proc/self"):
        return _ps()
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: process for pid in pids if (process := look_up(pid)) is not None}


def _ps() -> dict[int, Process]:
    output = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,state=,lstart="],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    table = {}
    for line in output.splitlines():
        pid, parent, state, started = line.split(maxsplit=3)
        if not state.startswith("Z"):
            table[int(pid)] = Process(int(parent), state[0], started)
    return table


def send_signal(pid: int, number: int, *, children: bool = False) -> list[int]:
    """Signal a process, its children first if wanted; return the pids of those.

    A pid that is gone by now is passed over.
    """
    family = []
    if children:
        family = [child for child, p in process_table().items() if p.parent == pid]
    for one in (*family, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)
    return family


class Watchdog:
    """The owner's end of the pipe."""

    def __init__(self, lock_descriptor: int) -> None:
        """Start the process; it shares the directory's lock until it is done."""
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                __file__,
                str(os.getpid()),
                str(lock_descriptor),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            pass_fds=(lock_descriptor,),
        )

    @property
    def pid(self) -> int:
        """The watchdog's own pid."""
        return self._process.pid

    def watch(self, pid: int, stop_signal: int) -> None:
        """Tell of a process, and of the signal that stops it."""
        self._tell("watch", pid, int(stop_signal))

    def forget(self, pid: int) -> None:
        """Tell that a process has ended."""
        self._tell("forget", pid)

    def remove(self, directory: str) -> None:
        """Tell of the directory to remove after the processes have ended."""
        self._tell("remove", directory)

    def done(self) -> None:
        """Tell that nothing is left to do, and wait for the watchdog's end."""
        self._tell("done")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, *message: str | int) -> None:
        assert self._process.stdin is not None
        # Without its watchdog a cluster still works, and still stops its servers.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()


def _watch(owner: int, lock_descriptor: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watched: dict[int, tuple[int, str]] = {}
    directory: str | None = None
    received = b""
    while os.getppid() == owner:
        if not select.select([0], [], [], _LOOK_AT_PARENT_EVERY)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, received = (received + chunk).split(b"\n")
        for line in lines:
            match json.loads(line):
                case ["watch", int(pid), int(stop_signal)]:
                    if (process := look_up(pid)) is not None:
                        watched[pid] = (stop_signal, process.started)
                case ["forget", int(pid)]:
                    watched.pop(pid, None)
                case ["remove", str(path)]:
                    directory = path
                case ["done"]:
                    return
    _stop(watched)
    if directory is not None:
        _remove(directory)
    fcntl.flock(lock_descriptor, fcntl.LOCK_UN)


def _stop(watched: dict[int, tuple[int, str]]) -> None:
    def alive() -> list[int]:
        return [
            pid
            for pid, (_, started) in watched.items()
            if (process := look_up(pid)) is not None and process.started == started
        ]

    for pid in alive():
        # A paused server does not hear the signal that stops it.
        send_signal(pid, signal.SIGCONT, children=True)
        send_signal(pid, watched[pid][0])
    deadline = time.monotonic() + _PATIENCE
    while alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in alive():
        send_signal(pid, signal.SIGKILL, children=True)


def _remove(directory: str) -> None:
    # A process that has just been killed may still be writing its last file.
    deadline = time.monotonic() + _PATIENCE
    while os.path.exists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]))
