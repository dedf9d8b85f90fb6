"""Free ports on loopback for servers that will be stopped and started again."""

from __future__ import annotations

import random
import socket

from shardalchemy.errors import LocalServerError

__all__ = ["LOOPBACK", "free_port"]

LOOPBACK = "127.0.0.1"

# Below every system's ephemeral range (32768 on Linux, 49152 on macOS and the BSDs):
# while a server is down, no outgoing connection can be given its port, and a client
# that keeps trying to reach it cannot be connected to itself.
_RANGE = range(20_000, 32_768)
_ATTEMPTS = 200


def free_port() -> int:
    """Return a port nobody listens on now; it may be taken before it is used."""
    for port in random.sample(_RANGE, _ATTEMPTS):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise LocalServerError(
        f"None of {_ATTEMPTS} ports tried between {_RANGE[0]} and {_RANGE[-1]} on "
        f"{LOOPBACK} is free; stop servers that are no longer needed."
    )
