"""Whether a server has ended a connection while nothing was asked of it.

After ``idle_in_transaction_session_timeout``, ``pg_terminate_backend()`` or a shutdown
a server says why and hangs up. A client sees it when it next sends something, and
cannot tell then whether that arrived. Looked at before, it is certain that it did not.
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Any

from shardalchemy.engine.wire import driver_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from shardalchemy.engine.wire import Driver

__all__ = ["ended"]

# Only Linux tells a hang-up of the other side before all is read.
_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def ended(connections: Mapping[str, Connection]) -> dict[str, str]:
    """Return why idle connections have come to their end, of those that have.

    Sends nothing and reads nothing.
    """
    found: dict[str, str] = {}
    poll = select.poll()
    watched: dict[int, tuple[str, Driver]] = {}
    for shard, connection in connections.items():
        if connection.invalidated:
            found[shard] = "as an earlier statement has said"
            continue
        driver = driver_of(connection)
        if driver.closed:
            found[shard] = "it is closed"
            continue
        descriptor = driver.pgconn.socket
        poll.register(descriptor, _HUNG_UP)
        watched[descriptor] = (shard, driver)
    for descriptor, _ in poll.poll(0):
        shard, driver = watched[descriptor]
        found[shard] = _last_words(driver, descriptor) or "the server has closed it"
    return found


def _last_words(driver: Driver, descriptor: int) -> str | None:
    """Return the message of the FATAL error that is there to be read, if one is."""
    pgconn: Any = driver.pgconn
    if pgconn.ssl_in_use:
        return None
    waiting = socket.socket(fileno=descriptor)
    try:
        said = waiting.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return None
    finally:
        waiting.detach()
    # An ErrorResponse: 'E', its length, and fields of a letter and a text.
    if said[:1] != b"E":
        return None
    fields = said[5:].split(b"\0")
    message = next((field[1:] for field in fields if field[:1] == b"M"), b"")
    return message.decode(driver.info.encoding, "replace") or None
