"""What judges must be judged: a wrong merge does not pass."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import distinct, func, select
from sqlalchemy.orm import sessionmaker

from shardalchemy.local import LocalCluster
from tests.differential.models import Account, Region, Specimen
from tests.differential.search import Search
from tests.differential.twins import Case, Mirror, Twins, comparable, compare


def answer(*rows: tuple[Any, ...]) -> Any:
    return ["a", "b"][: len(rows[0])], [tuple(map(comparable, row)) for row in rows]


ONE, TWO = (1, "x"), (2, None)


@pytest.mark.parametrize(
    ("got", "case"),
    [
        (answer(TWO, ONE), Case(None, order="total")),
        (answer(TWO, ONE), Case(None, order=(0,))),
        (answer(ONE), Case(None)),
        (answer(ONE, TWO, TWO), Case(None)),
        (answer(ONE, ONE), Case(None)),
        (answer((1.0, "x"), TWO), Case(None)),
        (answer((True, "x"), TWO), Case(None)),
        (answer((Decimal(1), "x"), TWO), Case(None)),
        (answer(ONE, (2, "")), Case(None)),
        (answer(ONE, (3, None)), Case(None, order=(0,), limited=True)),
        ((["a", "c"], answer(ONE, TWO)[1]), Case(None)),
    ],
)
def test_unequal_answers_are_told_apart(got: Any, case: Case) -> None:
    assert compare(case, answer(ONE, TWO), answer(ONE, TWO)) is None
    assert compare(case, got, answer(ONE, TWO)) is not None


def test_scale_is_compared_but_where_it_is_not_determined() -> None:
    one, same = answer((Decimal("1.0"),)), answer((Decimal("1.00"),))
    assert compare(Case(None), one, same) is not None
    assert compare(Case(None, loose=frozenset([0])), one, same) is None
    other = answer((Decimal("1.01"),))
    assert compare(Case(None, loose=frozenset([0])), one, other) is not None


def test_ties_may_come_in_any_order_and_nothing_else() -> None:
    rows = answer((1, "x"), (1, "y"), (2, "z"))
    assert (
        compare(Case(None, order=(0,)), answer((1, "y"), (1, "x"), (2, "z")), rows)
        is None
    )
    moved = answer((1, "x"), (2, "z"), (1, "y"))
    assert compare(Case(None, order=(0,)), moved, rows) is not None


class Concatenated:
    """A session that asks every shard, and gives their rows one after another."""

    def __init__(self, engines: Any) -> None:
        self.sessions = [sessionmaker(engine)() for engine in engines]

    def __enter__(self) -> Concatenated:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self.sessions:
            session.close()

    def execute(self, *given: Any, **options: Any) -> Any:
        first, *others = (s.execute(*given, **options) for s in self.sessions)
        return first.merge(*others)

    def scalar(self, *given: Any, **options: Any) -> Any:
        return self.execute(*given, **options).scalar()


class Naive(Twins):
    """Twins with a cluster that concatenates whatever it is asked."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.sharded = lambda: Concatenated(self.shards.values())  # type: ignore[assignment]

    def forget(self) -> None:
        """Do nothing: nothing is planned."""

    def kind_of(self, case: Case) -> str:
        return "concatenated"


@pytest.fixture(scope="module")
def naive(shard_servers: LocalCluster) -> Iterator[Naive]:
    with Naive(shard_servers) as made:
        made.fill("mixed", 1)
        yield made


@pytest.mark.parametrize(
    "case",
    [
        Case(select(Account.id).order_by(Account.id), order="total"),
        Case(select(Account.v, Account.id).order_by(Account.v), order=(0,)),
        Case(select(Account.id).order_by(Account.id).limit(3), order="total"),
        Case(select(Account.id).limit(3), limited=True),
        Case(select(func.count()).select_from(Account)),
        Case(select(Account.v, func.count()).group_by(Account.v)),
        Case(select(Account.v).distinct()),
        Case(select(func.count(distinct(Account.v)))),
        Case(select(Account.id, func.row_number().over(order_by=Account.id))),
        Case(select(Region.code)),
    ],
    ids=lambda case: str(case.statement).replace("\n", "")[:60],
)
def test_a_merge_that_concatenates_is_caught(naive: Naive, case: Case) -> None:
    assert naive.judge(case).word == "WRONG"


def test_what_may_be_concatenated_passes(naive: Naive) -> None:
    for statement in (select(Account), select(Specimen), select(Account.id)):
        assert naive.judge(Case(statement, unique=True)).word == "equal"


def test_a_search_finds_and_shrinks_what_is_wrong(naive: Naive) -> None:
    search = Search(naive)
    search.chunk(0, 60)
    (failure,) = search.failures
    assert "python -m tests.differential 60 0" in failure
    sql, _, _ = failure.partition("/*")
    assert len(sql) < 1500


@pytest.fixture(scope="module")
def mirror(shard_servers: LocalCluster) -> Iterator[Mirror]:
    with Mirror(shard_servers) as made:
        yield made


def test_the_grammar_asks_only_what_is_determined(mirror: Mirror) -> None:
    search = Search(mirror)
    search.run(120, 0, 40)
    assert not search.failures, "\n\n".join(search.failures)


@pytest.mark.parametrize(
    "statement",
    [
        select(Account.id).limit(3),
        select(Account.id).order_by(Account.active),
        select(func.array_agg(Account.v)),
    ],
)
def test_the_mirror_shows_what_is_not_determined(
    mirror: Mirror, statement: Any
) -> None:
    mirror.fill("mixed", 1)
    assert mirror.judge(Case(statement, order="total")).word == "WRONG"


def test_all_shards_hold_rows(naive: Naive) -> None:
    held = chain(
        naive.shard_of(Account.__table__, r) for r in naive.rows[Account.__table__]
    )
    assert len(set(held)) == 4
