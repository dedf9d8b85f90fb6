"""From a statement and its parameters to the shards that run it.

`destination` is asked for every statement of a session. In order: an option that names
the shard; the statement's analysis, remembered by its cache key; the slots of the
parameters' values; the owners of those slots in the topology.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Delete, Insert, Table, Update
from sqlalchemy.util import EMPTY_DICT

from shardalchemy.errors import ShardKeyError, UnsupportedQueryError
from shardalchemy.inserts import completed_insert
from shardalchemy.ring import KEY_TYPES
from shardalchemy.rows import row_placement
from shardalchemy.schema import Kind, placement_of
from shardalchemy.selected import inserts_elsewhere

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import Mapper

    from shardalchemy.catalog import Topology
    from shardalchemy.planner import Analysis
    from shardalchemy.schema import Pin
    from shardalchemy.session import ShardedSession

__all__ = [
    "Destination",
    "check_not_a_copy",
    "destination",
    "home_first",
    "named_shard",
    "not_on_several",
    "owners_of",
    "shard_at_hand",
    "shard_of_identity",
    "slots_of",
]


class Destination(NamedTuple):
    """Where a statement runs.

    ``shards`` holds the names, or one None: the home shard by SQLAlchemy's own rules.
    ``analysis`` is None where an option decided. ``params`` are the statement's, with
    the shard key of an INSERT filled in.
    """

    shards: Sequence[str | None]
    analysis: Analysis | None
    params: Any


def destination(
    session: ShardedSession, statement: Any, params: Any, options: Mapping[str, Any]
) -> Destination:
    """Return where *statement* runs with these parameters.

    Raises UnsupportedQueryError where it would have to run on several shards and
    cannot, and ShardKeyError for an INSERT without a usable shard key.
    """
    named = named_shard(session, statement, options)
    if named is not None:
        check_not_a_copy(statement)
        return Destination((named,), None, params)
    if isinstance(statement, Insert) and inserts_elsewhere(statement):
        # Where it reads; rows that do not stay there are sent on to their shards.
        return destination(session, statement.select, params, options)
    topology = session._topology()
    analysis, extracted = session._cluster._analyser.analyse(statement)
    if analysis.kind is Kind.HOME:
        return Destination((None,), analysis, params)
    if analysis.kind is Kind.REFERENCE:
        if analysis.writes:
            return Destination(home_first(topology), analysis, params)
        shard = (
            topology.home if analysis.locks_copies else shard_at_hand(session, topology)
        )
        return Destination((shard,), analysis, params)
    slots: set[int] | None
    if isinstance(statement, Insert):
        rows = completed_insert(session, statement, analysis, params, options)
        params, slots = rows.params, set(rows.slots)
    else:
        # A parameter that stands for a pending object's key needs it flushed.
        if extracted is None or any(p.callable is not None for p in extracted):
            session._autoflush()
        slots = slots_of(statement, analysis, extracted or (), params)
    if slots is not None and len(slots) == 1:
        (slot,) = slots
        return Destination((topology.owners[slot],), analysis, params)
    shards = owners_of(topology, slots) or (shard_at_hand(session, topology),)
    if len(shards) > 1 and analysis.scatter_problem is not None:
        raise not_on_several(analysis.scatter_problem, shards)
    return Destination(shards, analysis, params)


def not_on_several(problem: str, shards: Iterable[str | None]) -> UnsupportedQueryError:
    """Return the error of a statement that is not exact on *shards* together."""
    return UnsupportedQueryError(
        f"{problem} cannot be run on several shards ({', '.join(map(str, shards))})."
        " Pin every sharded table to one key (… == value on its shard key or a"
        " locator), or send the statement to one shard with"
        " execution_options(shard_key=…) or execution_options(shard=…)."
    )


def named_shard(
    session: ShardedSession, statement: Any, options: Mapping[str, Any]
) -> str | None:
    """Return the shard that options name, by its name or by a key."""
    load = options.get("_sa_orm_load_options")
    if load is not None and load._identity_token is not None:
        token: str = load._identity_token
        return token if token in session._engines.shards else None
    own = getattr(statement, "_execution_options", EMPTY_DICT)
    if not options and not own:
        return None
    shard: str | None = options.get("shard", own.get("shard"))
    if shard is not None:
        session._engines.of(shard)
        return shard
    key = options.get("shard_key", own.get("shard_key"))
    if key is None:
        return None
    topology = session._topology()
    pins = session._cluster._analyser.key_pins(statement)
    return topology.owner(_slot_of_key(key, pins))


def _slot_of_key(key: object, pins: Sequence[Pin]) -> int:
    """Return the slot of a shard key given as an option.

    It is hashed as the statement's tables hash theirs; for plain SQL by its Python
    type: an int as bigint, a str as text, a UUID, bytes and a date as what they are.
    """
    hashes = [pin.slot for pin in pins] or [k.slot for k in KEY_TYPES.values()]
    slots = [slot for slot in (hash_(key) for hash_ in hashes) if slot is not None]
    if not slots or (pins and len(set(slots)) > 1):
        accepts = {pin.accepts for pin in pins} or {
            "an int, a str, a UUID, bytes",
            "a date",
        }
        raise ShardKeyError(
            f"shard_key={key!r} does not name one shard for this statement; it must be"
            f" {' or '.join(sorted(accepts))}."
        )
    return slots[0]


def check_not_a_copy(statement: Any) -> None:
    """Refuse to write one copy of a reference table, whatever an option says."""
    if isinstance(statement, Insert | Update | Delete):
        table = statement.table
        if isinstance(table, Table) and placement_of(table).kind is Kind.REFERENCE:
            raise UnsupportedQueryError(
                f"{table} is a reference table: a write on one shard would make its"
                " copies differ. Leave out shard= and shard_key=."
            )


def slots_of(
    statement: Any, analysis: Analysis, extracted: Sequence[Any], params: Any
) -> set[int] | None:
    """Return the slots that an execution needs, or None for all."""
    sets: Sequence[Mapping[str, Any]]
    sets = params if isinstance(params, list | tuple) else (params or EMPTY_DICT,)
    # SQLAlchemy 2.1 keeps what params() was given apart from the parameters.
    own = getattr(statement, "_params", None) or EMPTY_DICT
    found: set[int] = set()
    for given in sets or (EMPTY_DICT,):
        values = {**own, **given} if own else given
        some = analysis.needed_slots(extracted, values)
        if some is None:
            return None
        found |= some
    return found


def owners_of(topology: Topology, slots: set[int] | None) -> tuple[str, ...]:
    """Return the shards that own any of *slots*, in the topology's order."""
    owners = topology.owners
    needed = set(owners) if slots is None else {owners[slot] for slot in slots}
    return tuple(shard for shard in topology.shards if shard in needed)


def shard_at_hand(session: ShardedSession, topology: Topology) -> str:
    """Return a shard that the transaction already uses, or else the home shard."""
    transaction = session._transaction
    if transaction is not None:
        for bind in transaction._connections:
            name = session._names.get(bind.engine)
            if name is not None:
                return name
    return topology.home


def home_first(topology: Topology) -> tuple[str, ...]:
    """Return all shards, in the order in which reference tables are written.

    Writers of one row meet on the home shard, so that they cannot deadlock elsewhere.
    """
    return (topology.home, *(s for s in topology.shards if s != topology.home))


def shard_of_identity(topology: Topology, mapper: Mapper[Any], ident: Any) -> str:
    """Return the shard of the row with a primary key as ``Session.get`` takes it."""
    rows = row_placement(mapper)
    if rows.kind is not Kind.SHARDED:
        return topology.home
    assert rows.identity_pin is not None
    if isinstance(ident, Mapping):
        column = mapper.primary_key[rows.identity_index]
        value = ident[mapper.get_property_by_column(column).key]
    elif isinstance(ident, tuple | list):
        value = ident[rows.identity_index]
    else:
        value = ident
    slot = rows.identity_pin.slot(value)
    if slot is None:
        raise ShardKeyError(
            f"{value!r} is no key of {rows.name}; it must be"
            f" {rows.identity_pin.accepts}."
        )
    return topology.owners[slot]
