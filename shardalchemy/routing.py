"""From a statement and its parameters to the shards that run it.

`destination` is asked for every statement of a session. In order: an option that names
the shard; the statement's analysis, remembered by its cache key; the slots of the
parameters' values; the owners of those slots in the topology.
"""

from __future__ import annotations

import dataclasses
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
    from shardalchemy.planner import Analysis, OwnKeys
    from shardalchemy.planner.slots import SlotSet
    from shardalchemy.planner.split import Split
    from shardalchemy.schema import Pin
    from shardalchemy.session import ShardedSession

__all__ = [
    "Destination",
    "autoflush",
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
    the shard key of an INSERT filled in. ``split`` is there where the shards run pieces
    of the statement; ``shards`` then has only that of the final one, and ``pieces`` the
    shards of each piece, by its name. ``own`` has the lists of keys of which each shard
    is sent its own: by their place in the cache key, the name in the SQL and the values
    by shard. ``pinned`` says that the statement's keys decide on which shards it runs.
    """

    shards: Sequence[str | None]
    analysis: Analysis | None
    params: Any
    split: Split | None = None
    pieces: Mapping[str, Sequence[str]] = EMPTY_DICT
    own: OwnKeys = EMPTY_DICT
    pinned: bool = True

    def params_for(self, shard: str) -> Any:
        """Return the statement's parameters, with no keys but those *shard* owns."""
        if not self.own:
            return self.params
        own = {name: keys.get(shard, []) for name, keys in self.own.values()}
        return {**(self.params or EMPTY_DICT), **own}


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
    if slots is not None and len(slots) == 1 and not analysis.at_home:
        (slot,) = slots
        return Destination((topology.owners[slot],), analysis, params)
    shards = owners_of(topology, slots) or (shard_at_hand(session, topology),)
    needs_more = len(shards) > 1 and analysis.scatter_problem is not None
    if needs_more or (analysis.at_home and shards != (topology.home,)):
        if analysis.pieces is not None:
            split = analysis.pieces.split()
            values = extracted or ()
            needed = {
                piece.name: _slots_in(statement, analysis, piece.slots, values, params)
                for piece in split.pieces
            }
            pieces = {name: owners_of(topology, some) for name, some in needed.items()}
            pinned = None not in needed.values()
            working = [shard for some in pieces.values() for shard in some]
            final = topology.home if split.at_home else (working or shards)[0]
            own = _own_keys(statement, analysis, values, params, topology)
            return Destination((final,), analysis, params, split, pieces, own, pinned)
        raise not_on_several(str(analysis.scatter_problem), shards)
    if len(shards) > 1 and analysis.lists and not analysis.writes:
        own = _own_keys(statement, analysis, extracted or (), params, topology)
        return Destination(shards, analysis, params, own=own, pinned=slots is not None)
    return Destination(shards, analysis, params, pinned=slots is not None)


def autoflush(session: ShardedSession, options: Mapping[str, Any]) -> None:
    """Flush as SQLAlchemy does before a SELECT with these options."""
    load = options.get("_sa_orm_load_options")
    if options.get("autoflush", True) and (load is None or load._autoflush):
        session._autoflush()


def not_on_several(problem: str, shards: Iterable[str | None]) -> UnsupportedQueryError:
    """Return the error of a statement that is not exact on *shards* together."""
    return UnsupportedQueryError(
        f"{problem} cannot be run on several shards ({', '.join(map(str, shards))})."
        " Pin every sharded table to one key (… == value on its shard key or a"
        " locator), or send the statement to one shard with"
        " execution_options(shard_key=…) or execution_options(shard='…')."
    )


def _own_keys(
    statement: Any,
    analysis: Analysis,
    extracted: Sequence[Any],
    params: Any,
    topology: Topology,
) -> OwnKeys:
    """Return the statement's lists of keys, divided by the shards that own them."""
    if not analysis.lists or isinstance(params, list | tuple):
        return {}
    own = getattr(statement, "_params", None) or EMPTY_DICT
    given = {**own, **(params or EMPTY_DICT)}
    return analysis.own_keys(extracted, given, topology.owners)


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


def _slots_in(
    statement: Any,
    analysis: Analysis,
    slots: SlotSet | None,
    extracted: Sequence[Any],
    params: Any,
) -> set[int] | None:
    """Return those of *slots* that an execution needs, or None for all."""
    alone = dataclasses.replace(analysis, slots=(slots,), only_slots=slots)
    return slots_of(statement, alone, extracted, params)


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
    if slots is None:
        return topology.owning
    owners = topology.owners
    needed = {owners[slot] for slot in slots}
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
