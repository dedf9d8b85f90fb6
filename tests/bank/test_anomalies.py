"""The search for anomalies, on histories with one of each kind and on clean ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.bank.anomalies import Kind, find_anomalies
from tests.bank.history import Append, Level, Outcome, Read, Step, Transaction

A, B, C = 1, 2, 3  # keys
ROLLED_BACK, UNKNOWN = Outcome.ROLLED_BACK, Outcome.UNKNOWN


def t(name: str, *steps: Step, outcome: Outcome = Outcome.COMMITTED) -> Transaction:
    return Transaction(name, outcome, steps)


def snapshot(name: str, *reads: Read, level: Level = Level.SNAPSHOT) -> Transaction:
    return Transaction(name, Outcome.COMMITTED, reads, level)


def r(key: int, *values: int) -> Read:
    return Read(key, values)


def kinds(
    *history: Transaction, final: dict[int, list[int]] | None = None
) -> set[Kind]:
    return {anomaly.kind for anomaly in find_anomalies(history, final)}


def test_nothing_is_wrong_with_transactions_one_after_another() -> None:
    history = [
        t("t1", r(A), Append(A, 1), Append(B, 2)),
        t("t2", r(A, 1), Append(A, 3), r(A, 1, 3), r(B, 2)),
        t("t3", Append(B, 4), outcome=ROLLED_BACK),
        t("t4", Append(A, 5), Append(B, 6), outcome=UNKNOWN),
        t("t5", Append(A, 7), outcome=UNKNOWN),
        t("t6", Append(B, 8, kept=False), Append(B, 9), r(B, 2, 6, 9)),
        snapshot("s", r(A, 1, 3), r(B, 2)),
    ]
    assert kinds(*history, final={A: [1, 3, 5], B: [2, 6, 9]}) == set()


def test_a_value_from_nowhere() -> None:
    assert kinds(t("t1", Append(A, 1)), snapshot("s", r(A, 7))) == {Kind.GARBAGE}
    assert Kind.GARBAGE in kinds(t("t1", Append(A, 1)), snapshot("s", r(B, 1)))


def test_a_value_that_is_there_twice() -> None:
    assert Kind.DUPLICATE in kinds(t("t1", Append(A, 1)), snapshot("s", r(A, 1, 1)))
    assert Kind.DUPLICATE in kinds(t("t1", Append(A, 1)), final={A: [1, 1]})


def test_a_transaction_that_does_not_see_its_own_append() -> None:
    assert kinds(t("t1", Append(A, 1), r(A))) == {Kind.INTERNAL}


def test_a_read_of_what_was_rolled_back() -> None:
    aborted = t("t1", Append(A, 1), outcome=ROLLED_BACK)
    assert kinds(aborted, snapshot("s", r(A, 1))) == {Kind.ABORTED_READ}
    assert kinds(aborted, final={A: [1]}) == {Kind.ABORTED_READ}


def test_a_read_of_what_a_savepoint_has_undone() -> None:
    partly = t("t1", Append(A, 1, kept=False), Append(B, 2))
    assert kinds(partly, snapshot("s", r(A, 1))) == {Kind.ABORTED_READ}


def test_a_read_in_the_middle_of_a_transaction() -> None:
    writer = t("t1", Append(A, 1), Append(A, 2))
    seen = kinds(writer, snapshot("s", r(A, 1)), final={A: [1, 2]})
    assert Kind.INTERMEDIATE_READ in seen


def test_reads_that_disagree_about_the_order() -> None:
    history = [t("t1", Append(A, 1)), t("t2", Append(A, 2))]
    reads = [snapshot("s1", r(A, 1, 2)), snapshot("s2", r(A, 2))]
    assert Kind.INCOMPATIBLE in kinds(*history, *reads)


def test_an_acknowledged_append_that_is_gone() -> None:
    writer = t("t1", Append(A, 1), Append(B, 2))
    assert kinds(writer, final={A: [], B: []}) == {Kind.LOST}
    assert kinds(writer, final={}) == {Kind.LOST}
    assert kinds(replace(writer, outcome=UNKNOWN), final={A: [], B: []}) == set()


@pytest.mark.parametrize("outcome", [Outcome.COMMITTED, UNKNOWN])
def test_a_transaction_that_is_there_in_part(outcome: Outcome) -> None:
    writer = t("t1", Append(A, 1), Append(B, 2), outcome=outcome)
    assert kinds(writer, final={A: [1], B: []}) == {Kind.PARTIAL}


@pytest.mark.parametrize("level", [Level.SNAPSHOT, Level.SERIAL])
def test_a_transaction_that_was_seen_in_part(level: Level) -> None:
    writer = t("t1", Append(A, 1), Append(B, 2))
    reader = snapshot("s", r(A, 1), r(B), level=level)
    final = {A: [1], B: [2]}
    assert kinds(writer, reader, final=final) == {Kind.FRACTURED, Kind.SINGLE}


def test_reads_of_different_moments_where_no_more_is_promised() -> None:
    writer = t("t1", Append(A, 1), Append(B, 2))
    reader = snapshot("s", r(A, 1), r(B), level=Level.COMMITTED)
    assert kinds(writer, reader, final={A: [1], B: [2]}) == set()


def test_a_cycle_of_writes() -> None:
    history = [t("t1", Append(A, 1), Append(B, 2)), t("t2", Append(A, 3), Append(B, 4))]
    assert kinds(*history, final={A: [1, 3], B: [4, 2]}) == {Kind.WRITE_CYCLE}


def test_transactions_that_saw_each_other() -> None:
    history = [t("t1", Append(A, 1), r(B, 2)), t("t2", Append(B, 2), r(A, 1))]
    assert kinds(*history, final={A: [1], B: [2]}) == {Kind.CIRCULAR}


def test_a_lost_update() -> None:
    history = [
        t("t1", r(A), Append(A, 1)),
        t("t2", r(A), Append(A, 2)),
    ]
    (anomaly,) = find_anomalies(history, {A: [1, 2]})
    assert anomaly.kind is Kind.LOST_UPDATE
    assert str(anomaly).endswith("t2 -rw on 1-> t1 -ww on 1-> t2")


def test_a_read_before_what_was_seen_by_way_of_another() -> None:
    history = [
        t("t1", Append(A, 1)),
        t("t2", r(A, 1), Append(B, 2)),
        snapshot("s", r(B, 2), r(A)),
    ]
    assert kinds(*history, final={A: [1], B: [2]}) == {Kind.SINGLE}


def test_a_write_skew() -> None:
    history = [t("t1", r(A), Append(B, 2)), t("t2", r(B), Append(A, 1))]
    assert kinds(*history, final={A: [1], B: [2]}) == {Kind.SEVERAL}


def test_snapshots_may_order_unrelated_transactions_differently() -> None:
    history = [
        t("t1", Append(A, 1)),
        t("t2", Append(B, 2)),
        snapshot("s1", r(A, 1), r(B)),
        snapshot("s2", r(A), r(B, 2)),
    ]
    assert kinds(*history, final={A: [1], B: [2]}) == set()


def test_one_value_of_two_transactions_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="appended twice"):
        find_anomalies([t("t1", Append(A, 1)), t("t2", Append(A, 1))])


# -- generated histories ---------------------------------------------------------------

Final = dict[int, list[int]]
fewer = settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])


@st.composite
def serial_histories(draw: st.DrawFn) -> tuple[list[Transaction], Final]:
    """Return transactions run one after another over three lists, and the lists."""
    lists: defaultdict[int, list[int]] = defaultdict(list)
    values = iter(range(100, 10_000))
    history = []
    for number in range(draw(st.integers(1, 12))):
        level = draw(st.sampled_from([Level.SERIAL, Level.SERIAL, *Level]))
        outcome = draw(st.sampled_from([Outcome.COMMITTED, *Outcome]))
        kept = outcome is Outcome.COMMITTED or (
            outcome is Outcome.UNKNOWN and draw(st.booleans())
        )
        lists_here = {key: [*lists[key]] for key in (A, B, C)}
        steps: list[Step] = []
        for _ in range(draw(st.integers(1, 5))):
            key = draw(st.sampled_from([A, B, C]))
            if level is not Level.SERIAL or draw(st.booleans()):
                steps.append(Read(key, tuple(lists_here[key])))
            else:
                append = Append(key, next(values), draw(st.integers(0, 4)) > 0)
                steps.append(append)
                if append.kept:
                    lists_here[key].append(append.value)
        if kept:
            lists.update(lists_here)
        history.append(Transaction(f"t{number}", outcome, tuple(steps), level))
    return history, {key: lists[key] for key in (A, B, C)}


@given(serial_histories())
def test_no_serial_history_is_blamed(made: tuple[list[Transaction], Final]) -> None:
    history, final = made
    assert find_anomalies(history, final) == []


def _one_read(
    data: st.DataObject, history: list[Transaction], least: int, *levels: Level
) -> tuple[int, int, Read]:
    """Return a read of at least *least* values, after where it is in the history."""
    found = [
        (where, at, step)
        for where, transaction in enumerate(history)
        if transaction.outcome is not Outcome.ROLLED_BACK
        and transaction.level in levels
        for at, step in enumerate(transaction.steps)
        if isinstance(step, Read) and len(step.values) >= least
    ]
    assume(found)
    return data.draw(st.sampled_from(found))


def _changed(
    history: list[Transaction], where: int, at: int, *values: int
) -> list[Transaction]:
    transaction = history[where]
    steps = [*transaction.steps]
    steps[at] = replace(steps[at], values=values)
    mutated = replace(transaction, steps=tuple(steps))
    return [*history[:where], mutated, *history[where + 1 :]]


@fewer
@given(serial_histories(), st.data())
def test_a_read_with_a_value_missing_before_others_is_found(
    made: tuple[list[Transaction], Final], data: st.DataObject
) -> None:
    history, final = made
    where, at, read = _one_read(data, history, 2, Level.SNAPSHOT, Level.COMMITTED)
    gone = data.draw(st.integers(0, len(read.values) - 2))
    values = read.values[:gone] + read.values[gone + 1 :]
    assert find_anomalies(_changed(history, where, at, *values), final)


@fewer
@given(serial_histories(), st.data())
def test_a_read_in_another_order_is_found(
    made: tuple[list[Transaction], Final], data: st.DataObject
) -> None:
    history, final = made
    where, at, read = _one_read(data, history, 2, Level.SNAPSHOT, Level.COMMITTED)
    values = data.draw(st.permutations(read.values))
    assume(tuple(values) != read.values)
    assert find_anomalies(_changed(history, where, at, *values), final)


@settings(fewer, max_examples=15)  # few histories have such a read
@given(serial_histories(), st.data())
def test_a_stale_read_before_an_append_is_found(
    made: tuple[list[Transaction], Final], data: st.DataObject
) -> None:
    history, final = made
    where, at, read = _one_read(data, history, 1, Level.SERIAL)
    appended = {a.value for a in history[where].appends if a.key == read.key and a.kept}
    assume(appended & set(final[read.key]) and not appended & set(read.values))
    stale = read.values[: data.draw(st.integers(0, len(read.values) - 1))]
    assert find_anomalies(_changed(history, where, at, *stale), final)


@fewer
@given(serial_histories(), st.data())
def test_a_committed_value_that_is_lost_at_the_end_is_found(
    made: tuple[list[Transaction], Final], data: st.DataObject
) -> None:
    history, final = made
    kept = [
        a
        for transaction in history
        if transaction.outcome is Outcome.COMMITTED
        for a in transaction.appends
        if a.kept
    ]
    assume(kept)
    lost = data.draw(st.sampled_from(kept))
    final[lost.key].remove(lost.value)
    assert find_anomalies(history, final)


@fewer
@given(serial_histories(), st.data())
def test_a_value_that_was_rolled_back_and_is_there_is_found(
    made: tuple[list[Transaction], Final], data: st.DataObject
) -> None:
    history, final = made
    undone = [
        a
        for transaction in history
        for a in transaction.appends
        if transaction.outcome is Outcome.ROLLED_BACK or not a.kept
    ]
    assume(undone)
    back = data.draw(st.sampled_from(undone))
    final[back.key].append(back.value)
    assert find_anomalies(history, final)
