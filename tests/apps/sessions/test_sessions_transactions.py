"""Transactions over several shards as an application sees them."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import pytest
from sessions_models import Account, Country, Customer, Order, Reading, Setting
from sessions_servers import Servers, keys_on_each_shard
from sqlalchemy import (
    BigInteger,
    ForeignKey,
    MetaData,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm import (
    Session as PlainSession,
)

from shardalchemy import (
    Cluster,
    ConfigurationError,
    ShardAlchemyError,
    ShardedSession,
    locator_id,
    sharded_by,
)

Maker = sessionmaker[ShardedSession]


@pytest.fixture
def keys(cluster: Cluster) -> list[int]:
    """One customer key a shard."""
    return keys_on_each_shard(cluster, Customer)


def add_customers(session: Any, keys: list[int], name: str = "A") -> None:
    session.add_all(Customer(id=key, name=name) for key in keys)


def test_a_commit_is_on_all_shards_and_leaves_nothing_prepared(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session() as session:
        add_customers(session, keys)
        session.flush()
        assert servers.count("customer") == 0
        session.commit()
        assert servers.count("customer") == 4
        assert servers.prepared() == 0


def test_a_rollback_is_on_all_shards(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session() as session:
        add_customers(session, keys)
        session.add(Country(code="AT", name="Austria"))
        session.add(Setting(name="s"))
        session.flush()
        session.rollback()
        assert session.scalars(select(Customer)).all() == []
    assert servers.count("customer") == 0
    assert servers.count("country") == 0


def test_an_error_on_one_shard_at_the_flush_undoes_the_others(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session.begin() as session:
        add_customers(session, keys[3:])
    with Session() as session:
        add_customers(session, keys)
        with pytest.raises(sa_exc.IntegrityError, match="customer_pkey"):
            session.commit()
        with pytest.raises(sa_exc.PendingRollbackError):
            session.execute(select(Customer))
        session.rollback()
        assert [c.id for c in session.scalars(select(Customer))] == keys[3:]
    assert servers.count("customer") == 1
    assert servers.prepared() == 0


def test_a_failed_statement_on_one_shard_keeps_the_commit_off_all(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session() as session:
        add_customers(session, keys)
        session.flush()
        bad = text("SELECT 1/0").execution_options(shard_key=keys[2])
        with pytest.raises(sa_exc.DataError):
            session.execute(bad)
        with pytest.raises(ShardAlchemyError, match="rolled back"):
            session.commit()
    assert servers.count("customer") == 0
    assert servers.prepared() == 0


def test_a_deferred_constraint_that_fails_at_the_commit_undoes_all_shards(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    servers.run(
        "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN IF NEW.name = 'bad' THEN RAISE 'refused'; END IF; RETURN NEW; END $$;"
        "CREATE CONSTRAINT TRIGGER refusing AFTER INSERT ON customer"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        with Session() as session:
            add_customers(session, keys[:3])
            add_customers(session, keys[3:], "bad")
            with pytest.raises(sa_exc.SQLAlchemyError, match="refused"):
                session.commit()
            session.rollback()
            assert session.scalars(select(Customer)).all() == []
    finally:
        servers.run("DROP FUNCTION refuse() CASCADE")
    assert servers.count("customer") == 0
    assert servers.prepared() == 0


def test_a_savepoint_rolled_back_spans_shards(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session() as session:
        add_customers(session, keys[:1])
        session.flush()
        nested = session.begin_nested()
        lost = [Customer(id=key, name="lost") for key in keys[1:]]
        session.add_all([*lost, Reading(sensor=keys[0], number=1, value=1)])
        session.flush()
        assert len(session.scalars(select(Customer)).all()) == 4
        nested.rollback()
        assert all(inspect(customer).transient for customer in lost)
        assert [c.id for c in session.scalars(select(Customer))] == keys[:1]
        with session.begin_nested():
            add_customers(session, keys[1:3], "kept")
        session.commit()
    rows = servers.rows("SELECT id, name FROM customer")
    assert sorted(row for found in rows.values() for row in found) == sorted(
        [(keys[0], "A"), (keys[1], "kept"), (keys[2], "kept")]
    )
    assert servers.count("reading") == 0


def test_a_shard_first_used_within_a_savepoint_obeys_it(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session() as session:
        add_customers(session, keys[:2])
        session.flush()
        with pytest.raises(sa_exc.IntegrityError), session.begin_nested():
            add_customers(session, [keys[3], keys[0]])
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            add_customers(session, [keys[2] // (keys[2] - keys[2])])
        with session.begin_nested() as outer:
            add_customers(session, [keys[2]], "outer")
            session.flush()
            with session.begin_nested() as inner:
                add_customers(session, [keys[3]], "inner")
                session.flush()
                inner.rollback()
            assert outer.is_active
        session.commit()
    names = servers.rows("SELECT name FROM customer")
    assert sorted(n for found in names.values() for n in found) == ["A", "A", "outer"]
    assert servers.prepared() == 0


def test_an_inner_failure_on_one_shard_keeps_the_outer_work_of_all(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session.begin() as session:
        add_customers(session, keys)
        for key in [*keys, *keys]:
            try:
                with session.begin_nested():
                    session.add(Reading(sensor=key, number=1, value=1))
            except sa_exc.IntegrityError:
                pass
    assert servers.count("customer") == 4
    assert servers.count("reading") == 4


@pytest.mark.parametrize("expire", [True, False])
def test_expire_on_commit_decides_what_is_read_again(
    cluster: Cluster, keys: list[int], servers: Servers, expire: bool
) -> None:
    with cluster.sessionmaker(expire_on_commit=expire)() as session:
        customers = [Customer(id=key, name="A") for key in keys]
        session.add_all(customers)
        session.commit()
        servers.run("UPDATE customer SET name = 'B'")
        assert {c.name for c in customers} == ({"B"} if expire else {"A"})


def test_session_options_are_those_of_sqlalchemy(
    cluster: Cluster, keys: list[int]
) -> None:
    class Office(ShardedSession):
        def welcome(self, key: int) -> Customer:
            self.add(customer := Customer(id=key, name="welcome"))
            self.flush()
            return customer

    Session = cluster.sessionmaker(class_=Office, autoflush=False, info={"app": 1})
    with Session(info={"request": 2}) as session:
        assert session.info == {"app": 1, "request": 2}
        assert isinstance(session, PlainSession)
        customer = session.welcome(keys[0])
        add_customers(session, keys[1:])
        assert session.scalars(select(Customer)).all() == [customer]
    off = cluster.sessionmaker(autobegin=False)
    with off() as session:
        with pytest.raises(sa_exc.InvalidRequestError, match="Autobegin"):
            session.get(Customer, keys[0])
        with session.begin():
            assert session.get(Customer, keys[0]) is None
    with pytest.raises(ConfigurationError, match="ShardedSession"):
        cluster.sessionmaker(class_=PlainSession)


def test_what_a_cluster_decides_itself_is_refused(
    cluster: Cluster, servers: Servers
) -> None:
    with pytest.raises(ConfigurationError, match="twophase"):
        cluster.sessionmaker(twophase=True)()
    engine = create_engine(next(iter(servers.urls.values())))
    with pytest.raises(ConfigurationError, match="bind"):
        cluster.sessionmaker(bind=engine)()
    with cluster.sessionmaker()() as session:
        with pytest.raises(ConfigurationError):
            session.bind = engine
        with pytest.raises(sa_exc.InvalidRequestError):
            session.prepare()
    engine.dispose()


@pytest.mark.parametrize("ack", ["committed", "prepared"])
def test_the_next_transaction_sees_the_last_whatever_the_acknowledgement(
    cluster: Cluster, keys: list[int], ack: Any
) -> None:
    with cluster.sessionmaker(ack=ack)() as session:
        add_customers(session, keys)
        for number in range(10):
            session.commit()
            customers = session.scalars(select(Customer)).all()
            assert [c.version for c in customers] == [number + 1] * 4
            for customer in customers:
                customer.name = str(number)
        session.rollback()


def test_events_of_a_commit_over_shards_fire_once(
    Session: Maker, keys: list[int]
) -> None:
    fired: list[str] = []
    for name in (
        "after_transaction_create",
        "before_commit",
        "after_commit",
        "after_rollback",
        "after_soft_rollback",
        "after_transaction_end",
    ):
        event.listen(Session, name, lambda *_, name=name: fired.append(name))
    with Session() as session:
        add_customers(session, keys)
        session.commit()
        assert fired == [
            "after_transaction_create",
            "before_commit",
            "after_transaction_create",  # of the flush
            "after_transaction_end",
            "after_commit",
            "after_transaction_end",
        ]
        fired.clear()
        add_customers(session, keys)
        with pytest.raises(sa_exc.IntegrityError):
            session.flush()
        session.rollback()
        assert fired.count("after_rollback") == 1


def test_what_after_begin_sets_is_set_on_every_shard(
    Session: Maker, cluster: Cluster, keys: list[int]
) -> None:
    begun: list[Any] = []

    @event.listens_for(Session, "after_begin")
    def settle(_: Any, __: Any, connection: Any) -> None:
        begun.append(connection.engine)
        connection.execute(text("SET LOCAL statement_timeout = '7777ms'"))

    with Session() as session:
        add_customers(session, keys)
        session.flush()
        assert len(begun) == len(set(begun)) == 4
        for shard in cluster.topology.shards:
            shown = text("SHOW statement_timeout").execution_options(shard=shard)
            assert session.scalar(shown) == "7777ms"


def test_threads_with_sessions_of_their_own_do_not_disturb_each_other(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    with Session.begin() as session:
        session.add(Account(owner="shared"))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(6):
                with Session.begin() as session:
                    base = number * 1000 + turn * 10
                    session.add_all(Customer(id=base + n, name="t") for n in range(5))
                    account = session.get_one(Account, "shared", with_for_update=True)
                    account.balance += 1
                with Session() as session:
                    low, high = number * 1000, number * 1000 + 999
                    mine = session.scalars(
                        select(Customer.id).where(Customer.id.between(low, high))
                    ).all()
                    assert len(mine) == (turn + 1) * 5
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert servers.count("customer") == 5 * 6 * 5
    assert [*servers.rows("SELECT balance FROM account").values()] == [[30]]
    assert servers.prepared() == 0


def test_a_scoped_session_is_one_per_thread(Session: Maker, keys: list[int]) -> None:
    registry = scoped_session(Session)
    add_customers(registry, keys)
    registry.commit()
    seen: list[int] = []

    def other() -> None:
        seen.append(len(registry.scalars(select(Customer)).all()))
        registry.remove()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [4]
    registry.remove()


def test_close_and_reset_give_all_connections_back(
    Session: Maker, cluster: Cluster, keys: list[int]
) -> None:
    session = Session()
    engines = [session.get_bind(shard=shard) for shard in cluster.topology.shards]
    before = [engine.pool.checkedout() for engine in engines]
    add_customers(session, keys)
    session.flush()
    assert [e.pool.checkedout() for e in engines] == [n + 1 for n in before]
    session.close()
    assert [e.pool.checkedout() for e in engines] == before
    assert len(session.scalars(select(Customer)).all()) == 0
    session.reset()
    assert [e.pool.checkedout() for e in engines] == before


def test_one_transaction_mixes_home_reference_and_sharded_rows(
    Session: Maker, keys: list[int], servers: Servers
) -> None:
    with Session.begin() as session:
        session.add(Country(code="AT", name="Austria"))
        session.add(Setting(name="s"))
        customers = [Customer(id=key, name="A", country_code="AT") for key in keys]
        for customer in customers:
            customer.orders.append(Order(number=1))
        session.add_all(customers)
    assert servers.count("orders") == 4
    assert servers.count("country") == 4
    with Session() as session:
        assert session.scalar(select(func.count(Setting.id))) == 1
        assert {c.country.name for c in session.scalars(select(Customer))} == {
            "Austria"
        }
        country = session.get_one(Country, "AT")
        session.delete(country)
        with pytest.raises(sa_exc.IntegrityError):
            session.commit()
        session.rollback()
    assert servers.count("country") == 4


def test_rows_sharded_by_a_locator_are_beside_the_row_it_names(
    cluster: Cluster, servers: Servers, keys: list[int], Session: Maker
) -> None:
    class Base(DeclarativeBase):
        metadata = MetaData()

    class Parent(Base):
        __tablename__ = "locator_parent"
        __table_args__ = {"info": sharded_by("tenant")}
        id: Mapped[UUID] = locator_id()
        tenant: Mapped[int] = mapped_column(BigInteger)

    class Child(Base):
        __tablename__ = "locator_child"
        __table_args__ = {"info": sharded_by("parent_id")}
        parent_id: Mapped[UUID] = mapped_column(
            ForeignKey("locator_parent.id"), primary_key=True
        )
        number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

    cluster.create_all(Base.metadata)
    servers.empty(Base.metadata)
    with Session.begin() as session:
        parents = [Parent(tenant=key) for key in keys]
        session.add_all(parents)
        session.flush()
        session.add_all(
            Child(parent_id=p.id, number=n) for p in parents for n in (1, 2)
        )
    with Session() as session:
        for parent in session.scalars(select(Parent)):
            children = select(Child).where(Child.parent_id == parent.id)
            assert len(session.scalars(children).all()) == 2
