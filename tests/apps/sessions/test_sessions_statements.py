"""Statements over annotated tables: what each reads, writes, streams and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sessions_models import (
    Account,
    Base,
    Country,
    Customer,
    Event,
    Order,
    Reading,
    Setting,
)
from sessions_servers import Servers, keys_on_each_shard
from sqlalchemy import (
    ARRAY,
    Integer,
    bindparam,
    delete,
    event,
    exists,
    func,
    insert,
    inspect,
    lambda_stmt,
    literal,
    null,
    or_,
    select,
    tablesample,
    text,
    union_all,
    update,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import aliased, joinedload, sessionmaker

from shardalchemy import Cluster, ShardedSession, UnsupportedQueryError

Maker = sessionmaker[ShardedSession]


@pytest.fixture
def hundred(Session: Maker) -> range:
    """Customers 0 to 99."""
    with Session.begin() as session:
        session.add_all(Customer(id=n, name=f"c{n}") for n in range(100))
    return range(100)


@pytest.mark.usefixtures("hundred")
def test_iterating_a_unique_result_loses_no_row(session: ShardedSession) -> None:
    result = session.scalars(select(Customer)).unique()
    assert sorted(customer.id for customer in result) == list(range(100))


@pytest.mark.usefixtures("hundred")
def test_iterating_a_unique_result_with_joined_children_loses_no_row(
    session: ShardedSession,
) -> None:
    statement = select(Customer).options(joinedload(Customer.orders))
    result = session.execute(statement).unique()
    assert sorted(row.Customer.id for row in result) == list(range(100))


@pytest.mark.usefixtures("hundred")
def test_iterating_a_legacy_query_loses_no_row(session: ShardedSession) -> None:
    ids = [customer.id for customer in session.query(Customer)]
    assert sorted(ids) == list(range(100))
    pairs = [(c.id, name) for c, name in session.query(Customer, Customer.name)]
    assert len(pairs) == 100


def test_in_with_no_keys_is_empty(session: ShardedSession, hundred: range) -> None:
    assert session.scalars(select(Customer).where(Customer.id.in_([]))).all() == []
    none = select(Customer.id).where(Customer.id.not_in([]))
    assert len(session.scalars(none).all()) == 100


def test_in_with_ten_thousand_keys(session: ShardedSession, hundred: range) -> None:
    wanted = range(-5000, 5000)
    found = session.scalars(select(Customer.id).where(Customer.id.in_(wanted))).all()
    assert sorted(found) == list(hundred)


def test_in_with_keys_twice_gives_each_row_once(
    session: ShardedSession, hundred: range
) -> None:
    found = session.scalars(select(Customer.id).where(Customer.id.in_([3, 3, 4, 3])))
    assert sorted(found) == [3, 4]


def test_null_keys_find_nothing(session: ShardedSession, hundred: range) -> None:
    for criterion in (
        Customer.id.is_(None),
        Customer.id == None,  # noqa: E711
        Customer.id == null(),
        Customer.id == bindparam("key", None, type_=Customer.id.type),
        Customer.id.in_([None]),
    ):
        assert session.scalars(select(Customer).where(criterion)).all() == []
    either = select(Customer.id).where(or_(Customer.id.is_(None), Customer.id == 7))
    assert session.scalars(either).all() == [7]
    both = select(Customer.id).where(Customer.id.in_([None, 8, 9]))
    assert sorted(session.scalars(both)) == [8, 9]
    unlike = select(Customer.id).where(Customer.id != None)  # noqa: E711
    assert len(session.scalars(unlike).all()) == 100


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (lambda: Customer.id == 5, [5]),
        (lambda: literal(5) == Customer.id, [5]),
        (lambda: Customer.id == 5.0, [5]),
        (lambda: Customer.id == 5.5, []),
        (lambda: Customer.id + 0 == 5, [5]),
        (lambda: Customer.id.between(5, 7), [5, 6, 7]),
        (lambda: or_(Customer.id == 5, Customer.id == 9), [5, 9]),
        (lambda: or_(Customer.id == 5, Customer.name == "c9"), [5, 9]),
        (lambda: (Customer.id == 5) & (Customer.id == 6), []),
        (lambda: (Customer.id == 5) & (Customer.name == "c5"), [5]),
        (lambda: ~(Customer.id > 2), [0, 1, 2]),
        (lambda: Customer.id.not_in(range(3, 100)), [0, 1, 2]),
        (
            lambda: Customer.id.is_distinct_from(5) & (Customer.id < 7),
            [0, 1, 2, 3, 4, 6],
        ),
        (lambda: Customer.id.is_not_distinct_from(5), [5]),
        (lambda: Customer.id == func.abs(-5), [5]),
        (lambda: Customer.id.in_([5, 6]) & Customer.id.in_([6, 7]), [6]),
        (lambda: ~Customer.id.in_(range(98)), [98, 99]),
        (lambda: (Customer.id == 5) | (Customer.id == 6) & (Customer.name == "x"), [5]),
        (lambda: (Customer.id == 5).is_(True), [5]),
        (lambda: (Customer.id == 5).is_(False) & (Customer.id < 3), [0, 1, 2]),
    ],
)
def test_criteria_on_the_key_find_what_one_server_would(
    session: ShardedSession,
    hundred: range,
    criterion: Callable[[], Any],
    expected: list[int],
) -> None:
    found = session.scalars(select(Customer.id).where(criterion())).all()
    assert sorted(found) == expected


def test_one_cached_statement_follows_its_parameters(
    session: ShardedSession, hundred: range
) -> None:
    statement = select(Customer.name).where(Customer.id == bindparam("key"))
    for key in hundred:
        assert session.scalar(statement, {"key": key}) == f"c{key}"
        name = session.scalar(select(Customer.name).where(Customer.id == key))
        assert name == f"c{key}"
        by_lambda = lambda_stmt(lambda key=key: select(Customer.name))
        by_lambda += lambda s: s.where(Customer.id == key)  # noqa: B023
        assert session.scalar(by_lambda) == f"c{key}"
    many = select(Customer.id).where(Customer.id.in_(bindparam("keys", expanding=True)))
    for keys in ([1], [2, 3, 4], [], list(range(50))):
        assert sorted(session.scalars(many, {"keys": keys})) == keys


def test_rows_of_several_shards_come_in_every_shape(
    session: ShardedSession, hundred: range
) -> None:
    statement = select(Customer.id, Customer.name).where(Customer.id < 4)
    rows = session.execute(statement)
    assert sorted(rows.all()) == [(n, f"c{n}") for n in range(4)]
    assert sorted(session.execute(statement).scalars()) == [0, 1, 2, 3]
    mappings = session.execute(statement).mappings().all()
    assert sorted(m["name"] for m in mappings) == ["c0", "c1", "c2", "c3"]
    assert sorted(session.execute(statement).columns("name").scalars()) == [
        "c0",
        "c1",
        "c2",
        "c3",
    ]
    with pytest.raises(sa_exc.MultipleResultsFound):
        session.execute(statement).one()
    with pytest.raises(sa_exc.MultipleResultsFound):
        session.scalars(select(Customer)).one_or_none()
    with pytest.raises(sa_exc.NoResultFound):
        session.scalars(select(Customer).where(Customer.name == "none")).one()
    assert session.scalars(select(Customer).where(Customer.name == "c7")).one().id == 7
    assert session.scalar(select(Customer.id).where(Customer.name == "c8")) == 8
    assert session.scalar(select(Customer.id).where(Customer.name == "none")) is None
    assert session.execute(statement).first() is not None
    assert len(session.execute(statement).fetchmany(3)) == 3
    frozen = session.execute(statement).freeze()
    assert len(frozen().all()) == len(frozen().all()) == 4
    assert sum(len(p) for p in session.execute(statement).partitions(3)) == 4
    assert list(session.execute(statement).keys()) == ["id", "name"]


def test_a_scatter_streams(session: ShardedSession, hundred: range) -> None:
    options: Any = {"yield_per": 7}
    result = session.scalars(select(Customer), execution_options=options)
    parts = list(result.partitions())
    assert sorted(c.id for part in parts for c in part) == list(hundred)
    assert max(map(len, parts)) <= 7
    parts = list(session.query(Customer).yield_per(7))
    assert sorted(c.id for c in parts) == list(hundred)
    streamed = session.execute(
        select(Customer.id), execution_options={"stream_results": True}
    )
    assert len(streamed.scalars().all()) == 100
    with session.execute(select(Customer), execution_options=options) as half_read:
        assert half_read.fetchmany(3)
    assert len(session.scalars(select(Customer)).all()) == 100


def test_a_scatter_streams_as_the_statement_itself_says(
    session: ShardedSession, hundred: range
) -> None:
    statement = select(Customer).execution_options(yield_per=7)
    assert sorted(c.id for c in session.scalars(statement)) == list(hundred)
    parts = list(session.scalars(statement).partitions())
    assert sorted(c.id for part in parts for c in part) == list(hundred)
    assert max(map(len, parts)) <= 7


def test_row_locks_are_taken_on_every_shard(Session: Maker, hundred: range) -> None:
    with Session() as one, Session() as two:
        taken = select(Customer).where(Customer.id < 50).with_for_update()
        assert len(one.scalars(taken).all()) == 50
        free = select(Customer.id).with_for_update(skip_locked=True)
        assert sorted(two.scalars(free)) == list(range(50, 100))
        two.rollback()
        for key in (3, 4, 5, 6):
            with pytest.raises(sa_exc.OperationalError):
                two.get(Customer, key, with_for_update={"nowait": True})
            two.rollback()


def test_execution_options_send_a_statement_to_one_shard(
    session: ShardedSession, cluster: Cluster, hundred: range
) -> None:
    ordered = select(Customer.id).order_by(Customer.id)
    together: list[int] = []
    for shard in cluster.topology.shards:
        ids = session.scalars(ordered, execution_options={"shard": shard}).all()
        assert ids == sorted(ids)
        assert {cluster.shard_for(Customer, i) for i in ids} == {shard}
        together += ids
        own = ordered.execution_options(shard=shard)
        assert session.scalars(own).all() == ids
        name = text("SELECT shard FROM shardalchemy.catalog")
        assert session.scalar(name.execution_options(shard=shard)) == shard
    assert sorted(together) == list(hundred)
    by_key = session.scalar(
        text("SELECT name FROM customer WHERE id = 42").execution_options(shard_key=42)
    )
    assert by_key == "c42"


def test_get_bind_and_connection_name_a_shard(
    session: ShardedSession, cluster: Cluster
) -> None:
    for shard in cluster.topology.shards:
        connection = session.connection(bind_arguments={"shard": shard})
        catalog = connection.execute(text("SELECT shard FROM shardalchemy.catalog"))
        assert catalog.scalar() == shard
        assert session.get_bind(shard=shard) is connection.engine
    assert session.connection().engine is session.get_bind(shard=cluster.topology.home)
    with pytest.raises(UnsupportedQueryError):
        session.get_bind(Customer)


@pytest.fixture
def stored(Session: Maker, hundred: range) -> None:
    """Rows of other tables beside the customers, some of which refer to them."""
    with Session.begin() as session:
        session.add_all(Country(code=c, name=c * 2) for c in ("AT", "PE", "XX"))
        session.flush()
        for customer in session.scalars(select(Customer).where(Customer.id < 60)):
            customer.country_code = ("AT", "PE", None)[customer.id % 3]
            customer.name = "nopq"[customer.id % 4] * (customer.id % 3)
        session.add_all(Setting(id=n, name=f"s{n}") for n in range(0, 120, 7))
        session.add_all(
            Reading(sensor=n % 11, number=n * 3, value=n % 5) for n in range(50)
        )


def counted() -> Any:
    return func.count().label("n")


ANSWERED: dict[str, Callable[[], Any]] = {
    "order": lambda: select(Customer).order_by(Customer.id),
    "order by text": lambda: select(Customer.id).order_by(
        Customer.name.desc(), Customer.id
    ),
    "limit": lambda: select(Customer).order_by(Customer.id).limit(1),
    "limit 0": lambda: select(Customer).limit(0),
    "offset": lambda: select(Customer.id).order_by(Customer.id).offset(1),
    "page": lambda: select(Customer).order_by(Customer.id.desc()).limit(9).offset(5),
    "distinct": lambda: select(Customer.name).distinct(),
    "distinct on": lambda: (
        select(Customer.name, Customer.id)
        .distinct(Customer.name)
        .order_by(Customer.name, Customer.id)
    ),
    "count": lambda: select(func.count()).select_from(Customer),
    "count distinct": lambda: select(func.count(Customer.name.distinct())),
    "max": lambda: select(func.max(Customer.id)),
    "max of none": lambda: select(func.max(Customer.id)).where(Customer.id < 0),
    "average": lambda: select(func.avg(Reading.value), func.stddev(Reading.value)),
    "group": lambda: select(Customer.name, counted()).group_by(Customer.name),
    "having": lambda: (
        select(Customer.name).group_by(Customer.name).having(func.count() > 3)
    ),
    "window": lambda: select(Customer.id, func.row_number().over(order_by=Customer.id)),
    "set-returning": lambda: select(
        func.unnest(literal([1, 2], ARRAY(Integer))), Customer.id
    ),
    "exists": lambda: select(exists().where(Customer.id > 1)),
    "copies by a subquery": lambda: select(Country).where(
        Country.code.in_(select(Customer.country_code))
    ),
    "union": lambda: union_all(select(Customer.id), select(Reading.sensor)),
    "cross join": lambda: select(Customer.id, Reading.number).where(
        Customer.id < 5, Reading.number < 20
    ),
    "join": lambda: select(Customer, Reading).join(
        Reading, Reading.number == Customer.id
    ),
    "join with home": lambda: select(Customer).join(Setting, Setting.id == Customer.id),
    "subquery": lambda: select(
        select(Customer.id).order_by(Customer.id).limit(3).subquery()
    ),
    "in a subquery": lambda: select(Customer).where(
        Customer.id.in_(select(Reading.number))
    ),
    "correlated": lambda: select(Customer.id).where(
        select(counted()).where(Reading.sensor == Customer.id % 10).scalar_subquery()
        > 4
    ),
    "text in a select": lambda: select(text("count(*)")).select_from(Customer),
    "text": lambda: text("SELECT * FROM customer"),
    "text with a key": lambda: text('SELECT * FROM "customer" WHERE id = 1'),
}
ORDERED = {"order", "order by text", "offset", "page", "distinct on"}


@pytest.mark.filterwarnings("ignore:.*cartesian product")
@pytest.mark.filterwarnings("ignore:Passing expression to ``distinct``")
@pytest.mark.parametrize("name", ANSWERED)
def test_what_needs_all_shards_is_answered_as_by_one_server(
    session: ShardedSession,
    stored: None,
    on_one_server: Callable[[], sessionmaker[PlainSession]],
    name: str,
) -> None:
    with on_one_server()() as plain:
        expected = list(map(seen, plain.execute(ANSWERED[name]())))
    found = list(map(seen, session.execute(ANSWERED[name]())))
    if name not in ORDERED:
        expected.sort(key=repr)
        found.sort(key=repr)
    assert found == expected
    assert found or "none" in name or "0" in name


def seen(row: Any) -> list[Any]:
    """Return a row's values and their types; an object's by its columns."""
    return [
        {a.key: getattr(value, a.key) for a in inspect(value).mapper.column_attrs}
        if isinstance(value, Base)
        else (type(value), value)
        for value in row
    ]


def test_a_limit_without_an_order_is_as_many_rows_as_it_says(
    session: ShardedSession, hundred: range
) -> None:
    some = session.scalars(select(Customer.id).limit(7).offset(3)).all()
    assert len(set(some)) == 7
    assert set(some) <= set(hundred)
    assert len(session.scalars(select(Customer.id).offset(95)).all()) == 5
    numbers = session.scalars(select(func.row_number().over()).select_from(Customer))
    assert sorted(numbers) == list(range(1, 101))


WRITTEN: dict[str, Callable[[], Any]] = {
    "delete by a subquery": lambda: delete(Customer).where(
        Customer.id.in_(select(Reading.number))
    ),
    "insert from select": lambda: insert(Customer).from_select(
        ["id"], select(Reading.sensor).with_for_update()
    ),
    "change of the key": lambda: update(Customer).where(Customer.id == 1).values(id=2),
}
# What is asked, why it cannot be, and what to do instead.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lock some": (
        lambda: select(Customer).order_by(Customer.id).limit(3).with_for_update(),
        "FOR UPDATE would lock other rows than are returned",
    ),
    "lock an aggregate's": (
        lambda: (
            select(Customer.id)
            .where(Customer.id.in_(select(Reading.number)))
            .with_for_update()
        ),
        "FOR UPDATE would lock other rows than are returned",
    ),
    "hint": (
        lambda: (
            select(Customer.id, Reading.sensor)
            .join(Reading, Reading.number == Customer.id)
            .with_statement_hint("/* any SQL */")
        ),
        "a prefix, suffix or hint may be any SQL",
    ),
    "prefix": (
        lambda: select(
            func.count(Customer.id), func.mode().within_group(Customer.name)
        ).prefix_with("/* any SQL */"),
        "a prefix, suffix or hint may be any SQL",
    ),
    "function": (
        lambda: select(func.count_of_customers()).select_from(
            select(Customer.id).limit(3).subquery()
        ),
        r"the function count_of_customers\(\) may read tables by itself",
    ),
}
WAYS_OUT = (
    "Pin every sharded table to one key",
    "execution_options(shard_key=…)",
    "execution_options(shard='…')",
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_exactly_is_refused_with_a_reason_and_a_way_out(
    session: ShardedSession, hundred: range, servers: Servers, name: str
) -> None:
    make, reason = REFUSED[name]
    servers.run(
        "CREATE OR REPLACE FUNCTION count_of_customers() RETURNS bigint STABLE"
        " LANGUAGE sql AS 'SELECT count(*) FROM customer'"
    )
    with pytest.raises(UnsupportedQueryError, match=reason) as caught:
        session.execute(make())
    message = str(caught.value)
    assert "over several shards cannot be answered" in message
    assert [way for way in WAYS_OUT if way not in message] == []
    # The session goes on: nothing was sent.
    assert session.get_one(Customer, 1).name == "c1"


def test_a_sample_of_each_shard_is_no_sample_of_all(
    session: ShardedSession, hundred: range
) -> None:
    sample = tablesample(Customer, func.bernoulli(50))
    with pytest.raises(UnsupportedQueryError, match="TableSample of customer in FROM"):
        session.execute(select(func.count(sample.c.id)))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_that_depends_on_other_shards_rows_is_refused(
    session: ShardedSession, hundred: range, name: str
) -> None:
    with pytest.raises(UnsupportedQueryError):
        session.execute(WRITTEN[name]())
    assert session.get_one(Customer, 1).name == "c1"


def test_the_same_is_answered_on_one_shard(
    session: ShardedSession, hundred: range
) -> None:
    one = Customer.id == 7
    assert session.scalar(select(func.count()).select_from(Customer).where(one)) == 1
    ordered = select(Customer.id).where(one).order_by(Customer.name).limit(5)
    assert session.scalars(ordered).all() == [7]
    assert session.scalar(select(Customer.name).where(one).distinct()) == "c7"
    grouped = select(Customer.name, func.count()).where(one).group_by(Customer.name)
    assert session.execute(grouped).all() == [("c7", 1)]
    windowed = select(func.row_number().over(order_by=Customer.name)).where(one)
    assert session.scalars(windowed).all() == [1]
    assert session.query(Customer).filter(one).order_by(Customer.name).first().id == 7
    assert session.query(Customer).filter_by(id=7).count() == 1
    inner = select(Customer.id).where(one).cte("inner")
    assert session.scalar(select(func.max(inner.c.id))) == 7
    other = aliased(Customer)
    joined = select(other.name).join(Customer, Customer.id == other.id).where(one)
    assert session.scalar(joined) == "c7"
    both = union_all(select(Customer.name).where(one), select(Customer.name).where(one))
    assert session.scalars(both).all() == ["c7", "c7"]
    assert session.scalar(select(exists().where(one))) is True


def test_bulk_statements_change_one_shard_and_its_objects(
    session: ShardedSession, hundred: range, servers: Servers
) -> None:
    customer = session.get_one(Customer, 7)
    changed = session.execute(update(Customer).where(Customer.id == 7).values(name="x"))
    assert changed.rowcount == 1
    assert customer.name == "x"
    returned = session.scalars(
        update(Customer)
        .where(Customer.id == 7)
        .values(name=Customer.name + "y")
        .returning(Customer)
    ).one()
    assert returned is customer
    assert customer.name == "xy"
    session.execute(delete(Customer).where(Customer.id == 7))
    assert customer not in session
    session.commit()
    assert servers.count("customer") == 99
    query = session.query(Customer).filter(Customer.id == 8)
    assert query.update({"name": "legacy"}) == 1
    assert query.delete() == 1
    session.commit()
    assert servers.count("customer") == 98


def test_core_and_orm_inserts_of_one_shard(
    session: ShardedSession, servers: Servers, cluster: Cluster
) -> None:
    session.execute(insert(Customer).values(id=1, name="a", version=1))
    session.execute(insert(Customer), {"id": 2, "name": "b", "version": 1})
    session.execute(insert(Customer), [{"id": 3, "name": "c", "version": 1}])
    made = session.scalars(
        insert(Customer).returning(Customer), [{"id": 4, "name": "d", "version": 1}]
    ).one()
    assert made in session
    rows = [{"sensor": 5, "number": n, "value": n} for n in range(3)]
    session.execute(insert(Reading), rows)
    session.execute(insert(Reading).values([{**r, "sensor": 6} for r in rows]))
    upsert = pg_insert(Reading).values(sensor=5, number=1, value=50)
    session.execute(
        upsert.on_conflict_do_update(
            index_elements=["sensor", "number"], set_={"value": upsert.excluded.value}
        )
    )
    session.commit()
    for shard, ids in servers.rows("SELECT id FROM customer").items():
        assert {cluster.shard_for(Customer, i) for i in ids} == {shard}
    for shard, ids in servers.rows("SELECT sensor FROM reading").items():
        assert {cluster.shard_for(Reading, i) for i in ids} == {shard}
    assert session.get_one(Reading, (5, 1)).value == 50
    assert servers.count("customer") == 4
    assert servers.count("reading") == 6


def test_an_insert_without_its_key_gets_the_default(
    session: ShardedSession, servers: Servers, cluster: Cluster
) -> None:
    for number in range(8):
        session.execute(insert(Event).values(kind="event", text=str(number)))
    session.add(Customer(id=1, name="A"))
    session.flush()
    session.execute(insert(Order.__table__).values(customer_id=1, number=1))
    session.commit()
    for shard, ids in servers.rows("SELECT id FROM event").items():
        assert {cluster.shard_for(Event, i) for i in ids} == {shard}
    assert servers.count("event") == 8
    assert session.scalars(select(Order)).one().customer_id == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda session, rows: session.execute(insert(Reading), rows),
        lambda session, rows: session.execute(insert(Reading).values(rows)),
        lambda session, rows: session.execute(Reading.__table__.insert(), rows),
        lambda session, rows: session.bulk_insert_mappings(Reading, rows),
        lambda session, rows: session.bulk_save_objects([Reading(**r) for r in rows]),
    ],
)
def test_bulk_inserts_write_each_row_on_its_shard(
    session: ShardedSession, servers: Servers, cluster: Cluster, write: Any
) -> None:
    keys = keys_on_each_shard(cluster, Reading)
    write(session, [{"sensor": k, "number": 1, "value": 1} for k in keys])
    session.commit()
    for shard, sensors in servers.rows("SELECT sensor FROM reading").items():
        assert {cluster.shard_for(Reading, k) for k in sensors} == {shard}
    assert servers.count("reading") == len(keys)


@pytest.mark.parametrize(
    "write",
    [
        lambda session, rows: session.execute(update(Reading), rows),
        lambda session, rows: session.bulk_update_mappings(Reading, rows),
    ],
)
def test_bulk_updates_by_primary_key_reach_every_row(
    session: ShardedSession, servers: Servers, cluster: Cluster, write: Any
) -> None:
    keys = keys_on_each_shard(cluster, Reading)
    session.add_all(Reading(sensor=k, number=1, value=0) for k in keys)
    session.commit()
    write(session, [{"sensor": k, "number": 1, "value": 9} for k in keys])
    session.commit()
    held = servers.rows("SELECT value FROM reading")
    assert [v for values in held.values() for v in values] == [9] * len(keys)


def test_do_orm_execute_fires_once_for_a_scatter(
    Session: Maker, hundred: range
) -> None:
    seen: list[Any] = []

    @event.listens_for(Session, "do_orm_execute")
    def look(state: Any) -> None:
        seen.append(state.statement)

    with Session() as session:
        assert len(session.scalars(select(Customer)).all()) == 100
        assert len(seen) == 1
        session.get(Customer, 3, populate_existing=True)
        assert len(seen) == 2
        session.execute(update(Customer).where(Customer.id == 3).values(name="x"))
        assert len(seen) == 3


def test_do_orm_execute_may_rewrite_what_is_routed(
    Session: Maker, hundred: range
) -> None:
    from sqlalchemy.orm import with_loader_criteria

    @event.listens_for(Session, "do_orm_execute")
    def tenant(state: Any) -> Any:
        if state.is_select and not state.is_column_load:
            state.statement = state.statement.options(
                with_loader_criteria(Customer, Customer.id < 5)
            )
        return None

    with Session() as session:
        assert sorted(c.id for c in session.scalars(select(Customer))) == list(range(5))
        assert session.scalars(select(Customer).where(Customer.id == 50)).all() == []
        ordered = select(Customer.id).where(Customer.id == 3).order_by(Customer.name)
        assert session.scalars(ordered).all() == [3]


def test_do_orm_execute_may_answer_from_a_cache(Session: Maker, hundred: range) -> None:
    cache: dict[str, Any] = {}

    @event.listens_for(Session, "do_orm_execute")
    def cached(state: Any) -> Any:
        name = state.execution_options.get("cache")
        if name is None:
            return None
        if name not in cache:
            cache[name] = state.invoke_statement().freeze()
        return cache[name]()

    with Session() as session:
        for _ in range(3):
            ids = session.scalars(
                select(Customer.id), execution_options={"cache": "ids"}
            ).all()
            assert sorted(ids) == list(hundred)
            session.execute(delete(Customer).where(Customer.id == 1))


def test_a_session_reads_its_own_uncommitted_rows_on_every_shard(
    session: ShardedSession, Session: Maker, hundred: range
) -> None:
    session.add_all(Customer(id=n, name="new") for n in range(100, 120))
    mine = session.scalars(select(Customer.id)).all()
    assert sorted(mine) == list(range(120))
    with Session() as other:
        assert len(other.scalars(select(Customer.id)).all()) == 100


def test_text_keys_in_statements(session: ShardedSession) -> None:
    names = ["a", "Ä", "a\u0308", "日本", "", "%s", "'"]
    session.add_all(Account(owner=n) for n in names)
    session.commit()
    for name in names:
        found = session.scalars(select(Account.owner).where(Account.owner == name))
        assert found.all() == [name]
    some = select(Account.owner).where(Account.owner.in_(names[1:4]))
    assert sorted(session.scalars(some)) == sorted(names[1:4])
    like = select(Account.owner).where(Account.owner.like("%"))
    assert sorted(session.scalars(like)) == sorted(names)
    lowered = select(Account.owner).where(func.lower(Account.owner) == "a")
    assert session.scalars(lowered).all() == ["a"]


def test_from_statement_over_a_pinned_select(
    session: ShardedSession, hundred: range
) -> None:
    inner = select(Customer).where(Customer.id == 9)
    assert session.scalars(select(Customer).from_statement(inner)).one().id == 9
