"""Statements on every shard: whether they may run, for how long, and how they fail."""

from __future__ import annotations

import contextlib
import contextvars
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    bindparam,
    delete,
    event,
    exc,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import selectinload, subqueryload

from shardalchemy import Cluster, ConfigurationError, ScatterWarning
from shardalchemy.engine.wire import driver_of
from shardalchemy.errors import (
    StatementTimeout,
    TransactionAborted,
    UnsupportedQueryError,
)
from tests.conftest import Servers
from tests.integration.test_planner_differential import (
    Both,
    Country,
    Customer,
    Note,
    Order,
    Tag,
    both,
)

__all__ = ["both"]

Make = Callable[..., Cluster]

UNPINNED = {
    "scatter": select(Customer),
    "combine": select(func.count(Customer.id)),
    "gather": select(Customer.name, Order.v).join(Order, Customer.v == Order.v),
    "update": update(Customer).values(name="x"),
    "delete": delete(Tag).where(Tag.v > 2),
}
PINNED = {
    "one key": select(Customer).where(Customer.id == 1),
    "a list": select(Customer).where(Customer.id.in_(range(1, 10))),
    "an aggregate": select(func.sum(Customer.v)).where(Customer.id.in_(range(1, 10))),
    "update": update(Customer).where(Customer.id.in_(range(1, 10))).values(v=1),
    "reference": select(Country),
    "copies": update(Country).values(v=2),
    "home": select(Note),
}


@pytest.fixture
def make(both: Both, servers: Servers) -> Iterator[Make]:
    """Return a function that makes clusters over the same rows."""
    made: list[Cluster] = []

    def cluster(**options: Any) -> Cluster:
        made.append(servers.local.cluster(**options))
        return made[-1]

    yield cluster
    for one in made:
        one.close()


# -- scatter: allow, warn, forbid ----------------------------------------------------


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", UNPINNED)
def test_what_nothing_pins_is_forbidden_with_its_plan(
    make: Make, name: str, listening: bool
) -> None:
    Session = make(scatter="forbid").sessionmaker()
    if listening:
        event.listen(Session, "do_orm_execute", lambda state: None)
    with Session() as session:
        plan = str(session.explain(UNPINNED[name]))
        with pytest.raises(UnsupportedQueryError, match="scatter='allow'") as caught:
            session.execute(UNPINNED[name])
        assert plan in str(caught.value)
        # Nothing was sent, so the transaction goes on.
        assert session.get(Customer, 1) is not None
        allowed = UNPINNED[name].execution_options(scatter="allow")
        session.execute(allowed)
        session.execute(UNPINNED[name], execution_options={"scatter": "allow"})


@pytest.mark.parametrize("name", PINNED)
def test_what_is_pinned_is_allowed_on_any_number_of_shards(
    make: Make, name: str
) -> None:
    with make(scatter="forbid").sessionmaker()() as session:
        session.execute(PINNED[name])


def test_rows_and_parameter_sets_that_name_their_shard_are_allowed(make: Make) -> None:
    rows = [{"id": n, "name": "n"} for n in range(1000, 1030)]
    with make(scatter="forbid").sessionmaker()() as session:
        session.execute(insert(Customer), rows)
        session.execute(update(Customer), [{"id": n, "v": 1} for n in range(1, 9)])
        table = Customer.__table__
        by_key = update(table).where(table.c.id == bindparam("k")).values(v=2)
        session.execute(by_key, [{"k": n} for n in range(1, 9)])
        by_name = update(table).where(table.c.name == bindparam("n")).values(v=2)
        with pytest.raises(UnsupportedQueryError, match="scatter='forbid'"):
            session.execute(by_name, [{"n": "o"}, {"n": "p"}])


@pytest.mark.parametrize("name", UNPINNED)
def test_a_warning_shows_the_plan_and_the_line(make: Make, name: str) -> None:
    with make(scatter="warn").sessionmaker()() as session:
        plan = str(session.explain(UNPINNED[name]))
        with pytest.warns(ScatterWarning) as caught:
            session.execute(UNPINNED[name])
        (warning,) = caught
        assert warning.filename == __file__
        assert plan in str(warning.message)


async def test_the_line_is_found_in_an_event_loop(make: Make) -> None:
    async with (
        make(scatter="warn") as cluster,
        cluster.async_sessionmaker()() as session,
    ):
        with pytest.warns(ScatterWarning) as caught:
            await session.execute(select(Customer))
        assert caught[0].filename == __file__


def test_options_of_the_call_the_statement_and_the_session(make: Make) -> None:
    cluster = make()
    forbidden = select(Customer).execution_options(scatter="forbid")
    with cluster.sessionmaker()() as session:
        with pytest.raises(UnsupportedQueryError):
            session.execute(forbidden)
        session.execute(forbidden, execution_options={"scatter": "allow"})
        with pytest.warns(ScatterWarning):
            session.execute(forbidden, execution_options={"scatter": "warn"})
    if not hasattr(session, "execution_options"):
        return  # before SQLAlchemy 2.1
    options = {"scatter": "forbid"}
    with cluster.sessionmaker(execution_options=options)() as session:
        with pytest.raises(UnsupportedQueryError):
            session.execute(select(Customer))
        session.execute(forbidden.execution_options(scatter="allow"))


@pytest.mark.parametrize("load", [selectinload, subqueryload])
@pytest.mark.parametrize("on", ["statement", "call"])
def test_loaders_inherit_the_option(make: Make, load: Any, on: str) -> None:
    statement = select(Country).options(load(Country.customers))
    options = {"scatter": "allow"} if on == "call" else {}
    allowed = statement if options else statement.execution_options(scatter="allow")
    with (
        make(scatter="forbid").sessionmaker()() as session,
        pytest.raises(UnsupportedQueryError),
    ):
        session.scalars(statement).all()
    with make(scatter="forbid").sessionmaker()() as session:
        countries = session.scalars(allowed, execution_options=options).all()
        assert any(country.customers for country in countries)
    with make().sessionmaker()() as session:
        options = {"scatter": "forbid"} if on == "call" else {}
        refused = (
            statement if options else statement.execution_options(scatter="forbid")
        )
        with pytest.raises(UnsupportedQueryError):
            session.scalars(refused, execution_options=options).all()


def test_other_values_are_refused(make: Make) -> None:
    with pytest.raises(ConfigurationError, match="'never'"):
        make(scatter="never")
    with pytest.raises(ConfigurationError, match="scatter_loop"):
        make(scatter_loop=-1)
    with (
        make().sessionmaker()() as session,
        pytest.raises(ConfigurationError, match="'never'"),
    ):
        session.execute(select(Customer), execution_options={"scatter": "never"})


# -- the same statement again and again ----------------------------------------------


def test_a_loop_over_every_shard_is_warned_of_once(make: Make) -> None:
    Session = make(scatter_loop=3).sessionmaker()

    def named(name: str) -> Any:
        return select(Customer).where(Customer.name == name)

    with Session() as session:
        session.execute(named("n"))
        session.execute(named("o"))
        session.execute(select(func.count(Customer.id)))
        with pytest.warns(ScatterWarning, match="3 times") as caught:
            session.execute(named("p"))
        assert caught[0].filename == __file__
        assert "Scatter to 4 shards" in str(caught[0].message)
        assert "pd_customers.name = " in str(caught[0].message)
        session.execute(named("q"))
    with Session() as session:
        for _ in range(5):
            session.execute(named("n"))


def test_a_loop_is_one_of_one_transaction_and_of_what_is_not_allowed(
    make: Make,
) -> None:
    with make(scatter_loop=2).sessionmaker()() as session:
        for _ in range(4):
            session.execute(select(Customer))
            session.rollback()
        for _ in range(4):
            session.execute(select(Customer), execution_options={"scatter": "allow"})
            session.execute(PINNED["a list"])
            session.execute(PINNED["update"])
        session.execute(text("UPDATE pd_notes SET body = 'b'"))
    with make(scatter_loop=0).sessionmaker()() as session, warnings.catch_warnings():
        for _ in range(120):
            session.execute(select(Customer.id))


def test_a_loop_of_writes_and_of_lazy_loads_is_seen(make: Make) -> None:
    with make(scatter_loop=2).sessionmaker()() as session:
        session.execute(UNPINNED["update"])
        with pytest.warns(ScatterWarning):
            session.execute(UNPINNED["update"])
        first, second, *_ = session.scalars(select(Country)).all()
        assert isinstance(first.customers, list)
        with pytest.warns(ScatterWarning) as caught:
            assert isinstance(second.customers, list)
        assert caught[0].filename == __file__


# -- timeouts ------------------------------------------------------------------------


ALL = ("s1", "s2", "s3", "s4")

# Each waits for a lock on a table, on some shards.
SLOWLY: dict[str, tuple[Any, str, Sequence[str]]] = {
    "scatter": (UNPINNED["scatter"], "pd_customers", ALL),
    "combine": (UNPINNED["combine"], "pd_customers", ALL),
    "gather": (UNPINNED["gather"], "pd_orders", ALL),
    "one of many": (UNPINNED["scatter"], "pd_customers", ["s3"]),
    "final": (
        select(Note.id, func.count(Customer.id))
        .join(Customer, Customer.id == Note.customer_id)
        .group_by(Note.id),
        "pd_notes",
        ["s1"],
    ),
    "one shard": (PINNED["one key"], "pd_customers", ALL),
    "copies": (select(Country), "pd_countries", ALL),
    "home": (select(Note), "pd_notes", ["s1"]),
    "plain": (text("SELECT pg_sleep(30)"), "pd_notes", []),
    "update": (UNPINNED["update"], "pd_customers", ALL),
    "update of one": (
        update(Customer).where(Customer.id == 1).values(v=1),
        "pd_customers",
        ALL,
    ),
    "update of copies": (update(Country).values(v=2), "pd_countries", ["s3"]),
    "insert": (insert(Customer).values(id=99, name="n"), "pd_customers", ALL),
}


@pytest.fixture
def locked(servers: Servers) -> Any:
    """Return a context in which a table is locked on some shards."""

    @contextlib.contextmanager
    def lock(table: str, shards: Sequence[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for shard in shards:
                connection = stack.enter_context(servers.connect(shard))
                stack.enter_context(connection.transaction(force_rollback=True))
                connection.execute(f"LOCK TABLE {table}")
            yield

    return lock


def check_healthy(session: Any) -> None:
    """Assert that connections are as they were, and wait as they did."""
    for shard in ALL:
        connection = session.connection(bind_arguments={"shard": shard})
        assert "wait" not in vars(driver_of(connection))
        assert connection.scalar(text("SELECT 1")) == 1
        assert connection.scalar(text("SHOW statement_timeout")) == "0"


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", SLOWLY)
def test_a_timeout_bounds_all_that_a_statement_waits_for(
    make: Make, locked: Any, name: str, listening: bool
) -> None:
    statement, *lock = SLOWLY[name]
    cluster = make()
    Session = cluster.sessionmaker()
    if listening:
        event.listen(Session, "do_orm_execute", lambda state: None)
    with Session() as session:
        with locked(*lock):
            start = time.monotonic()
            with pytest.raises(StatementTimeout, match=r"timeout of 0\.3 s") as caught:
                session.execute(statement, execution_options={"timeout": 0.3})
            assert time.monotonic() - start < 3
            assert isinstance(caught.value, exc.OperationalError)
            assert isinstance(caught.value.orig, psycopg.errors.QueryCanceled)
            # As in any transaction in which a statement has failed.
            with pytest.raises(exc.InternalError) as later:
                session.execute(select(Note))
            assert isinstance(later.value.orig, psycopg.errors.InFailedSqlTransaction)
        session.rollback()
        assert session.get(Customer, 1) is not None
        check_healthy(session)
    for shard in cluster._shards.names:
        assert cluster._shards.sync(shard).pool.checkedin() == 1


@pytest.mark.parametrize("name", SLOWLY)
async def test_a_timeout_in_an_event_loop(make: Make, locked: Any, name: str) -> None:
    statement, *lock = SLOWLY[name]
    async with make() as cluster, cluster.async_sessionmaker()() as session:
        with locked(*lock):
            start = time.monotonic()
            with pytest.raises(StatementTimeout, match=r"timeout of 0\.3 s"):
                await session.execute(statement, execution_options={"timeout": 0.3})
            assert time.monotonic() - start < 3
            with pytest.raises(exc.InternalError) as later:
                await session.execute(select(Note))
            assert isinstance(later.value.orig, psycopg.errors.InFailedSqlTransaction)
        await session.rollback()
        assert await session.get(Customer, 1) is not None
        await session.run_sync(check_healthy)


def test_a_timeout_names_the_shards_that_were_late(make: Make, locked: Any) -> None:
    with make().sessionmaker()() as session, locked("pd_customers", ["s2", "s4"]):
        with pytest.raises(StatementTimeout) as caught:
            session.execute(select(Customer), execution_options={"timeout": 0.3})
        assert "0.3 s, on shard s2, s4; it was cancelled" in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value)


@pytest.mark.parametrize("name", ["one of many", "update of one"])
def test_a_savepoint_outlives_a_timeout(make: Make, locked: Any, name: str) -> None:
    statement, *lock = SLOWLY[name]
    with make().sessionmaker()() as session:
        session.execute(insert(Tag).values(tag="new", v=77))
        with locked(*lock), pytest.raises(StatementTimeout), session.begin_nested():
            session.execute(statement, execution_options={"timeout": 0.3})
        assert session.scalar(select(Tag.v).where(Tag.tag == "new")) == 77
        assert len(session.scalars(select(Customer)).all()) > 4


def test_timeouts_of_the_cluster_the_statement_and_the_call(make: Make) -> None:
    with make(statement_timeout=0.3).sessionmaker()() as session:
        with pytest.raises(StatementTimeout):
            session.execute(text("SELECT pg_sleep(30)"))
        session.rollback()
        sleeps = text("SELECT pg_sleep(0.6)")
        session.execute(sleeps.execution_options(timeout=None))
        session.execute(sleeps, execution_options={"timeout": 20.0})
        session.execute(
            sleeps.execution_options(timeout=0.1), execution_options={"timeout": 2}
        )
        rows = session.scalars(select(Customer).options(selectinload(Customer.orders)))
        assert any(customer.orders for customer in rows)


def test_what_is_flushed_before_does_not_count(make: Make) -> None:
    cluster = make()
    with cluster.sessionmaker()() as session:
        session.add(Note(id=99, body="b"))
        engine = cluster._shards.sync("s1")

        @event.listens_for(engine, "before_cursor_execute")
        def slow(connection: Any, cursor: Any, sql: str, *_: Any) -> None:
            if sql.startswith("INSERT"):
                cursor.execute("SELECT pg_sleep(0.6)")

        session.execute(select(Note), execution_options={"timeout": 0.3})


@pytest.mark.parametrize("value", [0, -1, "5", True])
def test_a_timeout_is_a_number_of_seconds(make: Make, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="seconds"):
        make(statement_timeout=value)
    with (
        make().sessionmaker()() as session,
        pytest.raises(ConfigurationError, match="seconds"),
    ):
        session.execute(select(Note), execution_options={"timeout": value})


@pytest.mark.parametrize("name", ["scatter", "one shard"])
@pytest.mark.parametrize("in_loop", [False, True])
async def test_a_server_that_does_not_answer_is_given_up(
    make: Make,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    in_loop: bool,
) -> None:
    for module in ("deadline", "fanout"):
        where = sys.modules[f"shardalchemy.engine.{module}"]
        monkeypatch.setattr(where, "CANCEL_TIMEOUT", 0.5)
    cluster = make()
    server = servers.local.servers[cluster.shard_for(Customer, 1)]

    statement = PINNED["one key"] if name == "one shard" else select(Customer)

    def work(session: Any) -> None:
        session.execute(statement)
        server.pause()
        start = time.monotonic()
        try:
            with pytest.raises(StatementTimeout) as caught:
                session.execute(statement, execution_options={"timeout": 0.3})
        finally:
            server.resume()
        assert time.monotonic() - start < 8
        assert caught.value.connection_invalidated or name == "scatter"
        session.rollback()
        assert session.get(Customer, 1) is not None
        check_healthy(session)

    if in_loop:
        async with cluster.async_sessionmaker()() as session:
            await session.run_sync(work)
        await cluster.aclose()
    else:
        with cluster.sessionmaker()() as session:
            work(session)


# -- errors --------------------------------------------------------------------------

# Each divides by zero for the row of one customer, and waits for a lock elsewhere.
FAILING = {
    "scatter": select(1 / (Customer.id - 1)),
    "combine": select(func.sum(1 / (Customer.id - 1))),
    "gather": select(Customer.name, Order.v)
    .join(Order, Customer.v == Order.v)
    .where(1 / (Customer.id - 1) < 2),
    "update": update(Customer).values(v=1 / (Customer.id - 1)),
}


def check_failed(error: exc.DBAPIError, later: exc.DBAPIError, shard: str) -> None:
    assert f"(on shard {shard})" in str(error)
    assert isinstance(error.orig, psycopg.errors.DivisionByZero)
    assert isinstance(later.orig, psycopg.errors.InFailedSqlTransaction)


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", FAILING)
def test_an_error_names_its_shard_and_ends_what_the_others_do(
    make: Make, locked: Any, name: str, listening: bool
) -> None:
    cluster = make()
    Session = cluster.sessionmaker()
    if listening:
        event.listen(Session, "do_orm_execute", lambda state: None)
    shard = cluster.shard_for(Customer, 1)
    others = [other for other in ALL if other != shard]
    with Session() as session:
        with pytest.raises(exc.DataError):
            session.execute(FAILING[name])  # what asks for types would wait
        session.rollback()
        session.execute(insert(Tag).values(tag="new", v=77))
        start = time.monotonic()
        with locked("pd_customers", others):
            nested = session.begin_nested()
            with pytest.raises(exc.DataError) as caught:
                session.execute(FAILING[name])
            for statement in (select(Note), select(Tag), insert(Tag).values(tag="x")):
                with pytest.raises(exc.InternalError) as later:
                    session.execute(statement)
                check_failed(caught.value, later.value, shard)
            session.add(Note(id=99, body="b"))
            with pytest.raises(exc.InternalError) as later:
                session.flush()
            check_failed(caught.value, later.value, shard)
            nested.rollback()
        assert time.monotonic() - start < 4
        assert session.scalar(select(Tag.v).where(Tag.tag == "new")) == 77
        assert len(session.scalars(select(Customer)).all()) > 4
        session.execute(UNPINNED["update"])
        session.rollback()
        check_healthy(session)


@pytest.mark.parametrize("name", FAILING)
async def test_an_error_in_an_event_loop(make: Make, locked: Any, name: str) -> None:
    async with make() as cluster, cluster.async_sessionmaker()() as session:
        with pytest.raises(exc.DataError):
            await session.execute(FAILING[name])  # what asks for types would wait
        await session.rollback()
        shard = cluster.shard_for(Customer, 1)
        await session.execute(insert(Tag).values(tag="new", v=77))
        start = time.monotonic()
        with locked("pd_customers", [other for other in ALL if other != shard]):
            nested = await session.begin_nested()
            with pytest.raises(exc.DataError) as caught:
                await session.execute(FAILING[name])
            with pytest.raises(exc.InternalError) as later:
                await session.execute(select(Tag))
            check_failed(caught.value, later.value, shard)
            await nested.rollback()
        assert time.monotonic() - start < 4
        assert await session.scalar(select(Tag.v).where(Tag.tag == "new")) == 77
        await session.rollback()
        await session.run_sync(check_healthy)


def test_a_failed_transaction_commits_nowhere(make: Make) -> None:
    cluster = make()
    with cluster.sessionmaker()() as session:
        session.execute(insert(Tag).values([{"tag": f"n{n}"} for n in range(9)]))
        with pytest.raises(exc.DataError):
            session.execute(FAILING["scatter"].where(Customer.id == 1))
        with pytest.raises(exc.InternalError):
            session.execute(select(Tag))
        with pytest.raises(TransactionAborted):
            session.commit()
        session.rollback()
        assert not session.scalars(select(Tag).where(Tag.tag.like("n%"))).all()


def test_a_statement_sees_the_context_variables_of_its_caller(make: Make) -> None:
    cluster = make()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen = []
    with cluster.sessionmaker()() as session:
        session.execute(select(Customer))
        for shard in ALL:
            event.listen(
                cluster._shards.sync(shard),
                "before_cursor_execute",
                lambda *_: seen.append(variable.get(None)),
            )
        variable.set("value")
        session.execute(select(Customer))
    assert seen == ["value"] * 4
