"""Statements that the planner once answered wrongly, or failed on where plain answers.

Each runs against one plain PostgreSQL and a cluster of four shards that hold the same
rows. It must give the same on both, or be refused.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    DDL,
    BigInteger,
    Integer,
    String,
    Text,
    case,
    cast,
    column,
    desc,
    distinct,
    event,
    exists,
    extract,
    func,
    lambda_stmt,
    literal_column,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from shardalchemy import sharded_by
from shardalchemy.local import LocalCluster
from tests.differential.models import Account, Event, Item, Purchase, Region, Specimen
from tests.differential.twins import Case, Twins

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")

A, P = Account, Purchase


class OddBase(DeclarativeBase):
    pass


class Named(sa.types.UserDefinedType[Any]):
    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


class Shown(sa.TypeDecorator[int]):
    """An int that is read as one more than what is stored."""

    impl = Integer
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return type_coerce(column, Integer) + 1


class Odd(OddBase):
    __tablename__ = "pr_odd"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    pair: Mapped[str | None] = mapped_column(Named("pr_pair"))
    box: Mapped[str | None] = mapped_column(Named("box"))
    many: Mapped[str | None] = mapped_column(Named("pr_list"))
    shown: Mapped[int | None] = mapped_column(Shown)


class Lowered(sa.TypeDecorator[str]):
    """A text that is read in lower case."""

    impl = Text
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return func.lower(column, type_=Text())


class Word(OddBase):
    __tablename__ = "pr_words"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    word: Mapped[str] = mapped_column(Lowered)
    doc: Mapped[Any | None] = mapped_column(sa.JSON)


class Here(OddBase):
    __tablename__ = "pr_same"
    __table_args__ = {"schema": "pr_one", "info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]


class There(OddBase):
    __tablename__ = "pr_same"
    __table_args__ = {"schema": "pr_two", "info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]


class Numbered(OddBase):
    __tablename__ = "pr_numbered"
    __table_args__ = {"info": sharded_by("v_2")}
    v_2: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]


@event.listens_for(OddBase.metadata, "before_create")
def make_types(_: Any, connection: sa.Connection, **__: Any) -> None:
    for sql in (
        "CREATE SCHEMA IF NOT EXISTS pr_one",
        "CREATE SCHEMA IF NOT EXISTS pr_two",
        "DROP TYPE IF EXISTS pr_pair, pr_list",
        "CREATE TYPE pr_pair AS (a int, b text)",
        "CREATE DOMAIN pr_list AS int[]",
    ):
        connection.exec_driver_sql(sql)


ODD_ROWS: dict[Any, list[dict[str, Any]]] = {
    Odd.__table__: [
        {
            "id": n,
            "pair": ["(1,x)", '(2,"a,b")', "(,)", None][n % 4],
            "box": ["(1,1),(0,0)", None, "(3,3),(2,2)"][n % 3],
            "many": ["{1,2}", "{}", None, "{3,NULL}"][n % 4],
            "shown": n % 3,
        }
        for n in range(1, 25)
    ],
    Here.__table__: [{"id": n, "v": n % 7} for n in range(1, 20)],
    Numbered.__table__: [{"v_2": n, "v": n % 3} for n in range(1, 9)],
    Word.__table__: [
        {"id": n, "word": "aAbBcC"[n % 6], "doc": {"a": n % 4}} for n in range(1, 40)
    ],
    There.__table__: [{"id": n, "v": n % 5 + 4} for n in range(3, 30)],
}


@pytest.fixture(scope="module")
def twins(shard_servers: LocalCluster) -> Iterator[Twins]:
    with Twins(shard_servers, timezone="Asia/Kolkata") as made:
        made.fill("mixed", 1)
        yield made


@pytest.fixture(scope="module")
def odd(shard_servers: LocalCluster) -> Iterator[Twins]:
    with Twins(shard_servers, OddBase.metadata) as made:
        made.load(ODD_ROWS)
        yield made


def demand(
    twins: Twins,
    statement: Any,
    *,
    ordered: bool = False,
    before: Callable[[Any], None] | None = None,
) -> None:
    """Demand the same rows of both sides, after *before* has been done in both."""
    case = Case(statement, order="total" if ordered else ())
    if before is not None:

        def work(session: Any) -> Any:
            before(session)
            rows = [repr(tuple(row)) for row in session.execute(statement)]
            return rows if ordered else sorted(rows)

        case.work = work
    outcome = twins.judge(case)
    assert outcome.word in ("equal", "refused"), outcome.detail


def setting(*statements: str) -> Callable[[Any], None]:
    def make(session: Any) -> None:
        for statement in statements:
            session.execute(text(statement))

    return make


# Once wrong: correlated by a table that a SELECT further in reads as well.
@pytest.mark.parametrize("shape", ["scalar", "exists"])
def test_a_correlation_beside_another_use_of_the_table(
    twins: Twins, shape: str
) -> None:
    inner = select(A.id).where(A.v > 1).correlate(None)
    wanted = P.v == A.v, P.account_id.in_(inner)
    if shape == "scalar":
        counted = select(func.count(P.id)).where(*wanted).scalar_subquery()
        demand(twins, select(A.id, counted))
    else:
        demand(twins, select(A.id).where(select(P.id).where(*wanted).exists()))


# Once wrong: rows that were equal, but not the same, were sent once.
@pytest.mark.parametrize(
    "expression",
    [
        func.count(distinct(cast(Specimen.n_free, String))),
        func.max(func.length(cast(Specimen.n_free, String))),
    ],
)
def test_equal_values_that_can_be_told_apart(twins: Twins, expression: Any) -> None:
    demand(twins, select(expression))


# Once wrong: what SQL takes for a position, or the name of a result's column.
@pytest.mark.parametrize(
    "statement",
    [
        select(A.id, A.name).order_by(literal_column("2"), A.id),
        select(A.id, A.name).order_by(desc(literal_column("1"))),
        select(A.id, A.name).order_by(literal_column("1 desc")),
        select((-A.id).label("id")).order_by(literal_column("id")),
        select((-A.id).label("id")).order_by(column("id")),
        select((-A.id).label("x")).order_by(literal_column("x")),
        select((-A.id).label("x")).order_by(column("x")),
    ],
)
def test_an_order_by_position_or_output_name(twins: Twins, statement: Any) -> None:
    demand(twins, statement, ordered=True)


# Once wrong: a name was taken for a selected column's.
def test_an_order_by_a_name_of_two_tables(twins: Twins) -> None:
    joined = select(P.v, P.id, Item.no).join(Item, Item.purchase_id == P.id)
    demand(twins, joined.order_by("v", "id", "no"), ordered=True)


# Once an error: the name of a column that is not selected.
def test_an_order_by_a_name_that_is_not_selected(twins: Twins) -> None:
    demand(twins, select(A.id).order_by("name", "id"), ordered=True)


# Once wrong: GROUP BY takes a name for an input column, where there is one.
def test_a_group_by_a_name_of_two_things(twins: Twins) -> None:
    lower = func.lower(A.name).label("name")
    demand(twins, select(lower, func.count()).group_by("name"))


# Once an error.
def test_a_limit_and_offset_beyond_a_bigint(twins: Twins) -> None:
    demand(twins, select(A.id).order_by(A.id).limit(2**63 - 1).offset(2), ordered=True)


def test_a_group_by_the_key_of_a_reference_table(twins: Twins) -> None:
    joined = select(Region.code, Region.name, func.count(A.id)).join(
        A, A.region_code == Region.code
    )
    demand(twins, joined.group_by(Region.code))


@pytest.mark.parametrize("kind", ["subquery", "cte"])
def test_a_column_twice_in_a_subquery(twins: Twins, kind: str) -> None:
    made = getattr(select(A.id, A.id, A.v).order_by(A.id).limit(100), kind)()
    demand(twins, select(*made.c))


@pytest.mark.parametrize("kind", ["scatter", "combine", "order", "gather"])
def test_a_lambda_statement_on_several_shards(twins: Twins, kind: str) -> None:
    statement = {
        "scatter": lambda_stmt(lambda: select(A.id)),
        "combine": lambda_stmt(lambda: select(func.count(A.id))),
        "order": lambda_stmt(lambda: select(A.id).order_by(A.name, A.id)),
        "gather": lambda_stmt(lambda: select(A.id, func.rank().over(order_by=A.v))),
    }[kind]
    demand(twins, statement)


# Once wrong: a composite value was taken apart, and gave its neighbours' columns.
@pytest.mark.parametrize("name", ["pair", "box", "many", "shown"])
def test_columns_of_odd_types(odd: Twins, name: str) -> None:
    value = getattr(Odd, name)
    demand(odd, select(Odd.id, value).order_by(Odd.id), ordered=True)
    demand(odd, select(cast(value, Text), func.row_number().over(order_by=Odd.id)))
    demand(odd, select(func.count(value), func.count(distinct(cast(value, Text)))))


# Once wrong: a sum lost what the column's type adds in the outermost SELECT.
def test_a_sum_of_a_type_with_a_column_expression(odd: Twins) -> None:
    demand(odd, select(func.sum(Odd.shown)))
    demand(odd, select(func.sum(Odd.shown).filter(Odd.shown == 2)))
    demand(odd, select(func.sum(case((Odd.shown == 2, Odd.shown), else_=1))))


# Once wrong: the rows of both stood under one name.
def test_tables_of_one_name_in_two_schemas(odd: Twins) -> None:
    demand(odd, select(Here.id).where(exists().where(There.v == Here.v, There.id > 3)))
    demand(odd, select(Here.id, There.id).join(There, There.v == Here.v))
    demand(odd, select(func.sum(Here.v * There.v)).join(There, There.v == Here.v))


# Once wrong: values are sent as text, which settings write in ways that read otherwise.
@pytest.mark.parametrize("style", ["SQL, DMY", "Postgres, MDY", "German"])
def test_times_under_another_datestyle(twins: Twins, style: str) -> None:
    before = setting(f"SET LOCAL datestyle = '{style}'")
    epoch = extract("epoch", A.joined)
    demand(twins, select(epoch, func.row_number().over(order_by=A.id)), before=before)
    demand(twins, select(extract("epoch", func.max(A.joined))), before=before)
    apart = extract("epoch", func.now()) - extract("epoch", func.clock_timestamp())
    demand(twins, select(func.abs(apart) < 600, A.id), before=before)


@pytest.mark.parametrize("digits", [-15, -5])
def test_sums_under_fewer_digits(twins: Twins, digits: int) -> None:
    before = setting(f"SET LOCAL extra_float_digits = {digits}")
    demand(
        twins,
        select(func.sum(A.score * A.id), func.avg(A.score)),
        before=before,
    )


def test_nulls_under_array_nulls_off(twins: Twins) -> None:
    statement = select(A.id, A.email).order_by(A.id)
    demand(
        twins, statement, ordered=True, before=setting("SET LOCAL array_nulls = off")
    )


# Once wrong: a setting that was not seen to be one was made on the home shard alone.
@pytest.mark.parametrize(
    "made",
    [
        text("SELECT set_config('timezone', 'Asia/Tokyo', true)"),
        text("WITH x AS (SELECT set_config('timezone', 'Asia/Tokyo', true)) TABLE x"),
        text("/* why */ SET LOCAL timezone = 'Asia/Tokyo'"),
        text("-- why\nSET LOCAL timezone = 'Asia/Tokyo'"),
        DDL("SET LOCAL timezone = 'Asia/Tokyo'"),
    ],
)
def test_settings_in_other_words(twins: Twins, made: Any) -> None:
    demand(
        twins,
        select(A.id, cast(A.joined, Text)),
        before=lambda session: session.execute(made),
    )


# Once wrong: it was rolled back with the savepoint in which a shard was first reached.
def test_a_setting_before_a_savepoint(twins: Twins) -> None:
    def before(session: Any) -> None:
        session.execute(text("SET LOCAL timezone = 'Asia/Tokyo'"))
        nested = session.begin_nested()
        session.execute(select(A.id)).all()
        nested.rollback()

    demand(twins, select(A.id, cast(A.joined, Text)), before=before)


@pytest.fixture(scope="module")
def with_functions(twins: Twins) -> Twins:
    body = "LANGUAGE sql STABLE AS 'SELECT count(*) FROM df_accounts WHERE v = $1'"
    for engine in (twins.engine, *twins.shards.values()):
        with engine.begin() as connection:
            for sql in (
                f'CREATE FUNCTION "pr_like"(int) RETURNS bigint {body}',
                f"CREATE FUNCTION lower(int) RETURNS bigint {body}",
                f"CREATE FUNCTION pr_op(int, int) RETURNS bigint {body}",
                "CREATE OPERATOR <#> (LEFTARG=int, RIGHTARG=int, FUNCTION=pr_op)",
            ):
                connection.exec_driver_sql(sql)
    twins.forget()  # what a cluster has learnt of functions
    return twins


# Once wrong: what reads a sharded table was evaluated by each shard.
@pytest.mark.parametrize(
    "statement",
    [
        select(A.id).order_by(text('"pr_like"(v)'), A.id),
        select(A.id).where(text('"pr_like" (v) > 1')),
        select(A.id, func.lower(A.v)),
        select(A.id, A.v.op("<#>")(0)),
        select(A.id).where(A.v.op("<#>")(0) > 1),
        select(Event.id, func.max(A.v.op("<#>")(0)).over()).join(
            A, A.id == Event.account_id
        ),
    ],
)
def test_functions_that_read_tables(with_functions: Twins, statement: Any) -> None:
    demand(with_functions, statement, ordered="ORDER BY" in str(statement))


# Once wrong: the expression of a mapped property was changed by planning a statement.
def test_a_mapped_expression_stays_as_it_is(twins: Twins) -> None:
    statement = select(A.titled, func.count()).group_by(A.titled)
    before = str(statement.compile(twins.engine))
    demand(twins, statement)
    again = select(A.titled, func.count()).group_by(A.titled)
    assert str(again.compile(twins.engine)) == before
    demand(twins, again.order_by(A.titled), ordered=True)


# Once wrong: SELECT * gave the columns that other clauses had named.
@pytest.mark.parametrize("star", [text("*"), literal_column("*")])
def test_a_star(twins: Twins, star: Any) -> None:
    demand(twins, select(star).select_from(A))
    demand(twins, select(star).select_from(A).order_by(A.id), ordered=True)
    demand(twins, select(star).select_from(A).join(Event, Event.account_id == A.id))


# Once wrong: of a whole row there were the columns that other clauses had named.
def test_whole_rows(twins: Twins) -> None:
    account, events = A.__table__.table_valued(), Event.__table__.table_valued()
    demand(twins, select(A.id, func.to_jsonb(account)))
    demand(twins, select(func.to_jsonb(account), func.rank().over(order_by=A.v)))
    joined = select(func.to_jsonb(account), Event.id)
    demand(twins, joined.join(Event, Event.account_id == A.id))
    found = select(func.jsonb_agg(aggregate_order_by(events, Event.id)))
    mine = found.where(Event.account_id == A.id).scalar_subquery()
    demand(twins, select(A.id, mine))


# Once wrong: a column without a table was not brought, and another had its name.
def test_columns_without_a_table(twins: Twins) -> None:
    inner = select(sa.literal(1)).select_from(Event).where(Event.account_id == A.id)
    demand(twins, select(A.id).where(A.v > 0, inner.where(column("v") == 3).exists()))
    demand(twins, select(column("id"), func.rank().over(order_by=A.v)).select_from(A))
    demand(twins, select(func.count(distinct(column("v")))).select_from(A))
    counted = select(A.v, func.count().label("n")).group_by(A.v)
    demand(twins, counted.having(column("v") > 2))
    demand(twins, counted.order_by(column("n"), A.v), ordered=True)
    value = func.unnest(P.tags).column_valued("value")
    demand(twins, select(P.id, value))


# Once wrong: the types that parameters had the first time were those of all times.
def test_untyped_parameters_of_other_types(twins: Twins) -> None:
    statement = select(A.id, sa.bindparam("x")).order_by(A.id)
    moment = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    for value in (5, [1, 2], 2**40, "abc", 2.5, True, moment, moment.date(), None):
        outcome = twins.judge(Case(statement, order="total", params={"x": value}))
        assert outcome.word in ("equal", "refused"), outcome.detail


# Once wrong: the map was not used by what is combined or gathered.
@pytest.mark.parametrize(
    "statement",
    [
        select(func.count()).select_from(Here),
        select(Here.id).order_by(Here.id),
        select(func.rank().over(order_by=Here.v)),
    ],
)
def test_a_schema_translate_map(odd: Twins, statement: Any) -> None:
    options = {"schema_translate_map": {"pr_one": "pr_two"}}
    outcome = odd.judge(Case(statement, options=options))
    assert outcome.word in ("equal", "refused"), outcome.detail


# Once wrong: the precision was left out.
def test_the_time_without_fractions(twins: Twins) -> None:
    whole = func.current_timestamp(literal_column("0"))
    demand(twins, select(func.date_trunc("second", whole) == whole, A.id))
    even = select(A.id, func.date_trunc("second", whole) == whole)
    demand(twins, even.order_by(A.id), ordered=True)


# Once an error: the name made for one of two columns was that of a third.
def test_names_like_those_that_are_made(odd: Twins) -> None:
    other = aliased(Numbered)
    joined = select(Numbered.v_2, Numbered.v, other.v, func.count().over())
    demand(odd, joined.join(other, other.v_2 == Numbered.v_2))


# Once wrong: the name of a result's column was taken for the column, not for what its
# type makes of it.
def test_names_of_columns_with_a_column_expression(odd: Twins) -> None:
    named = Word.word.label("named")
    for statement in (
        select(named).order_by("named"),
        select(named).order_by(named),
        select(named).order_by(text("1")),
        select(named).order_by("named").fetch(3, with_ties=True),
        select(named).distinct().order_by("named"),
        select(named, func.count()).group_by(Word.word).order_by("named", func.count()),
    ):
        demand(odd, statement, ordered=True)
    demand(odd, select(named, func.count()).group_by("named"))


# Once an error: rows were made distinct by what cannot be compared.
def test_distinct_rows_with_a_json_column(odd: Twins) -> None:
    value = Word.doc["a"].as_string()
    demand(odd, select(func.count(distinct(value))))
    demand(odd, select(func.count(distinct(Word.id % 5)), func.max(value)))


# Once wrong: each shard told when the transaction had come to it. (A statement that is
# routed has the time of its shard.)
def test_one_time_of_the_transaction(twins: Twins) -> None:
    def work(session: Any) -> Any:
        times = set(session.scalars(select(func.now()).where(A.id.in_(range(1, 10)))))
        times |= set(session.scalars(select(func.now()).select_from(A)))
        times.add(session.scalar(select(func.max(func.now())).select_from(A)))
        return len(times)

    outcome = twins.judge(Case(None, work=work))
    assert outcome.word in ("equal", "refused"), outcome.detail


# Once wrong: each shard numbered its own rows.
@pytest.mark.parametrize(
    "statement",
    [
        select(A.id).order_by(func.row_number().over(order_by=(A.v.desc(), A.id))),
        select(A.id)
        .order_by(func.row_number().over(order_by=(A.v.desc(), A.id)))
        .limit(4),
        select(A.id).order_by(func.count().over(partition_by=A.v).desc(), A.v, A.id),
        select(A.id).order_by(
            case((func.row_number().over(order_by=A.id) < 5, 0), else_=1), A.id.desc()
        ),
        select(P.account_id)
        .group_by(P.account_id)
        .order_by(func.rank().over(order_by=func.count().desc()), P.account_id),
        select(sa.literal(1)).select_from(A).order_by(func.count()),
        select(func.count()).select_from(
            select(sa.literal(1).label("x"))
            .select_from(A)
            .order_by(func.count())
            .subquery()
        ),
    ],
)
def test_an_order_by_what_is_not_selected(twins: Twins, statement: Any) -> None:
    demand(twins, statement, ordered=True)
