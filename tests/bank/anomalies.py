"""Find what isolated transactions cannot have done to lists.

1. Every read is looked at by itself and beside the longest read of its key, which is
   the order of the key's versions. What a transaction reads of its own is left out of
   that: it may yet be rolled back.
2. That order gives the dependencies between transactions: one wrote over the other's
   version (ww), read it (wr), or read a version that the other wrote over (rw). A cycle
   of them has no place in any order of transactions, and what it is made of says which
   promise was broken (Adya, "Weak Consistency", MIT 1999, for the names).

A transaction that reads at `Level.COMMITTED` is looked at in the first way alone.
Snapshots may disagree about the order of two transactions that have no row in common,
so cycles with several rw are searched among serial transactions only.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, pairwise

from tests.bank.history import Append, Level, Outcome, Read, Transaction

__all__ = ["Anomaly", "Kind", "find_anomalies"]


class Kind(Enum):
    """What can be wrong with a history, the plainest first."""

    GARBAGE = "a value that nobody appended"
    DUPLICATE = "a value twice in one read"
    INTERNAL = "a transaction does not see its own appends at the end"
    ABORTED_READ = "G1a: a value that was rolled back was read"
    INTERMEDIATE_READ = "G1b: a version was read that its writer appended to again"
    INCOMPATIBLE = "two reads of one key disagree about the order"
    LOST = "an append that was acknowledged is gone"
    PARTIAL = "a transaction is there in part"
    FRACTURED = "a transaction was seen under one key and not under another"
    WRITE_CYCLE = "G0: a cycle of writes"
    CIRCULAR = "G1c: a cycle of writes and reads"
    LOST_UPDATE = "two transactions appended to the version that both had read"
    SINGLE = "G-single: a cycle with one read of what was written over"
    SEVERAL = "G2: a cycle with several reads of what was written over"


@dataclass(frozen=True, slots=True)
class Anomaly:
    kind: Kind
    detail: str
    transactions: tuple[Transaction, ...]

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}"


Edges = dict[tuple[Transaction, Transaction], int]
"""Dependencies, each with a key that shows it."""


def find_anomalies(
    history: Iterable[Transaction], final: Mapping[int, Sequence[int]] | None = None
) -> list[Anomaly]:
    """Return what is wrong with *history*; nothing if isolation explains all of it.

    *final* is what each key holds after all transactions have ended. Raises ValueError
    if a value was appended by two transactions, which makes reads ambiguous.
    """
    history = list(history)
    if final is not None:
        reads = tuple(Read(key, tuple(values)) for key, values in final.items())
        end = Transaction("the end", Outcome.COMMITTED, reads, Level.COMMITTED)
        history.append(end)
    seen = _Seen(history)
    found = [*_in_reads(seen), *_between_reads(seen)]
    if final is not None:
        found += _in_the_end(seen, final)
    return [*found, *_in_cycles(seen)]


class _Seen:
    """A history with its writers and the order of each key's versions."""

    def __init__(self, history: Sequence[Transaction]) -> None:
        self.transactions = [t for t in history if t.outcome is not Outcome.ROLLED_BACK]
        self.written: dict[int, tuple[Transaction, Append]] = {}
        for transaction in history:
            for append in transaction.appends:
                if append.value in self.written:
                    raise ValueError(f"{append.value} was appended twice")
                self.written[append.value] = transaction, append
        self.orders: dict[int, tuple[int, ...]] = {}
        for transaction in self.transactions:
            for read, others in _outside(transaction):
                longest = self.orders.setdefault(read.key, ())
                if others is not None and len(others) >= len(longest):
                    self.orders[read.key] = others

    def writer(self, value: int) -> Transaction | None:
        return self.written[value][0] if value in self.written else None


def _outside(transaction: Transaction) -> Iterator[tuple[Read, tuple[int, ...] | None]]:
    """Yield each read with what it saw of others, None where its own are misplaced."""
    own: defaultdict[int, tuple[int, ...]] = defaultdict(tuple)
    for step in transaction.steps:
        if isinstance(step, Append):
            if step.kept:
                own[step.key] += (step.value,)
        else:
            mine = own[step.key]
            others = step.values[: len(step.values) - len(mine)]
            fits = others + mine == step.values
            yield step, others if fits else None


def _in_reads(seen: _Seen) -> Iterator[Anomaly]:
    for transaction in seen.transactions:
        for read, others in _outside(transaction):
            where = f"{transaction} read key {read.key}"
            if others is None:
                detail = f"{where} as {_brief(read.values)}"
                yield Anomaly(Kind.INTERNAL, detail, (transaction,))
                continue
            if len(set(read.values)) < len(read.values):
                detail = f"{where} as {_brief(read.values)}"
                yield Anomaly(Kind.DUPLICATE, detail, (transaction,))
            for value in others:
                yield from _in_value(seen, transaction, read.key, value)
            if others:
                yield from _in_version(seen, transaction, read.key, others)


def _in_value(
    seen: _Seen, reader: Transaction, key: int, value: int
) -> Iterator[Anomaly]:
    writer, append = seen.written.get(value, (None, None))
    if writer is None or append is None or append.key != key:
        detail = f"{reader} read {value} under key {key}"
        yield Anomaly(Kind.GARBAGE, detail, (reader,))
    elif writer.outcome is Outcome.ROLLED_BACK or not append.kept:
        detail = f"{reader} read {value} of {writer} under key {key}"
        yield Anomaly(Kind.ABORTED_READ, detail, (reader, writer))


def _in_version(
    seen: _Seen, reader: Transaction, key: int, values: tuple[int, ...]
) -> Iterator[Anomaly]:
    writer = seen.writer(values[-1])
    if writer is None or writer is reader:
        return
    *_, last = [a.value for a in writer.appends if a.key == key and a.kept] or [None]
    if last is not None and last != values[-1]:
        detail = f"{reader} read key {key} up to {values[-1]} of {writer}, not {last}"
        yield Anomaly(Kind.INTERMEDIATE_READ, detail, (reader, writer))


def _between_reads(seen: _Seen) -> Iterator[Anomaly]:
    for reader in seen.transactions:
        whole = reader.level is not Level.COMMITTED
        visible: dict[Transaction, int] = {}
        for read, others in _outside(reader):
            order = seen.orders[read.key]
            if others is not None and others != order[: len(others)]:
                detail = (
                    f"key {read.key} was {_brief(others)} to {reader}, and"
                    f" {_brief(order)} to another"
                )
                yield Anomaly(Kind.INCOMPATIBLE, detail, (reader,))
            for writer in {seen.writer(v) for v in read.values} - {None, reader}:
                assert writer is not None
                visible[writer] = read.key
        if whole:
            yield from _fractured(reader, visible)


def _fractured(
    reader: Transaction, visible: Mapping[Transaction, int]
) -> Iterator[Anomaly]:
    read = {read.key: set(read.values) for read in reader.reads}
    for writer, elsewhere in visible.items():
        missing = [
            a
            for a in writer.appends
            if a.kept and a.key in read and a.value not in read[a.key]
        ]
        if missing:
            detail = (
                f"{reader} saw {writer} under key {elsewhere}, but not its"
                f" {missing[0].value} under key {missing[0].key}"
            )
            yield Anomaly(Kind.FRACTURED, detail, (reader, writer))


def _in_the_end(seen: _Seen, final: Mapping[int, Sequence[int]]) -> Iterator[Anomaly]:
    held = defaultdict(set, {key: set(values) for key, values in final.items()})
    for transaction in seen.transactions:
        kept = [a for a in transaction.appends if a.kept]
        missing = [a.value for a in kept if a.value not in held[a.key]]
        if not missing:
            continue
        if len(missing) < len(kept):
            detail = f"{missing} of {transaction} are not there, its others are"
            yield Anomaly(Kind.PARTIAL, detail, (transaction,))
        elif transaction.outcome is Outcome.COMMITTED:
            detail = f"{missing} of {transaction}"
            yield Anomaly(Kind.LOST, detail, (transaction,))


# -- cycles ----------------------------------------------------------------------------


def _in_cycles(seen: _Seen) -> Iterator[Anomaly]:
    ww, wr, rw = _dependencies(seen)
    serial = {e: k for e, k in rw.items() if e[0].level is Level.SERIAL}
    reported: set[frozenset[Transaction]] = set()
    for kind, through, over in (
        (Kind.WRITE_CYCLE, ww, ww),
        (Kind.CIRCULAR, wr, ww | wr),
        (Kind.SINGLE, rw, ww | wr),
        (Kind.SEVERAL, serial, ww | wr | serial),
    ):
        for cycle in _cycles(through, over):
            if frozenset(cycle) in reported:
                continue
            reported.add(frozenset(cycle))
            first, second = cycle[:2]
            updates = len(cycle) == 3 and ww.get((second, first)) == rw.get(
                (first, second), None
            )
            found = Kind.LOST_UPDATE if kind is Kind.SINGLE and updates else kind
            steps = [
                next(
                    f" -{name} on {edges[edge]}-> {edge[1]}"
                    for name, edges in (("ww", ww), ("wr", wr), ("rw", rw))
                    if edge in edges
                )
                for edge in pairwise(cycle)
            ]
            yield Anomaly(found, f"{first}{''.join(steps)}", tuple(cycle[:-1]))


def _dependencies(seen: _Seen) -> tuple[Edges, Edges, Edges]:
    ww: Edges = {}
    wr: Edges = {}
    rw: Edges = {}
    for key, order in seen.orders.items():
        for one, other in pairwise(seen.writer(value) for value in order):
            if one is not None and other is not None and one is not other:
                ww[one, other] = key
    for reader in seen.transactions:
        if reader.level is Level.COMMITTED:
            continue
        for read, others in _outside(reader):
            order = seen.orders[read.key]
            if others is None or others != order[: len(others)]:
                continue
            before = seen.writer(others[-1]) if others else None
            if before is not None and before is not reader:
                wr[before, reader] = read.key
            after = seen.writer(order[len(others)]) if order[len(others) :] else None
            if after is not None and after is not reader and after is not before:
                rw[reader, after] = read.key
    return ww, wr, rw


def _cycles(through: Edges, over: Edges) -> Iterator[list[Transaction]]:
    """Yield a shortest cycle for each edge of *through* that *over* leads back from."""
    following: defaultdict[Transaction, list[Transaction]] = defaultdict(list)
    core = _core({*through, *over})
    for one, other in over:
        if one in core and other in core:
            following[one].append(other)
    for one, other in through:
        if one in core and other in core:
            back = _path(following, other, one)
            if back is not None:
                yield [one, *back]


def _core(edges: Iterable[tuple[Transaction, Transaction]]) -> set[Transaction]:
    """Return what is left when those that nothing leads to, or from, are taken away."""
    after: defaultdict[Transaction, set[Transaction]] = defaultdict(set)
    before: defaultdict[Transaction, set[Transaction]] = defaultdict(set)
    for one, other in edges:
        after[one].add(other)
        before[other].add(one)
    left = {*after, *before}
    ends = [t for t in left if not after[t] or not before[t]]
    while ends:
        end = ends.pop()
        if end not in left:
            continue
        left.remove(end)
        for there in after.pop(end):
            before[there].discard(end)
            if not before[there]:
                ends.append(there)
        for there in before.pop(end):
            after[there].discard(end)
            if not after[there]:
                ends.append(there)
    return left


def _path(
    following: Mapping[Transaction, Sequence[Transaction]],
    start: Transaction,
    end: Transaction,
) -> list[Transaction] | None:
    came_from: dict[Transaction, Transaction | None] = {start: None}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        if here is end:
            path = [here]
            while (previous := came_from[path[-1]]) is not None:
                path.append(previous)
            return path[::-1]
        for there in following.get(here, ()):
            if there not in came_from:
                came_from[there] = here
                queue.append(there)
    return None


def _brief(values: Sequence[int]) -> str:
    if len(values) <= 8:
        return str(list(values))
    shown = chain(values[:3], ["…"], values[-4:])
    return f"[{', '.join(map(str, shown))}] ({len(values)})"
