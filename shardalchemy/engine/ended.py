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
    from sqlalchemy import Connection

    from shardalchemy.engine.wire import Driver

__all__ = ["end_of"]

# Only Linux tells a hang-up of the other side before all is read.
_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def end_of(connection: Connection) -> str | None:
    """Return why an idle connection has come to its end, None if it has not.

    Sends nothing and reads nothing.
    """
    if connection.invalidated:
        return "as an earlier statement has said"
    driver = driver_of(connection)
    if driver.closed:
        return "it is closed"
    descriptor = driver.pgconn.socket
    poll = select.poll()
    poll.register(descriptor, _HUNG_UP)
    if not poll.poll(0):
        return None
    return _last_words(driver, descriptor) or "the server has closed it"


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
