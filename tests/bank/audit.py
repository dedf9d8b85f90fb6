"""Compare what the servers hold with what the clients were told."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.bank.anomalies import find_anomalies
from tests.bank.history import Append, Level, Outcome, Read, Step, Transaction
from tests.bank.journal import Entry, Sums
from tests.bank.model import ACCOUNTS, OPENING
from tests.conftest import Servers

__all__ = ["Books", "Finding", "audit"]

TOTAL = OPENING * len(ACCOUNTS)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that cannot be, and the transactions that it is about."""

    what: str
    entries: tuple[Entry, ...] = ()


@dataclass(slots=True)
class Books:
    """What the servers hold, read past the library."""

    balances: dict[int, int] = field(default_factory=dict)
    transfers: dict[int, dict[int, int]] = field(default_factory=dict)
    """By id, the accounts with what each got."""
    lists: dict[int, list[int]] = field(default_factory=dict)
    misplaced: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, servers: Servers) -> Books:
        books = cls()
        for shard in servers:
            for number, balance in servers.rows(shard, "TABLE accounts"):
                if number in books.balances:
                    books.misplaced.append(f"account {number} is on two shards")
                books.balances[number] = balance
            for account, id, amount in servers.rows(
                shard, "SELECT account, id, amount FROM transfers"
            ):
                books.transfers.setdefault(id, {})[account] = amount
            books.lists.update(servers.rows(shard, "SELECT key, items FROM lists"))
            for key, items in servers.rows(shard, "SELECT key, items FROM notices"):
                copy = books.lists.setdefault(key, items)
                if copy != items:
                    books.misplaced.append(
                        f"notice {key} is {items} on {shard}, {copy} on another"
                    )
        return books


def audit(
    books: Books, entries: Sequence[Entry], snapshots: Sequence[Sums]
) -> list[Finding]:
    """Return what is wrong; nothing, if every client was told the truth."""
    by_id = {entry.plan.id: entry for entry in entries}
    return [
        *(Finding(what) for what in books.misplaced),
        *_in_balances(books),
        *_in_transfers(books.transfers, by_id),
        *_in_snapshots(snapshots),
        *_in_time(entries, snapshots),
        *_in_lists(books.lists, entries, snapshots),
    ]


def _in_balances(books: Books) -> Iterator[Finding]:
    total = sum(books.balances.values())
    if total != TOTAL:
        yield Finding(f"the total is {total}, not {TOTAL}")
    moved: Counter[int] = Counter()
    for parts in books.transfers.values():
        moved.update(parts)
    for number in ACCOUNTS:
        balance, due = books.balances.get(number), OPENING + moved[number]
        if balance != due:
            yield Finding(
                f"account {number} has {balance}; its transfers leave it {due}"
            )


def _in_transfers(
    transfers: Mapping[int, Mapping[int, int]], by_id: Mapping[int, Entry]
) -> Iterator[Finding]:
    for id in transfers:
        if id not in by_id:
            undone = (by_id[-id],) if -id in by_id else ()
            yield Finding(f"nobody has made transfer {id}", undone)
    for entry in by_id.values():
        plan = entry.plan
        if plan.kind != "transfer":
            continue
        there = transfers.get(plan.id, {})
        if there and there != dict(plan.parts):
            yield Finding(f"transfer {plan.id} is there in part: {there}", (entry,))
        elif there and entry.outcome is Outcome.ROLLED_BACK:
            yield Finding(f"transfer {plan.id} was rolled back, and is there", (entry,))
        elif not there and entry.outcome is Outcome.COMMITTED:
            yield Finding(f"transfer {plan.id} was committed, and is gone", (entry,))


def _in_snapshots(snapshots: Iterable[Sums]) -> Iterator[Finding]:
    for seen in snapshots:
        if (seen.total, seen.accounts) != (TOTAL, len(ACCOUNTS)):
            yield Finding(
                f"a snapshot of {seen.client} at {seen.began} has {seen.total} in"
                f" {seen.accounts} accounts, not {TOTAL} in {len(ACCOUNTS)}"
            )


def _in_time(entries: Sequence[Entry], snapshots: Iterable[Sums]) -> Iterator[Finding]:
    """Yield reads without what had been told to be committed before they began.

    Of what was acknowledged when it was prepared, that holds where its locks are waited
    for, or all that is being committed: in locking reads, and in strict snapshots.
    """
    told: defaultdict[int, list[tuple[int, Entry]]] = defaultdict(list)
    for entry in entries:
        if entry.outcome is Outcome.COMMITTED:
            for key, value in entry.plan.appends:
                told[key].append((value, entry))
    looks = [
        (f"{e.client}:{e.plan.id}", e.began, e.plan.kind == "lists", e.reads)
        for e in entries
        if e.outcome is not Outcome.ROLLED_BACK
    ]
    looks += [
        (f"a snapshot of {s.client}, strict: {s.strict},", s.began, s.strict, s.reads)
        for s in snapshots
    ]
    for who, began, waits, reads in looks:
        for key, values in reads:
            for value, entry in told[key]:
                if (
                    entry.ended is not None
                    and entry.ended < began
                    and (waits or entry.plan.ack == "committed")
                    and value not in values
                ):
                    yield Finding(
                        f"{who} began at {began:.3f} and does not see {value} under key"
                        f" {key}, whose commit returned at {entry.ended:.3f}",
                        (entry,),
                    )


def _in_lists(
    lists: Mapping[int, Sequence[int]],
    entries: Iterable[Entry],
    snapshots: Iterable[Sums],
) -> Iterator[Finding]:
    known: dict[Transaction, Entry] = {}
    history: list[Transaction] = []
    for entry in entries:
        if entry.plan.kind != "transfer":
            transaction = _transaction(entry)
            known[transaction] = entry
            history.append(transaction)
    for number, seen in enumerate(snapshots):
        reads = tuple(Read(key, values) for key, values in seen.reads)
        name = f"snapshot {number} of {seen.client}"
        level = Level.SERIAL if seen.strict else Level.SNAPSHOT
        history.append(Transaction(name, Outcome.COMMITTED, reads, level))
    for anomaly in find_anomalies(history, lists):
        about = (known[t] for t in anomaly.transactions if t in known)
        yield Finding(str(anomaly), tuple(about))


def _transaction(entry: Entry) -> Transaction:
    plan = entry.plan
    steps: list[Step] = [Read(key, values) for key, values in entry.reads]
    steps += (Append(key, value) for key, value in plan.appends)
    if plan.undone is not None:
        steps.append(Append(*plan.undone, kept=False))
    level = Level.COMMITTED if plan.kind == "look" else Level.SERIAL
    return Transaction(f"{entry.client}:{plan.id}", entry.outcome, tuple(steps), level)
