"""The comparison of books and journals, on small ones that are right and wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bank.audit import TOTAL, Books, audit
from tests.bank.history import Outcome
from tests.bank.journal import Entry, Journal, Sums, read_journals
from tests.bank.model import ACCOUNTS, OPENING, keys_of
from tests.bank.plans import Choices, Plan

TRANSFER = Plan(7, "transfer", parts=((1, -5), (2, 5)), undone=(3, 9))
APPEND = Plan(8, "lists", appends=((1, 80), (2, 81)), reads=(1,))


def entry(plan: Plan, outcome: Outcome = Outcome.COMMITTED) -> Entry:
    return Entry("c1.1", plan, began=0.0, outcome=outcome)


def books(*plans: Plan) -> Books:
    """Return the books after these plans were carried out whole."""
    made = Books(dict.fromkeys(ACCOUNTS, OPENING), lists={1: [], 2: []})
    for plan in plans:
        for account, amount in plan.parts:
            made.balances[account] += amount
            made.transfers.setdefault(plan.id, {})[account] = amount
        for key, value in plan.appends:
            made.lists[key].append(value)
    return made


def said(made: Books, *entries: Entry, snapshots: tuple[Sums, ...] = ()) -> list[str]:
    return [finding.what for finding in audit(made, entries, snapshots)]


def test_books_are_right_where_everyone_was_told_the_truth() -> None:
    for outcome in (Outcome.COMMITTED, Outcome.UNKNOWN):
        told = [entry(plan, outcome) for plan in (TRANSFER, APPEND)]
        assert said(books(TRANSFER, APPEND), *told) == []
    for outcome in (Outcome.ROLLED_BACK, Outcome.UNKNOWN):
        told = [entry(plan, outcome) for plan in (TRANSFER, APPEND)]
        assert said(books(), *told) == []


@pytest.mark.parametrize("outcome", Outcome)
def test_a_transfer_on_one_shard_of_two(outcome: Outcome) -> None:
    made = books(TRANSFER)
    del made.transfers[7][2]
    made.balances[2] -= 5
    found = said(made, entry(TRANSFER, outcome))
    assert found == [
        f"the total is {TOTAL - 5}, not {TOTAL}",
        "transfer 7 is there in part: {1: -5}",
    ]


def test_a_transfer_whose_client_was_told_something_else() -> None:
    (found,) = said(books(), entry(TRANSFER))
    assert found == "transfer 7 was committed, and is gone"
    (found,) = said(books(TRANSFER), entry(TRANSFER, Outcome.ROLLED_BACK))
    assert found == "transfer 7 was rolled back, and is there"


def test_a_balance_without_its_transfer() -> None:
    made = books()
    made.balances[1] -= 5
    made.balances[2] += 5
    assert len(said(made)) == 2


def test_what_a_savepoint_has_undone_and_is_there() -> None:
    made = books(TRANSFER)
    made.transfers[-7] = {3: 9}
    assert "nobody has made transfer -7" in said(made, entry(TRANSFER))


def test_a_torn_snapshot() -> None:
    torn = Sums("c8.1", 1.0, False, TOTAL - 5, len(ACCOUNTS), ())
    (found,) = said(books(), snapshots=(torn,))
    assert f"has {TOTAL - 5}" in found


def test_appends_that_are_there_in_part_or_seen_in_part() -> None:
    made = books(APPEND)
    seen = Sums("c8.1", 1.0, False, TOTAL, len(ACCOUNTS), ((1, (80,)), (2, ())))
    found = said(made, entry(APPEND), snapshots=(seen,))
    assert any(
        what.startswith("a transaction was seen under one key") for what in found
    )
    made.lists[2].clear()
    (found_,) = said(made, entry(APPEND))
    assert found_.startswith("a transaction is there in part")


@pytest.mark.parametrize("ack", ["committed", "prepared"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_snapshot_without_what_had_been_told(ack: str, strict: bool) -> None:
    made = entry(replace(APPEND, ack=ack))
    made.ended = 2.0

    def found(began: float) -> list[str]:
        seen = Sums("c8.1", began, strict, TOTAL, len(ACCOUNTS), ((1, ()),))
        return said(books(APPEND), made, snapshots=(seen,))

    assert found(began=1.9) == []
    assert len(found(began=2.1)) == (strict or ack == "committed")


@pytest.mark.parametrize("ack", ["committed", "prepared"])
@pytest.mark.parametrize("kind", ["lists", "look"])
def test_a_read_without_what_had_been_told(ack: str, kind: str) -> None:
    made = entry(replace(APPEND, ack=ack))
    made.ended = 2.0

    def found(began: float) -> list[str]:
        read = Entry("c2.1", Plan(9, kind, reads=(1,)), began, Outcome.COMMITTED)
        read.reads = ((1, ()),)
        return said(books(APPEND), made, read)

    assert found(began=1.9) == []
    assert len(found(began=2.1)) == (kind == "lists" or ack == "committed")


def test_a_journal_gives_back_what_was_told_before_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "c1.1.jsonl"
    journal = Journal(path)
    journal.intend(TRANSFER)
    journal.intend(APPEND)
    journal.told(APPEND, Outcome.COMMITTED, [(1, [])])
    with path.open("a") as file:
        file.write('{"told": 7, "outco')  # the kill
    entries, _, _ = read_journals(tmp_path)
    assert [e.plan for e in entries] == [TRANSFER, APPEND]
    assert [e.outcome for e in entries] == [Outcome.UNKNOWN, Outcome.COMMITTED]
    assert entries[1].reads == ((1, ()),)


def test_a_seed_gives_the_same_plans_with_ids_and_values_of_their_own() -> None:
    accounts = {"s1": [1, 4, 5], "s2": [2, 6], "s3": [3, 7], "s4": [8, 9]}
    one, same, other = (
        [choices.next(3) for _ in range(300)]
        for choices in (
            Choices("a", 0, accounts),
            Choices("a", 0, accounts),
            Choices("b", 1000, accounts),
        )
    )
    assert one == same
    assert all(Plan.of_json(plan.as_json()) == plan for plan in one)
    assert not {p.id for p in one} & {p.id for p in other}
    values = [value for plan in one for _, value in plan.appends]
    values += [plan.undone[1] for plan in one if plan.kind == "lists" and plan.undone]
    assert len(values) == len(set(values))
    assert all(sum(amount for _, amount in plan.parts) == 0 for plan in one)
    lists = [plan for plan in one if plan.kind in ("lists", "look")]
    assert all({*plan.reads, *dict(plan.appends)} <= {*keys_of(3)} for plan in lists)
