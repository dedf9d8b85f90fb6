"""Turns in Redis: one holder a name, for as long as it lives.

A turn is a key with a random token and a time to live. One background thread renews
all turns of a process; a holder that crashes stops renewing, and its turn passes on at
the end of its lease. Renewal and release compare the token first, in one script, so a
process that was stopped past its lease cannot take away another's turn.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis

__all__ = ["LEASE", "Turn", "Turns"]

LEASE = 10.0
"""Seconds after which a turn that nobody renews passes on."""

logger = logging.getLogger(__name__)

_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
"""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.002, 0.05


class Turn:
    """A turn that is held, until `release`."""

    __slots__ = ("_client", "_turns", "key", "token")

    def __init__(self, turns: Turns, client: Any, key: str, token: str) -> None:
        self._turns = turns
        self._client = client
        self.key = key
        self.token = token

    def release(self) -> None:
        """Let the next one have the turn, if it is still ours."""
        self._turns._forget(self)
        try:
            answer = self._client.eval(_RELEASE, 1, self.key, self.token)
            if not isinstance(answer, int):
                await_only(answer)
        except Exception as error:
            # The lease ends it; the transaction has ended already.
            logger.warning("the turn of %s was not released: %s", self.key, error)


class Turns:
    """The turns that this process holds or waits for; *url* is Redis's."""

    def __init__(self, url: str, lease: float = LEASE) -> None:
        self._url = url
        self._lease = lease
        self._lock = threading.Lock()
        self._held: dict[str, Turn] = {}
        self._renewer: threading.Thread | None = None
        self._stop = threading.Event()
        self._process = os.getpid()
        self._client: Redis | None = None
        self._async_clients: dict[int, tuple[Any, Any]] = {}

    def acquire(self, key: str, deadline: float) -> Turn | None:
        """Wait for the turn of *key* until a ``time.monotonic()``; None if it passes.

        Raises redis.RedisError where Redis cannot be asked.
        """
        return self._acquire(self._sync_client(), key, deadline, time.sleep)

    def acquire_in_loop(self, key: str, deadline: float) -> Turn | None:
        """Do the same from within SQLAlchemy's greenlet, letting the loop go on."""
        import asyncio

        def sleep(seconds: float) -> None:
            await_only(asyncio.sleep(seconds))

        return self._acquire(self._async_client(), key, deadline, sleep)

    def _acquire(
        self, client: Any, key: str, deadline: float, sleep: Callable[[float], None]
    ) -> Turn | None:
        token = secrets.token_hex(16)
        lease = int(self._lease * 1000)
        wait = _SHORTEST_WAIT
        while True:
            taken = client.set(key, token, nx=True, px=lease)
            if taken is not None and not isinstance(taken, bool):
                taken = await_only(taken)
            if taken:
                turn = Turn(self, client, key, token)
                self._remember(turn)
                return turn
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            sleep(min(left, wait * random.uniform(0.5, 1.5)))
            wait = min(wait * 1.5, _LONGEST_WAIT)

    def _sync_client(self) -> Redis:
        if self._client is None or self._process != os.getpid():
            import redis

            self._process = os.getpid()
            self._renewer = None
            # A request must not hang past the caller's timeout.
            self._client = redis.Redis.from_url(
                self._url, socket_timeout=5, socket_connect_timeout=2
            )
        return self._client

    def _async_client(self) -> Any:
        import asyncio

        import redis.asyncio

        loop = asyncio.get_running_loop()
        found = self._async_clients.get(id(loop))
        if found is None or found[0] is not loop:
            client = redis.asyncio.Redis.from_url(
                self._url, socket_timeout=5, socket_connect_timeout=2
            )
            self._async_clients[id(loop)] = found = (loop, client)
        return found[1]

    def _remember(self, turn: Turn) -> None:
        with self._lock:
            self._held[turn.token] = turn
            if self._renewer is None:
                self._renewer = threading.Thread(
                    target=self._renew, name="shardalchemy-turns", daemon=True
                )
                self._renewer.start()

    def _forget(self, turn: Turn) -> None:
        with self._lock:
            self._held.pop(turn.token, None)

    def _renew(self) -> None:
        while not self._stop.wait(self._lease / 3):
            with self._lock:
                held = list(self._held.values())
            for turn in held:
                try:
                    lease = str(int(self._lease * 1000))
                    kept = self._sync_client().eval(
                        _RENEW, 1, turn.key, turn.token, lease
                    )
                    # One that was released meanwhile is gone from the held ones.
                    if not kept and self._held.pop(turn.token, None) is not None:
                        logger.warning("the turn of %s was lost", turn.key)
                except Exception as error:
                    logger.warning(
                        "the turn of %s was not renewed: %s", turn.key, error
                    )

    def close(self) -> None:
        """End the renewals and close the connections of ordinary code."""
        self._stop.set()
        if self._renewer is not None and self._process == os.getpid():
            self._renewer.join()
        if self._client is not None:
            self._client.close()

    async def aclose(self) -> None:
        """End the renewals and close all connections of the running loop."""
        import asyncio

        await asyncio.to_thread(self.close)
        found = self._async_clients.pop(id(asyncio.get_running_loop()), None)
        if found is not None:
            await found[1].aclose()
