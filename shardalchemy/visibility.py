"""Read your writes where a commit returns before every shard shows it.

With ``ack="prepared"`` a transaction is decided before it is visible. The session that
made it, and any that is given its commit token, waits at its first use of each shard
until what is meant is visible there. A token is the names of transactions: it holds no
secret, and a wrong one can only make a session look for something that is not there.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from sqlalchemy import exc as sa_exc
from sqlalchemy.util import await_only

from shardalchemy.commit import Gid
from shardalchemy.engine.wire import simple_rows
from shardalchemy.errors import ConfigurationError

if TYPE_CHECKING:
    from shardalchemy.catalog import Topology
    from shardalchemy.cluster import Cluster
    from shardalchemy.engine import Bindings

__all__ = ["Unseen"]

_SEPARATOR = ","
_PATIENCE = 30.0  # seconds
_TRUSTED = 0.5  # seconds for which another is left to finish a transaction
_PAUSE = 0.005

# A gid holds only [0-9a-f:/], so it stands in this literal as it is.
_PREPARED = """
    SELECT gid FROM pg_prepared_xacts
    WHERE database = current_database() AND gid = ANY ('{{{branches}}}')
"""


class Unseen:
    """The transactions that a session must see, and some shard may not show yet."""

    def __init__(self, after: str | None) -> None:
        self._made: dict[Gid, Future[None] | None] = {}
        self._on: dict[str, set[Gid]] | None = {}
        if after:
            for name in after.split(_SEPARATOR):
                gid = Gid.parse(name)
                if gid is None:
                    raise ConfigurationError(
                        f"after={after!r} is no commit token; it is what"
                        " session.commit_token was in another session."
                    )
                self._made[gid] = None
            self._on = None

    def __bool__(self) -> bool:
        return bool(self._made)

    @property
    def token(self) -> str | None:
        """The names of these transactions, or None if every shard shows all of them."""
        self._made = {
            gid: done
            for gid, done in self._made.items()
            if done is None or not done.done() or done.exception() is not None
        }
        return _SEPARATOR.join(map(str, self._made)) or None

    def add(self, gid: Gid, done: Future[None], topology: Topology) -> None:
        """Note a commit of the session's own, ``done`` when every shard has it."""
        on = self._by_shard(topology)
        self._made[gid] = done
        _note(on, gid, topology)

    def wait(self, shard: str, engines: Bindings, cluster: Cluster) -> None:
        """Wait until *shard* shows what it should; then never again for the same.

        Raises sqlalchemy.exc.TimeoutError after 30 seconds.
        """
        gids = self._by_shard(cluster._topology_for(engines)).pop(shard, set())
        left = {gid for gid in gids if not self._is_done(gid, engines.is_async)}
        until = time.monotonic() + _PATIENCE
        trusted_until = time.monotonic() + _TRUSTED
        while left := self._still_prepared(shard, left, engines, cluster):
            now = time.monotonic()
            if now > until:
                self._by_shard(cluster._topology_for(engines))[shard] = left
                raise sa_exc.TimeoutError(
                    f"shard {shard} does not show transaction"
                    f" {', '.join(map(str, left))} yet, which this session must see:"
                    f" waited {_PATIENCE:.0f} s for the shards that took part"
                )
            if now < trusted_until:
                _sleep(_PAUSE, engines.is_async)
                continue
            for gid in left:
                resolve = cluster._transactions.recovery.resolve
                if engines.is_async:
                    await_only(asyncio.to_thread(resolve, gid))
                else:
                    resolve(gid)
        self._forget(gids)

    def _by_shard(self, topology: Topology) -> dict[str, set[Gid]]:
        if self._on is None:
            self._on = {}
            for gid in self._made:
                if gid.cluster != topology.cluster[:8]:
                    raise ConfigurationError(
                        f"the commit token {gid} is of another cluster."
                    )
                _note(self._on, gid, topology)
        return self._on

    def _is_done(self, gid: Gid, is_async: bool) -> bool:
        """Return whether a commit of this session's own is, waiting a little."""
        done = self._made.get(gid)
        if done is None:
            return False
        if not done.done():
            if is_async:
                await_only(asyncio.to_thread(wait, [done], timeout=_TRUSTED))
            else:
                wait([done], timeout=_TRUSTED)
        return done.done() and done.exception() is None

    def _still_prepared(
        self, shard: str, gids: set[Gid], engines: Bindings, cluster: Cluster
    ) -> set[Gid]:
        if not gids:
            return gids
        number = cluster._topology_for(engines).addresses[shard].number
        sql = _PREPARED.format(branches=",".join(gid.on(number) for gid in gids))
        with engines.connect(shard) as connection:
            return set(Gid.parse_all(simple_rows(connection, sql)))

    def _forget(self, gids: set[Gid]) -> None:
        """Let go of transactions that every shard shows by now."""
        waited_for = set().union(*(self._on or {}).values())
        for gid in gids - waited_for:
            self._made.pop(gid, None)


def _note(on: dict[str, set[Gid]], gid: Gid, topology: Topology) -> None:
    names = {a.number: name for name, a in topology.addresses.items()}
    for number in gid.numbers:
        if number in names:
            on.setdefault(names[number], set()).add(gid)


def _sleep(seconds: float, is_async: bool) -> None:
    if is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)
