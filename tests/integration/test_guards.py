"""Statements on every shard: whether they may run, for how long, and how they fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import bindparam, delete, event, func, insert, select, text, update
from sqlalchemy.orm import selectinload, subqueryload

from shardalchemy import Cluster, ConfigurationError, ScatterWarning
from shardalchemy.errors import UnsupportedQueryError
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
