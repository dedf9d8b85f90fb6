"""The catalogue of classic wrong answers of sharded databases, one test to each.

Every test states what is often answered wrongly and demands the right answer, which
plain PostgreSQL gives. The naive answer, the rows that the shards give one by one, is
made as well and must be wrong: a test that it passes would prove nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import Any, Protocol

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    any_,
    case,
    cast,
    delete,
    distinct,
    except_,
    except_all,
    exists,
    func,
    insert,
    intersect,
    intersect_all,
    literal,
    or_,
    select,
    text,
    true,
    tuple_,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import (
    aliased,
    contains_eager,
    joinedload,
    selectinload,
    sessionmaker,
)

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.local import LocalCluster
from tests.differential.data import WORDS
from tests.differential.models import (
    Account,
    Device,
    Event,
    Item,
    Label,
    Memo,
    Party,
    Point,
    Purchase,
    Region,
    Specimen,
    Status,
)
from tests.differential.selects import distinct_on
from tests.differential.twins import Case, Failed, Refused, Twins, compare, stored

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")

ROWS = "mixed", 3
KEYS = [1, 2, 3, 4, 5, 6]


class Exact(Protocol):
    def __call__(
        self, statement: Any, *, order: Any = (), trap: bool = True, **more: Any
    ) -> None: ...


@pytest.fixture(scope="module")
def twins(shard_servers: LocalCluster) -> Iterator[Twins]:
    with Twins(shard_servers) as made:
        yield made


@pytest.fixture
def exact(twins: Twins) -> Exact:
    """Demand the right answer to a statement, where the naive one is wrong."""
    if twins.dataset != " ".join(map(str, ROWS)):
        twins.fill(*ROWS)
    return demanding(twins)


def demanding(twins: Twins) -> Exact:
    def demand(
        statement: Any, *, order: Any = (), trap: bool = True, **more: Any
    ) -> None:
        made = Case(statement, order=order, **more)
        if trap:
            assert naive_is_wrong(twins, made), "this statement sets no trap"
        outcome = twins.judge(made)
        assert outcome.word == "equal", f"{outcome.word}: {outcome.detail}"

    return demand


def naive_is_wrong(twins: Twins, made: Case) -> bool:
    """Say whether what the shards give one after another is not the right answer."""
    expected = twins.run(twins.plain, made)
    rows: list[Any] = []
    for engine in twins.shards.values():
        try:
            keys, here = twins.run(sessionmaker(engine), made)
        except Failed:
            return True
        rows += here
    return compare(made, (keys, rows), expected) is not None


@pytest.fixture
def alike(exact: Exact, twins: Twins) -> Callable[[Callable[[Any], Any]], Any]:
    """Run work on both sides, each in a session; demand that it returns the same."""

    def demand(work: Callable[[Any], Any], refusable: bool = False) -> Any:
        made = Case(None, work=work)
        expected = twins.run(twins.plain, made)
        try:
            got = twins.run(twins.sharded, made)
        except Refused:
            assert refusable
            return expected
        assert got == expected
        return got

    return demand


@contextmanager
def refusable() -> Iterator[None]:
    """Accept that a statement is refused."""
    with suppress(UnsupportedQueryError):
        yield


def apart(twins: Twins, count: int = 2) -> list[int]:
    """Return ids of accounts that are all on different shards."""
    found: dict[str, int] = {}
    for row in twins.rows[Account.__table__]:
        found.setdefault(twins.shard_of(Account.__table__, row), row["id"])
    assert len(found) >= count
    return list(found.values())[:count]


# -- order and windows of rows ---------------------------------------------------------


def test_order_by_over_shards_is_merged(exact: Exact) -> None:
    exact(select(Account.id, Account.v).order_by(Account.id), order="total")
    exact(select(Account.id, Account.v).order_by(Account.id.desc()), order="total")


def test_order_by_a_column_that_is_not_selected(exact: Exact) -> None:
    exact(select(Account.name).order_by(Account.v, Account.id), order="total")


def test_order_by_an_expression(exact: Exact) -> None:
    term = func.coalesce(Account.v, 0) * -2
    exact(select(Account.id).order_by(term, Account.id), order="total")


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("down", [True, False])
def test_order_by_with_nulls_first_and_last(
    exact: Exact, last: bool, down: bool
) -> None:
    term = Account.v.desc() if down else Account.v.asc()
    term = term.nulls_last() if last else term.nulls_first()
    exact(select(Account.id).order_by(term, Account.id), order="total")
    exact(select(Account.id).order_by(term, Account.id).limit(4), order="total")


def test_order_by_terms_in_different_directions(exact: Exact) -> None:
    order = Account.v.desc(), Account.name, Account.id.desc()
    exact(select(Account.id).order_by(*order), order="total")


@pytest.mark.parametrize(
    "column",
    ["status", "name", "balance", "score", "active", "joined", "email"],
)
def test_order_by_types_that_python_orders_otherwise(exact: Exact, column: str) -> None:
    term = getattr(Account, column)
    exact(select(Account.id, term).order_by(term, Account.id), order="total")
    exact(select(Account.id, term).order_by(term.desc(), Account.id), order="total")


@pytest.mark.parametrize(
    "column",
    [
        *("f_double", "n_free", "t_char", "t_text", "d_span", "d_timetz", "u", "raw"),
        *("doc", "numbers", "span", "address", "flag", "words", "code", "d_date"),
    ],
)
def test_order_by_every_kind_of_column(exact: Exact, column: str) -> None:
    term = getattr(Specimen, column)
    exact(select(Specimen.id, term).order_by(term, Specimen.id), order="total")


def test_order_by_text_under_a_collation(exact: Exact) -> None:
    for term in (Account.name, Account.name.collate("C"), func.lower(Account.name)):
        exact(select(Account.id).order_by(term, Account.id), order="total")


def test_limit_is_not_per_shard(exact: Exact) -> None:
    for n in (0, 1, 3):
        statement = select(Account.id).order_by(Account.v, Account.id).limit(n)
        exact(statement, order="total", trap=n > 0)
    exact(select(func.count()).select_from(select(Account.id).limit(3).subquery()))


def test_limit_without_an_order_gives_so_many_rows(exact: Exact) -> None:
    exact(select(Account.id).limit(3), limited=True)


def test_offset_is_not_per_shard(exact: Exact) -> None:
    ordered = select(Account.id).order_by(Account.v, Account.id)
    exact(ordered.offset(2), order="total")
    exact(ordered.limit(3).offset(2), order="total")
    exact(ordered.limit(3).offset(1000), order="total", trap=False)


def test_limit_and_offset_from_parameters(exact: Exact) -> None:
    n, skipped = sa.bindparam("n", type_=sa.Integer), sa.bindparam("o", 1)
    ordered = select(Account.id).order_by(Account.id).limit(n).offset(skipped)
    for params in ({"n": 2}, {"n": 5, "o": 3}):
        exact(ordered, order="total", params=params)


def test_limit_of_an_expression(exact: Exact) -> None:
    ordered = select(Account.id).order_by(Account.id)
    exact(ordered.limit(literal(1) + literal(2)), order="total")


def test_ties_under_limit(exact: Exact) -> None:
    exact(select(Account.v).order_by(Account.v).limit(5), order="total")
    tied = select(Account.v, Account.id).order_by(Account.v).limit(5)
    exact(tied, order=(0,), limited=True)


def test_fetch_with_ties(exact: Exact) -> None:
    for n in (1, 3, 7):
        statement = select(Account.v, Account.id).order_by(Account.v)
        exact(statement.fetch(n, with_ties=True), order=(0,))


def test_a_limited_subquery_in_from(exact: Exact) -> None:
    top = select(Account.id, Account.v).order_by(Account.v, Account.id).limit(4)
    sub = top.subquery()
    exact(select(sub.c.id, sub.c.v))
    exact(select(func.sum(sub.c.v), func.count()))
    joined = select(sub.c.id, Purchase.id).join(
        Purchase, Purchase.account_id == sub.c.id
    )
    exact(joined)


def test_a_limited_subquery_in_a_criterion(exact: Exact) -> None:
    top = select(Purchase.account_id).order_by(Purchase.total.desc(), Purchase.id)
    exact(select(Account.id).where(Account.id.in_(top.limit(4))))


# -- counts and other aggregates -------------------------------------------------------


def test_a_count_is_that_of_all_shards(exact: Exact) -> None:
    exact(select(func.count()).select_from(Account))
    exact(select(func.count(Account.v)))
    exact(select(func.count(Account.v).filter(Account.v > 2)))


def test_a_count_of_a_subquery(exact: Exact) -> None:
    rows = select(Account).where(Account.v > 1).subquery()
    exact(select(func.count()).select_from(rows))


def test_aggregates_over_all_shards(exact: Exact) -> None:
    v = Account.v
    exact(select(func.sum(v), func.min(v), func.max(v), func.avg(v)))
    exact(select(func.bool_and(Account.active), func.bool_or(Account.active)))
    exact(select(func.sum(v) + func.count(), func.max(v) - func.min(v)))


def test_an_average_is_not_one_of_averages(exact: Exact) -> None:
    for column in (Account.v, Account.balance, Account.score, Account.id):
        exact(select(func.avg(column)))
    by_status = select(Purchase.status, func.avg(Purchase.total))
    exact(by_status.group_by(Purchase.status))


@pytest.mark.parametrize(
    "spread", ["stddev", "variance", "stddev_pop", "var_pop", "stddev_samp", "var_samp"]
)
def test_a_deviation_is_not_one_of_deviations(exact: Exact, spread: str) -> None:
    for column in (Account.v, Purchase.total, Account.id, Specimen.i_small):
        exact(select(getattr(func, spread)(column)))


def test_distinct_counts_are_not_summed(exact: Exact) -> None:
    exact(select(func.count(distinct(Account.v))))
    exact(select(func.sum(distinct(Account.v)), func.avg(distinct(Account.v))))
    by_region = select(Account.region_code, func.count(distinct(Account.v)))
    exact(by_region.group_by(Account.region_code))


def test_distinct_counts_of_keys(exact: Exact) -> None:
    exact(select(func.count(distinct(Purchase.account_id))))
    exact(select(func.count(distinct(Event.account_id))))


def test_sums_and_averages_keep_the_scale_of_numerics(exact: Exact) -> None:
    S = Specimen
    exact(select(func.sum(Account.balance), func.avg(Account.balance)))
    exact(select(func.sum(S.n_fixed), func.avg(S.n_fixed), func.stddev(S.n_fixed)))
    exact(select(func.sum(S.i_big), func.avg(S.i_big)))
    exact(select(func.round(func.avg(Purchase.total), 3)))
    finite = S.n_free.is_distinct_from(Decimal("NaN"))
    exact(select(func.sum(S.n_free)).where(finite))


def test_sums_of_smaller_integers_have_the_larger_type(exact: Exact) -> None:
    S = Specimen
    exact(select(func.sum(S.i_small), func.sum(S.i_int), func.sum(S.i_big)))


def test_a_sum_through_a_type_decorator(exact: Exact) -> None:
    exact(select(func.sum(Item.price), func.max(Item.price)))


def test_nan_and_infinity_in_aggregates(exact: Exact) -> None:
    x = Specimen.f_double
    exact(select(func.max(x), func.min(x), func.count(x)), loose=frozenset())
    exact(select(func.max(Specimen.n_free)), loose=frozenset([0]), trap=False)


def test_min_and_max_of_text(exact: Exact) -> None:
    exact(select(func.min(Account.name), func.max(Account.name)))
    exact(select(func.max(Account.name.collate("C"))))
    exact(select(func.min(Specimen.t_char), func.max(Specimen.t_char)))


def test_min_and_max_of_an_enum_follow_its_order(exact: Exact) -> None:
    exact(select(func.min(Account.status), func.max(Account.status)))


def test_lists_are_in_order_over_all_shards(exact: Exact) -> None:
    order = Account.v.desc(), Account.id
    name = cast(Account.name, Text)
    exact(select(func.array_agg(aggregate_order_by(Account.id, *order))))
    exact(select(func.string_agg(name, aggregate_order_by(literal(","), *order))))
    pair = func.json_build_object("id", Account.id, "v", Account.v)
    exact(select(func.json_agg(aggregate_order_by(pair, *order))))
    exact(select(func.array_agg(distinct(Account.v))))


def test_lists_of_groups(exact: Exact) -> None:
    ids = func.array_agg(aggregate_order_by(Account.id, Account.id))
    exact(select(Account.v, ids).group_by(Account.v))


def test_percentiles_and_modes(exact: Exact) -> None:
    exact(select(func.percentile_cont(0.5).within_group(Account.v)))
    exact(select(func.percentile_disc(0.25).within_group(Account.v.desc())))
    exact(select(func.mode().within_group(Account.v)))


def test_bits(exact: Exact) -> None:
    exact(select(func.bit_and(Account.v), func.bit_or(Account.v)))


def test_aggregates_in_order_by_alone(exact: Exact) -> None:
    by_status = select(Purchase.status).group_by(Purchase.status)
    order = func.sum(Purchase.total).desc(), Purchase.status
    exact(by_status.order_by(*order), order="total")


def test_empty_shards_in_aggregates(twins: Twins) -> None:
    v = Account.v
    lists = func.array_agg(aggregate_order_by(v, Account.id))
    pieces = [
        func.count(),
        func.count(v),
        func.sum(v),
        func.avg(v),
        func.min(v),
        func.bool_and(Account.active),
        func.stddev(v),
        lists,
        func.coalesce(func.sum(v), 0),
    ]
    for profile in ("empty", "lonely", "sparse"):
        twins.fill(profile, 1)
        exact = demanding(twins)
        exact(select(*pieces).select_from(Account))
        exact(select(Account.v, func.count()).group_by(Account.v), trap=False)
        exact(select(func.max(Account.name)).where(Account.id == 77), trap=False)


def test_aggregates_of_no_row_but_with_having(exact: Exact) -> None:
    none = select(func.count()).select_from(Account).where(Account.v == 1000)
    exact(none)
    exact(none.having(func.count() == 0))
    exact(select(func.sum(Account.v)).where(Account.id.in_([])), trap=False)


# -- groups ------------------------------------------------------------------------


def test_groups_are_not_repeated(exact: Exact) -> None:
    exact(select(Account.v, func.count()).group_by(Account.v))
    exact(select(Account.v).group_by(Account.v))


def test_groups_in_order_and_limited(exact: Exact) -> None:
    n = func.count().label("n")
    statement = select(Account.v, n).group_by(Account.v)
    exact(statement.order_by(n.desc(), Account.v), order="total")
    exact(statement.order_by(n.desc(), Account.v).limit(2), order="total")
    exact(statement.order_by(sa.desc("n"), Account.v).limit(2), order="total")


def test_groups_of_an_expression(exact: Exact) -> None:
    for by in (
        func.coalesce(Account.v, 0) % 2,
        func.lower(Account.name),
        case((Account.v > 2, "high"), else_="low"),
        Account.v.is_(None),
        func.date_trunc("month", Account.joined),
    ):
        exact(select(by.label("by"), func.count()).group_by(by))
        exact(select(by.label("by"), func.count()).group_by("by"))


def test_having_is_not_per_shard(exact: Exact) -> None:
    by_v = select(Account.v).group_by(Account.v)
    exact(by_v.having(func.count() > 1))
    exact(by_v.having(func.sum(Account.id) > 10))
    exact(select(func.count()).select_from(Account).having(func.count() > 5))


def test_groups_by_a_key_are_each_on_one_shard(exact: Exact) -> None:
    by_account = select(Purchase.account_id, func.sum(Purchase.total))
    by_account = by_account.group_by(Purchase.account_id)
    exact(by_account, trap=False)
    order = func.sum(Purchase.total).desc(), Purchase.account_id
    exact(by_account.order_by(*order).limit(3), order="total")
    exact(by_account.having(func.count() > 1), trap=False)


def test_a_key_made_null_by_an_outer_join_is_one_group(exact: Exact) -> None:
    statement = (
        select(Purchase.account_id, func.count())
        .select_from(Account)
        .outerjoin(Purchase, Purchase.account_id == Account.id)
        .group_by(Purchase.account_id)
    )
    exact(statement)


def test_a_key_made_null_by_an_outer_join_is_one_partition(exact: Exact) -> None:
    count = func.count().over(partition_by=Purchase.account_id)
    statement = (
        select(Account.id, Purchase.id, count)
        .select_from(Account)
        .outerjoin(Purchase, Purchase.account_id == Account.id)
    )
    exact(statement)


def test_a_key_made_null_in_a_subquery_is_one_group(exact: Exact) -> None:
    pairs = (
        select(Account.id, Purchase.account_id.label("k"))
        .select_from(Account)
        .outerjoin(Purchase, Purchase.account_id == Account.id)
        .subquery()
    )
    exact(select(pairs.c.k, func.count()).group_by(pairs.c.k))
    exact(select(pairs.c.k).distinct())


def test_grouping_sets_have_one_total_row(exact: Exact) -> None:
    for sets in (
        func.rollup(Account.v, Account.region_code),
        func.cube(Account.v, Account.region_code),
        func.grouping_sets(tuple_(Account.v), tuple_(Account.region_code), tuple_()),
    ):
        statement = select(
            Account.v, Account.region_code, func.count(), func.sum(Account.id)
        )
        exact(statement.group_by(sets))
    by_key = select(Account.id, func.count(), func.grouping(Account.id))
    exact(by_key.group_by(func.rollup(Account.id)))


def test_columns_that_depend_on_the_grouped_key(exact: Exact) -> None:
    statement = select(Account.id, Account.name, func.count(Purchase.id))
    statement = statement.outerjoin(Purchase).group_by(Account.id)
    exact(statement, trap=False)
    exact(statement.order_by(Account.name, Account.id), order="total")


# -- distinct ----------------------------------------------------------------------


def test_distinct_is_not_per_shard(exact: Exact) -> None:
    exact(select(Account.v).distinct())
    exact(select(Account.v, Account.region_code).distinct())
    exact(select(Account.v).distinct().order_by(Account.v).limit(3), order="total")
    exact(select(func.count()).select_from(select(Account.v).distinct().subquery()))


def test_distinct_on_is_not_per_shard(exact: Exact) -> None:
    statement = select(Account.v, Account.id)
    statement = statement.order_by(Account.v, Account.name.desc(), Account.id)
    exact(distinct_on(statement, Account.v), order="total")


def test_distinct_entities(exact: Exact) -> None:
    statement = select(Account).join(Account.purchases).distinct()
    exact(statement.order_by(Account.id), order="total")


# -- windows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "window",
    [
        func.row_number().over(order_by=(Account.v, Account.id)),
        func.rank().over(order_by=Account.v),
        func.dense_rank().over(order_by=Account.v.desc()),
        func.sum(Account.v).over(order_by=(Account.v, Account.id)),
        func.sum(Account.v).over(order_by=Account.v),
        func.lag(Account.v).over(order_by=Account.id),
        func.count().over(),
        func.ntile(3).over(order_by=Account.id),
        func.sum(Account.v).over(order_by=Account.id, rows=(-1, 1)),
        func.row_number().over(partition_by=Account.v, order_by=Account.id),
        func.avg(Account.v).over(partition_by=Account.region_code),
        func.first_value(Account.id).over(
            partition_by=Account.active, order_by=(Account.v, Account.id)
        ),
    ],
    ids=lambda window: str(window)[:40],
)
def test_windows_are_not_per_shard(exact: Exact, window: Any) -> None:
    exact(select(Account.id, window))


def test_windows_over_a_key(exact: Exact) -> None:
    rank = func.row_number().over(
        partition_by=Purchase.account_id,
        order_by=(Purchase.total.desc(), Purchase.id),
    )
    ranked = select(Purchase.id, Purchase.account_id, rank.label("r")).subquery()
    exact(select(ranked), trap=False)
    exact(select(ranked.c.id).where(ranked.c.r == 1), trap=False)
    exact(select(func.count()).where(ranked.c.r == 1))


def test_windows_over_groups(exact: Exact) -> None:
    total = func.sum(Account.id)
    statement = select(Account.v, total, func.rank().over(order_by=total.desc()))
    exact(statement.group_by(Account.v))


# -- keys --------------------------------------------------------------------------


def test_keys_of_two_shards_in_one_list(exact: Exact, twins: Twins) -> None:
    keys = apart(twins, 3)
    for some in (keys[:2], keys, keys[::-1], [*keys, 10**9]):
        exact(select(Account.id).where(Account.id.in_(some)), trap=False)
        exact(
            select(Account.id).where(or_(*(Account.id == k for k in some))), trap=False
        )
        ordered = select(Account.name).where(Account.id.in_(some)).order_by(Account.id)
        exact(ordered, order="total", trap=False)
        summed = select(func.sum(Account.id)).where(Account.id.in_(some))
        exact(summed)


def test_a_row_of_one_key_is_seen_once(exact: Exact) -> None:
    exact(select(Account.id).where(Account.id.in_([1, 1, 2, 1])), trap=False)
    exact(select(Account.id).where(or_(Account.id == 1, Account.id == 1)), trap=False)
    wide = or_(Account.id == 1, Account.v > 0, Account.id.in_([1, 2]))
    exact(select(Account.id).where(wide), trap=False)
    exact(select(func.count()).select_from(Account).where(wide))


@pytest.mark.parametrize(
    "value", [5.0, 4.5, Decimal(5), Decimal("5.0"), "5", 2**70, -1, True]
)
def test_a_key_compared_in_another_type(alike: Callable[..., Any], value: Any) -> None:
    def work(session: Any) -> Any:
        try:
            return session.scalars(select(Account.id).where(Account.id == value)).all()
        except sa.exc.DBAPIError as error:
            return type(error)

    alike(work)


def test_a_key_that_is_cast(exact: Exact) -> None:
    exact(select(Account.id).where(cast(Account.id, Text) == "5"), trap=False)
    exact(select(Account.id).where(cast(Account.id, sa.Numeric) == 5), trap=False)
    exact(select(Account.id).where(Account.id == cast("5", BigInteger)), trap=False)
    exact(select(Account.id).where(Account.id + 0 == 5), trap=False)


def test_a_key_that_is_null(exact: Exact) -> None:
    exact(select(Account.id).where(Account.id == sa.null()), trap=False)
    exact(select(Account.id).where(Account.id.in_([None, 1])), trap=False)
    exact(select(func.count(Account.id)).where(Account.id.is_(None)))


def test_empty_lists(exact: Exact) -> None:
    exact(select(Account.id).where(Account.id.in_([])), trap=False)
    exact(select(Account.id).where(Account.id.not_in([])), trap=False)
    exact(select(func.count(), func.sum(Account.v)).where(Account.id.in_([])))
    both = or_(Account.id.in_([]), Account.id == 1)
    exact(select(Account.id).where(both), trap=False)


def test_keys_that_are_not(exact: Exact) -> None:
    exact(select(Account.id).where(Account.id != 1), trap=False)
    exact(select(Account.id).where(~Account.id.in_([1, 2])), trap=False)
    exact(select(Account.id).where(~or_(Account.id == 1, Account.v == 2)), trap=False)
    exact(select(func.count()).where(Account.id.not_in([1, 2])))


def test_keys_as_an_array(exact: Exact) -> None:
    keys = literal(KEYS, sa.ARRAY(BigInteger))
    exact(select(func.count()).where(Account.id == any_(keys)))


def test_a_pin_beside_an_or_pins_nothing(exact: Exact) -> None:
    exact(select(func.count()).where(or_(Account.id == 1, Account.v > 2)))


# -- joins -------------------------------------------------------------------------


def test_a_cross_join_sees_the_pairs_of_all_shards(exact: Exact) -> None:
    exact(select(Account.id, Event.id).join(Event, true()))
    one, two = aliased(Account), aliased(Account)
    exact(select(one.id, two.id).join(two, true()))
    exact(select(func.count()).select_from(one).join(two, true()))


def test_a_self_join_that_is_not_on_the_key(exact: Exact) -> None:
    one, two = aliased(Account), aliased(Account)
    exact(select(one.id, two.id).join(two, one.v == two.v))
    exact(select(one.id, two.id).join(two, and_(one.v == two.v, one.id < two.id)))


def test_a_join_with_a_table_that_is_not_colocated(exact: Exact) -> None:
    on = Event.account_id == Account.id
    exact(select(Account.id, Event.id).join(Event, on))
    exact(select(Account.id, Event.id).outerjoin(Event, on))
    exact(select(Event.id, Account.name).outerjoin(Account, on))
    grouped = select(Account.id, func.count(Event.id)).outerjoin(Event, on)
    exact(grouped.group_by(Account.id))


def test_a_join_through_a_table_that_is_not_colocated(exact: Exact) -> None:
    statement = (
        select(Account.id, Label.label, Purchase.id)
        .join(Label, Label.account_id == Account.id)
        .join(Purchase, Purchase.account_id == Label.account_id)
    )
    exact(statement)


def test_a_pinned_row_joined_with_one_elsewhere(exact: Exact, twins: Twins) -> None:
    for key in apart(twins, 4):
        on = Event.account_id == Account.id
        statement = select(Account.id, Event.id).outerjoin(Event, on)
        exact(statement.where(Account.id == key), trap=False)


def test_reference_rows_of_an_outer_join_are_counted_once(exact: Exact) -> None:
    on = Account.region_code == Region.code
    exact(select(Region.code, Account.id).outerjoin(Account, on))
    counts = select(Region.code, func.count(Account.id)).outerjoin(Account, on)
    exact(counts.group_by(Region.code))
    exact(select(func.count()).select_from(Region).outerjoin(Account, on))


def test_reference_rows_alone_are_counted_once(exact: Exact) -> None:
    exact(select(func.count()).select_from(Region))
    exact(select(Region.code).order_by(Region.code), order="total")
    exact(select(Region.code).where(exists().where(Account.region_code == Region.code)))
    exact(
        select(Region.code).where(~exists().where(Account.region_code == Region.code))
    )


def test_full_join_blanks_once(exact: Exact) -> None:
    on = Account.region_code == Region.code
    exact(select(Account.id, Region.code).join(Region, on, full=True))
    on = Event.account_id == Account.id
    exact(select(Account.id, Event.id).join(Event, on, full=True))
    on = and_(Purchase.account_id == Account.id, Purchase.v == Account.v)
    exact(select(Account.id, Purchase.id).join(Purchase, on, full=True), trap=False)


def test_a_left_join_whose_criterion_is_never_true(exact: Exact) -> None:
    exact(select(Region.code, Account.id).outerjoin(Account, Account.id == -77))


def test_a_home_table_beside_sharded_ones(exact: Exact) -> None:
    on = Memo.account_id == Account.id
    exact(select(Memo.id, Account.name).join(Account, on))
    exact(select(Memo.id, Account.name).outerjoin(Account, on))
    exact(
        select(Account.id, func.count(Memo.id)).outerjoin(Memo, on).group_by(Account.id)
    )


def test_keys_of_different_types_are_not_colocated(exact: Exact) -> None:
    exact(
        select(Label.label, Region.code).join(Region, Region.name == Label.label),
        trap=False,
    )
    exact(select(Account.id, Party.v).join(Party, Party.id == Account.id), trap=False)
    exact(
        select(Device.code, Account.id).join(Account, Account.id == Device.account_id)
    )


# -- subqueries --------------------------------------------------------------------


def test_exists_on_another_shard(exact: Exact) -> None:
    event = exists().where(Event.account_id == Account.id)
    exact(select(Account.id).where(event))
    exact(select(Account.id).where(~event))
    exact(select(func.count()).where(event).select_from(Account))


def test_exists_that_is_not_correlated(exact: Exact) -> None:
    some = exists(select(Label.label).where(Label.label == "a"))
    exact(select(Account.id).where(some))
    exact(select(Account.id).where(~some))
    exact(select(some))


def test_in_a_subquery_of_another_key(exact: Exact) -> None:
    ids = select(Event.account_id).where(Event.v > 1)
    exact(select(Account.id).where(Account.id.in_(ids)))
    exact(select(Account.id).where(Account.v.in_(select(Purchase.v))))


def test_not_in_with_a_null_on_another_shard(exact: Exact) -> None:
    exact(
        select(Account.id).where(Account.id.not_in(select(Event.account_id))),
        trap=False,
    )
    exact(select(Account.id).where(Account.v.not_in(select(Purchase.v))), trap=False)
    clean = select(Event.account_id).where(Event.account_id.is_not(None))
    exact(select(Account.id).where(Account.id.not_in(clean)))


def test_any_and_all_of_a_subquery(exact: Exact) -> None:
    values = select(Event.v).where(Event.v.is_not(None)).scalar_subquery()
    exact(select(Account.id).where(Account.v > sa.any_(values)), trap=False)
    exact(select(Account.id).where(Account.v >= sa.all_(values)))


def test_a_scalar_subquery_is_not_per_shard(exact: Exact) -> None:
    last = select(func.max(Purchase.placed)).scalar_subquery()
    exact(select(Purchase.id, last))
    exact(select(Purchase.id).where(Purchase.placed == last))
    exact(select(Account.id, select(func.count(Event.id)).scalar_subquery()))
    mine = select(func.count(Event.id)).where(Event.account_id == Account.id)
    exact(select(Account.id, mine.scalar_subquery()))
    average = select(func.avg(Account.v)).scalar_subquery()
    other = aliased(Account)
    exact(select(other.id).where(other.v > average))


def test_a_correlated_count_beside_its_row(exact: Exact) -> None:
    mine = select(func.count(Purchase.id)).where(Purchase.account_id == Account.id)
    counted = mine.correlate(Account).scalar_subquery()
    exact(select(Account.id, counted), trap=False)
    statement = select(Account.id).order_by(counted.desc(), Account.id)
    exact(statement.limit(3), order="total")


def test_a_semi_join_repeats_no_row(exact: Exact) -> None:
    ids = select(Purchase.account_id).where(Purchase.v > 0)
    exact(select(Account.id).where(Account.id.in_(ids)), trap=False)
    exact(select(func.count()).where(Account.id.in_(ids)))
    events = select(Event.account_id)
    exact(select(Account.id, Account.name).where(Account.id.in_(events)))


@pytest.mark.parametrize("inner", [Purchase, Event])
def test_the_first_rows_of_each_row(exact: Exact, inner: Any) -> None:
    side = (
        select(inner.id, inner.v)
        .where(inner.account_id == Account.id)
        .order_by(inner.v.desc().nulls_last(), inner.id)
        .limit(2)
        .lateral()
    )
    trap = inner is Event
    exact(select(Account.id, side.c.id).join(side, true()), trap=trap)
    exact(select(Account.id, side.c.id).outerjoin(side, true()), trap=trap)


# -- CTEs and sets -----------------------------------------------------------------


def test_a_cte_is_one_for_all_shards(exact: Exact) -> None:
    totals = select(Account.v, func.count().label("n")).group_by(Account.v).cte()
    exact(select(totals.c.v, totals.c.n))
    most = select(func.max(totals.c.n)).scalar_subquery()
    exact(select(totals.c.v).where(totals.c.n == most))
    other = totals.alias()
    exact(select(totals.c.v, other.c.v).join(other, totals.c.n == other.c.n))


def test_a_recursive_cte_over_rows_of_all_shards(exact: Exact) -> None:
    chain = (
        select(Purchase.id, literal(0).label("depth"))
        .where(Purchase.parent_id.is_(None))
        .cte(recursive=True)
    )
    child = aliased(Purchase)
    step = select(child.id, chain.c.depth + 1).join(
        chain, child.parent_id == chain.c.id
    )
    chain = chain.union_all(step)
    exact(select(chain), trap=False)
    exact(select(chain.c.depth, func.count()).group_by(chain.c.depth))


def test_union_removes_duplicates_of_different_shards(exact: Exact) -> None:
    both = union(select(Account.v), select(Purchase.v))
    exact(both)
    exact(both.order_by("v").limit(3), order="total")
    exact(select(func.count()).select_from(both.subquery()))


def test_union_all_keeps_duplicates(exact: Exact) -> None:
    both = union_all(select(Account.v), select(Event.v))
    exact(both, trap=False)
    exact(both.order_by("v").limit(5), order="total")
    exact(union_all(select(Account.v), select(Region.v)))


@pytest.mark.parametrize("operation", [intersect, except_, intersect_all, except_all])
def test_sets_are_not_taken_per_shard(exact: Exact, operation: Any) -> None:
    exact(operation(select(Account.v), select(Purchase.v).where(Purchase.v > 1)))
    exact(operation(select(Account.id), select(Event.account_id)), trap=False)


def test_nested_sets(exact: Exact) -> None:
    inner = union(select(Account.v), select(Purchase.v))
    exact(except_(inner, select(Event.v).where(Event.v > 2)))
    exact(union_all(select(Account.v).limit(0), inner))


def test_values_joined_with_rows_of_all_shards(exact: Exact) -> None:
    given = sa.values(
        sa.column("k", BigInteger), sa.column("w", sa.String), name="given"
    ).data([(1, "a"), (2, "b"), (2**33, "c")])
    exact(select(given.c.w, Account.id).outerjoin(Account, Account.id == given.c.k))
    exact(
        select(given.c.w, Account.id).join(Account, Account.id == given.c.k), trap=False
    )


def test_a_series_joined_with_rows_of_all_shards(exact: Exact) -> None:
    series = func.generate_series(0, 6).table_valued("n").render_derived()
    statement = (
        select(series.c.n, func.count(Account.id))
        .select_from(series)
        .outerjoin(Account, Account.v == series.c.n)
        .group_by(series.c.n)
    )
    exact(statement)


def test_unnested_arrays_are_counted_over_all_shards(exact: Exact) -> None:
    each = func.unnest(Purchase.tags).table_valued("tag").render_derived()
    tags = select(each.c.tag).select_from(Purchase).join(each, true())
    exact(tags, trap=False)
    counts = tags.add_columns(func.count().label("n")).group_by(each.c.tag)
    exact(counts.order_by(sa.desc("n"), each.c.tag), order="total")


# -- time ----------------------------------------------------------------------------


def test_a_transaction_has_one_time_on_all_shards(twins: Twins, exact: Exact) -> None:
    with twins.sharded() as session:
        times = set(session.scalars(select(func.now()).select_from(Account)))
        times.add(session.scalar(select(func.now())))
        times |= set(
            session.scalars(select(func.current_timestamp()).where(Account.v > 0))
        )
        assert len(times) == 1
        grouped = select(func.now(), func.count()).select_from(Account)
        assert len(session.execute(grouped.group_by(func.now())).all()) == 1


def test_comparing_with_now(exact: Exact) -> None:
    exact(select(func.count()).where(Account.joined < func.now()))
    exact(select(Account.id).where(Account.joined < func.now()), trap=False)


def test_volatile_functions_are_not_asked_of_every_shard(
    twins: Twins, exact: Exact
) -> None:
    with twins.sharded() as session:
        with refusable():
            shuffled = select(Account.id).order_by(func.random()).limit(3)
            assert len(set(session.scalars(shuffled))) == 3
        with refusable():
            ids = session.scalars(select(func.gen_random_uuid()).select_from(Account))
            assert len(set(ids)) == len(twins.rows[Account.__table__])


def test_days_are_those_of_the_session_s_time_zone(exact: Exact) -> None:
    for unit in ("day", "month", "year", "hour"):
        by = func.date_trunc(unit, Event.at)
        exact(select(by, func.count()).group_by(by))
    exact(select(cast(Event.at, sa.Date).label("d")).distinct())
    exact(select(func.min(Event.at), func.max(Event.at)))
    shown = func.to_char(Event.at, "YYYY-MM-DD HH24:MI TZ")
    exact(select(shown, Event.id).order_by(shown, Event.id), order="total")
    local = datetime.datetime(2023, 12, 31, 22)
    exact(select(func.count()).where(Event.at > local))


@pytest.mark.parametrize(
    "setting",
    [
        text("SET LOCAL TIME ZONE 'Asia/Tokyo'"),
        text("SET LOCAL timezone TO 'Asia/Tokyo'"),
        select(func.set_config("timezone", "Asia/Tokyo", True)),
    ],
    ids=str,
)
def test_a_setting_of_the_transaction_holds_on_all_shards(
    alike: Callable[..., Any], setting: Any
) -> None:
    def work(session: Any) -> Any:
        session.execute(setting)
        shown = func.to_char(Event.at, "YYYY-MM-DD HH24:MI TZ")
        return sorted(map(tuple, session.execute(select(Event.id, shown))))

    alike(work, refusable=True)


# -- the ORM -----------------------------------------------------------------------


@pytest.mark.parametrize("load", [joinedload, selectinload])
def test_collections_under_limit(exact: Exact, load: Any) -> None:
    statement = select(Account).options(load(Account.purchases))
    statement = statement.order_by(Account.v, Account.id).limit(3)
    exact(statement, order="total", unique=True)
    exact(statement.offset(2), order="total", unique=True)


def test_a_collection_whose_rows_are_on_other_shards(exact: Exact) -> None:
    for load in (joinedload, selectinload):
        statement = select(Account).options(load(Account.events))
        exact(statement, unique=True)


def test_contains_eager_over_shards(exact: Exact) -> None:
    statement = (
        select(Account)
        .join(Account.purchases)
        .options(contains_eager(Account.purchases))
        .order_by(Account.id, Purchase.id)
    )
    exact(statement, order="total", unique=True)


def test_a_page_and_its_count(alike: Callable[..., Any]) -> None:
    def work(session: Any) -> Any:
        rows = select(Account).where(Account.v > 0)
        count = session.scalar(select(func.count()).select_from(rows.subquery()))
        pages = [
            session.scalars(
                rows.order_by(Account.v, Account.id).limit(3).offset(n)
            ).all()
            for n in range(0, count, 3)
        ]
        return count, [[account.id for account in page] for page in pages]

    alike(work)


def test_relationships_in_criteria(exact: Exact) -> None:
    exact(select(Account.id).where(Account.events.any()))
    exact(select(Account.id).where(~Account.events.any(Event.v > 2)))
    exact(select(func.count()).where(Account.purchases.any()).select_from(Account))
    exact(select(Region.code).where(Region.accounts.any(Account.v > 2)))


def test_composites_and_enums_in_criteria(exact: Exact) -> None:
    exact(select(func.count()).where(Specimen.point == Point(0, 1)))
    exact(select(func.count()).where(Account.status > Status.NEW))


def test_one_object_for_one_row(alike: Callable[..., Any]) -> None:
    def work(session: Any) -> Any:
        statement = select(Purchase).options(joinedload(Purchase.account))
        rows = session.scalars(statement.order_by(Purchase.id)).all()
        return len({id(row.account) for row in rows}), len(rows)

    alike(work)


# -- writes ------------------------------------------------------------------------


def test_many_new_rows_are_each_on_one_shard(alike: Callable[..., Any]) -> None:
    rows = [{"label": f"new {n}", "v": n} for n in range(12)]

    def in_values(session: Any) -> Any:
        session.execute(insert(Label).values(rows))
        return stored(session, Label.__table__)

    def in_parameters(session: Any) -> Any:
        session.execute(insert(Label), rows)
        return stored(session, Label.__table__)

    def as_objects(session: Any) -> Any:
        session.add_all(Label(**row) for row in rows)
        session.flush()
        return stored(session, Label.__table__)

    assert alike(as_objects) == alike(in_parameters) == alike(in_values)


def test_an_update_with_a_limited_subquery(alike: Callable[..., Any]) -> None:
    first = select(Account.id).order_by(Account.v, Account.id).limit(3)

    def work(session: Any) -> Any:
        session.execute(
            update(Account).where(Account.id.in_(first)).values(v=100),
            execution_options={"synchronize_session": False},
        )
        return stored(session, Account.__table__)

    alike(work, refusable=True)


def test_an_update_and_a_delete_on_all_shards(alike: Callable[..., Any]) -> None:
    def work(session: Any) -> Any:
        options = {"synchronize_session": False}
        changed = update(Label).where(Label.v > 1).values(v=Label.v + 1)
        first = session.execute(changed, execution_options=options).rowcount
        gone = delete(Label).where(Label.v > 4)
        second = session.execute(gone, execution_options=options).rowcount
        return first, second, stored(session, Label.__table__)

    alike(work, refusable=True)


def test_an_update_with_a_scalar_subquery(alike: Callable[..., Any]) -> None:
    top = select(func.max(Purchase.total)).scalar_subquery()

    def work(session: Any) -> Any:
        session.execute(
            update(Account).where(Account.id == 1).values(balance=top),
            execution_options={"synchronize_session": False},
        )
        return stored(session, Account.__table__)

    alike(work, refusable=True)


def test_a_savepoint_is_rolled_back_on_all_shards(alike: Callable[..., Any]) -> None:
    def work(session: Any) -> Any:
        session.add_all(Label(label=f"kept {n}", v=n) for n in range(6))
        session.flush()
        nested = session.begin_nested()
        session.add_all(Label(label=f"lost {n}", v=n) for n in range(12))
        session.add(Account(id=10**6, name="lost"))
        session.flush()
        nested.rollback()
        found = session.scalars(
            select(Label.label).where(Label.label.like("lost%"))
        ).all()
        return (
            found,
            stored(session, Label.__table__),
            stored(session, Account.__table__),
        )

    alike(work)


def test_a_statement_sees_what_its_transaction_wrote(alike: Callable[..., Any]) -> None:
    def work(session: Any) -> Any:
        session.add_all(Account(id=10**6 + n, name="new", v=n) for n in range(8))
        new = Account.name == "new"
        return (
            session.scalar(select(func.sum(Account.v)).where(new)),
            session.scalars(
                select(Account.id).where(new).order_by(Account.v.desc()).limit(3)
            ).all(),
            session.scalar(select(func.count(distinct(Account.v))).where(new)),
        )

    alike(work)


def test_workers_take_different_rows_of_a_queue(twins: Twins, exact: Exact) -> None:
    taking = (
        select(Account.id)
        .where(Account.v.is_not(None))
        .order_by(Account.v, Account.id)
        .limit(2)
        .with_for_update(skip_locked=True)
    )

    def taken(maker: Any) -> list[Any]:
        with maker() as one, maker() as two:
            return [list(one.scalars(taking)), list(two.scalars(taking))]

    with refusable():
        assert taken(twins.sharded) == taken(twins.plain)


def test_locked_rows_are_those_that_are_returned(twins: Twins, exact: Exact) -> None:
    first = select(Account.id).order_by(Account.id).limit(3)
    rest = select(Account.id).with_for_update(skip_locked=True)

    def left(maker: Any) -> list[Any]:
        with maker() as one, maker() as two:
            one.execute(first.with_for_update()).all()
            return sorted(two.scalars(rest))

    with refusable():
        assert left(twins.sharded) == left(twins.plain)


# -- collation, for `test_collation` as well -------------------------------------------


def test_words_are_told_apart(twins: Twins, exact: Exact) -> None:
    accounts = [
        {"id": 100 + n, "name": word, "v": n % 3} for n, word in enumerate(WORDS * 2)
    ]
    twins.load({Account.__table__: accounts})
    twins.dataset = "words"
    demand_words(demanding(twins))


def demand_words(exact: Exact) -> None:
    """Demand all that depends on how words are compared."""
    name = Account.name
    exact(select(name, Account.id).order_by(name, Account.id), order="total")
    exact(select(name, Account.id).order_by(name.desc(), Account.id), order="total")
    exact(select(name).order_by(name).limit(7), order="total")
    exact(select(name).order_by(name.collate("C")).limit(7), order="total")
    exact(
        select(name, Account.id).order_by(func.upper(name), Account.id), order="total"
    )
    exact(select(func.min(name), func.max(name), func.count(distinct(name))))
    exact(select(func.max(name.collate("C")), func.min(func.lower(name))))
    exact(select(name).distinct().order_by(name), order="total")
    exact(select(name, func.count()).group_by(name).order_by(name), order="total")
    exact(select(func.lower(name), func.count()).group_by(func.lower(name)))
    exact(select(Account.v, func.max(name)).group_by(Account.v))
    joined = func.string_agg(
        cast(name, Text), aggregate_order_by(literal("|"), name, Account.id)
    )
    exact(select(joined))
    exact(select(func.percentile_disc(0.5).within_group(name)))
    exact(select(func.mode().within_group(name)))
    exact(select(name, func.rank().over(order_by=name), Account.id))
    exact(select(func.count()).where(name < "b"))
    exact(select(func.count()).where(name.between("a", "z")))
    exact(union(select(name), select(name + "")).order_by("name"), order="total")
    first = select(name, Account.id).order_by(name, Account.id)
    exact(distinct_on(first, name), order="total")
    other = aliased(Account)
    larger = select(func.count()).where(other.name < name).correlate(Account)
    exact(select(Account.id, larger.scalar_subquery()))
