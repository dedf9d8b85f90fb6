"""The shards of a running cluster, from the URL of any of them.

The catalog there names all shards with host, port and database; user, password and
options are those of the URL that was given. What a URL leads to must say itself which
shard it is: a host name that means another server here than where the catalog was made
must not have its transactions recovered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, make_url, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import NullPool

from shardalchemy.catalog import read_state
from shardalchemy.errors import ShardAlchemyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import URL, Connection, Engine

    from shardalchemy.catalog import ShardState, Topology

__all__ = ["NoCluster", "Shards", "reached"]

_CONNECT_TIMEOUT = 5  # seconds
_WHICH = text("SELECT cluster::text, shard FROM shardalchemy.catalog")


class NoCluster(Exception):
    """No cluster was found where one was said to be; the message is one line."""


@dataclass(frozen=True)
class Shards:
    """A cluster's topology, and a way to each of its shards."""

    topology: Topology
    engines: Mapping[str, Engine]

    def connect(self, shard: str) -> Connection:
        """Open a connection to *shard*, and see to it that it is that one.

        Raises NoCluster where it is another.
        """
        connection = self.engines[shard].connect()
        try:
            found = connection.execute(_WHICH).one_or_none()
            if found is None or tuple(found) != (self.topology.cluster, shard):
                raise NoCluster(_another(shard, self.engines[shard].url))
            connection.rollback()
        except sa_exc.ProgrammingError:
            connection.close()
            raise NoCluster(_another(shard, self.engines[shard].url)) from None
        except BaseException:
            connection.close()
            raise
        return connection


def reached(url: str, overrides: Sequence[str] = ()) -> Shards:
    """Return the shards of the cluster that *url* is a part of.

    *overrides* are further URLs, as ``name=URL``, for shards that are reached otherwise
    than the catalog says. Raises NoCluster where no shard can be asked, or where one is
    not what it is said to be; a server that is down only is none of these.
    """
    given = _parsed(url, "the URL")
    named = dict(_override(override) for override in overrides)
    state = _state_of(given, _address(given))
    topology, here = state.topology, state.shard
    if topology is None or here is None:
        raise NoCluster(
            f"the database at {_address(given)} has no shardalchemy catalog. Name one"
            " that cluster.create_all() was run on."
        )
    if state.is_outdated:
        raise NoCluster(
            f"the catalog at {_address(given)} is of an older version of shardalchemy."
            " Call cluster.create_all(metadata) once, which brings it up to date."
        )
    unknown = [name for name in named if name not in topology.addresses]
    if unknown:
        raise NoCluster(
            f"--shard {unknown[0]}=…: the cluster has no such shard; it has"
            f" {', '.join(topology.shards)}."
        )
    urls = {
        name: named.get(name)
        or (given if name == here else _there(given, topology, name))
        for name in topology.shards
    }
    shards = Shards(topology, {name: _engine(u) for name, u in urls.items()})
    newest = topology
    for name in topology.shards:
        try:
            with shards.connect(name) as connection:
                found = read_state(connection).topology
        except sa_exc.OperationalError:
            continue  # it is down, which the listing will say
        if found is not None and found.epoch > newest.epoch:
            newest = found
    if newest.shards != topology.shards:
        there = newest.home
        raise NoCluster(
            f"the database at {_address(given)} does not know all shards yet. Name"
            f" another one, such as that of shard {there}."
        )
    return Shards(newest, shards.engines)


def _override(text: str) -> tuple[str, URL]:
    name, is_given, url = text.partition("=")
    if not is_given or not name.isidentifier():
        raise NoCluster("--shard is to be given as name=URL, once for each shard.")
    return name, _parsed(url, f"the URL of --shard {name}")


def _parsed(url: str, what: str) -> URL:
    """Return *url*; no message repeats any of it, for it may hold a password."""
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except (sa_exc.ArgumentError, ValueError):
        raise NoCluster(
            f"{what} is none; write postgresql://user:password@host:port/database."
        ) from None
    if parsed.get_backend_name() != "postgresql":
        raise NoCluster(f"{what} is not one of PostgreSQL; write postgresql://…")
    if "@" in (parsed.host or ""):
        raise NoCluster(f"{what} has more than one @; in a password write it as %40.")
    return parsed.set(drivername="postgresql+psycopg")


def _there(given: URL, topology: Topology, shard: str) -> URL:
    address = topology.addresses[shard]
    url = given.difference_update_query(["host", "hostaddr", "port"])
    return url.set(host=address.host, port=address.port, database=address.database)


def _engine(url: URL) -> Engine:
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": 5}
    return create_engine(url, poolclass=NullPool, connect_args=timeout)


def _state_of(url: URL, address: str) -> ShardState:
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            return read_state(connection)
    except sa_exc.DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise NoCluster(
            f"no answer from {address}: {reason}. Any other shard's URL does as well."
        ) from None
    except ShardAlchemyError as error:
        raise NoCluster(str(error)) from None


def _another(shard: str, url: URL) -> str:
    return (
        f"the database at {_address(url)} is not shard {shard} of this cluster. Say"
        f" where that is with --shard {shard}=URL."
    )


def _address(url: URL) -> str:
    """Return where *url* leads to, without who asks."""
    host = url.host or url.query.get("host") or "the local socket"
    port = "" if url.port is None else f":{url.port}"
    return f"{host}{port}/{url.database or ''}"
