"""Objects of annotated classes: where their rows go, and what the session knows."""

from __future__ import annotations

import pickle
from datetime import date, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sessions_models import (
    Account,
    Alarm,
    Blob,
    Counted,
    Country,
    Customer,
    Day,
    Event,
    Loan,
    Note,
    Order,
    Reading,
    Savings,
    Setting,
    Ticket,
    measurement,
)
from sessions_servers import Servers, keys_on_each_shard
from sqlalchemy import event, func, inspect, select, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import (
    exc as orm_exc,
)
from sqlalchemy.orm import (
    make_transient,
    make_transient_to_detached,
    object_session,
    sessionmaker,
)

from shardalchemy import Cluster, ShardedSession, ShardKeyError

Maker = sessionmaker[ShardedSession]

TEXT_KEYS = [
    "plain",
    "",
    " ",
    "Ünïcödé",
    "e\u0301",
    "\u00e9",
    "日本語",
    "🦊",
    "quote ' \" \\ %s %% :x",
    "line\nbreak\ttab",
    "x" * 5000,
]
INTEGER_KEYS = [0, 1, -1, 42, -42, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("key", INTEGER_KEYS)
def test_a_bigint_key_puts_its_row_on_its_shard(
    Session: Maker, cluster: Cluster, servers: Servers, key: int
) -> None:
    with Session.begin() as session:
        session.add(Customer(id=key, name="A"))
    assert servers.shards_of("customer", "id", key) == [
        cluster.shard_for(Customer, key)
    ]
    with Session() as session:
        assert session.get_one(Customer, key).name == "A"
        found = session.scalars(select(Customer).where(Customer.id == key)).all()
        assert [c.id for c in found] == [key]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_a_text_key_puts_its_row_on_its_shard(
    Session: Maker, cluster: Cluster, servers: Servers, key: str
) -> None:
    with Session.begin() as session:
        session.add(Account(owner=key))
    assert servers.shards_of("account", "owner", key) == [
        cluster.shard_for(Account, key)
    ]
    with Session() as session:
        assert session.get_one(Account, key).balance == 0
        assert session.scalars(
            select(Account.owner).where(Account.owner.in_([key]))
        ).all() == [key]


def test_text_keys_that_look_alike_are_different_rows(session: ShardedSession) -> None:
    session.add_all(Account(owner=key, balance=n) for n, key in enumerate(TEXT_KEYS))
    session.commit()
    session.expunge_all()
    for number, key in enumerate(TEXT_KEYS):
        assert session.get_one(Account, key).balance == number


@pytest.mark.parametrize(
    "key",
    [UUID(int=0), UUID(int=2**128 - 1), UUID("0190a5c8-0000-7000-8000-00000000aaaa")],
)
def test_a_uuid_key_puts_its_row_on_its_shard(
    Session: Maker, cluster: Cluster, servers: Servers, key: UUID
) -> None:
    with Session.begin() as session:
        session.add(Event(id=key, text="x"))
    assert servers.shards_of("event", "id", key) == [cluster.shard_for(Event, key)]
    with Session() as session:
        assert session.get_one(Event, key).text == "x"


@pytest.mark.parametrize(
    "day", [date(2024, 2, 29), date(1, 1, 1), date(9999, 12, 31), date(1999, 12, 31)]
)
def test_a_date_key_puts_its_row_on_its_shard(
    Session: Maker, cluster: Cluster, servers: Servers, day: date
) -> None:
    with Session.begin() as session:
        session.add(Day(day=day, total=1))
    assert servers.shards_of("day", "day", day) == [cluster.shard_for(Day, day)]
    with Session() as session:
        assert session.get_one(Day, day).total == 1


@pytest.mark.parametrize("digest", [b"", b"\x00", b"\xff" * 32, bytes(range(256))])
def test_a_bytea_key_puts_its_row_on_its_shard(
    Session: Maker, cluster: Cluster, servers: Servers, digest: bytes
) -> None:
    with Session.begin() as session:
        session.add(Blob(digest=digest, size=len(digest)))
    assert servers.shards_of("blob", "digest", digest) == [
        cluster.shard_for(Blob, digest)
    ]
    with Session() as session:
        assert session.get_one(Blob, digest).size == len(digest)


def test_a_default_makes_the_key_before_the_shard_is_chosen(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    with Session.begin() as session:
        session.add_all(events := [Event(text=str(n)) for n in range(20)])
        session.flush()
        ids = [e.id for e in events]
    for ident in ids:
        assert servers.shards_of("event", "id", ident) == [
            cluster.shard_for(Event, ident)
        ]
    assert len(servers.rows("SELECT id FROM event")) > 1


@pytest.mark.parametrize("entity", [Ticket, Counted])
def test_a_counted_key_is_unique_in_the_cluster(
    Session: Maker, cluster: Cluster, servers: Servers, entity: Any
) -> None:
    for _ in range(3):
        with Session.begin() as session:
            session.add_all(made := [entity(title=str(n)) for n in range(30)])
            session.flush()
            assert all(inspect(m).identity == (m.id,) for m in made)
    held = servers.rows(f"SELECT id FROM {entity.__tablename__}")
    ids = [ident for rows in held.values() for ident in rows]
    assert len(ids) == len(set(ids)) == 90
    for shard, rows in held.items():
        assert {cluster.shard_for(entity, ident) for ident in rows} == {shard}


def test_children_are_on_their_parents_shard(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    keys = keys_on_each_shard(cluster, Customer, 2)
    with Session.begin() as session:
        for key in keys:
            customer = Customer(id=key, name=str(key))
            customer.orders = [Order(number=n, lines=[]) for n in range(3)]
            customer.notes.add(Note(body="n"))
            session.add(customer)
    for table in ("orders", "note"):
        held = servers.rows(f"SELECT customer_id FROM {table}")
        assert set(held) == set(cluster.topology.shards)
        for shard, rows in held.items():
            assert {cluster.shard_for(Customer, key) for key in rows} == {shard}
    locators = servers.rows("SELECT id FROM orders")
    for shard, idents in locators.items():
        assert {
            cluster.shard_for(Order, k)
            for k in servers.rows("SELECT customer_id FROM orders")[shard]
        } == {shard}
        assert all(ident.version == 7 for ident in idents)


def test_joined_inheritance_keeps_both_rows_together(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    with Session.begin() as session:
        for number in range(12):
            session.add(Savings(owner=f"s{number}", rate=number))
            session.add(Loan(owner=f"l{number}", years=number))
    for table in ("savings", "loan"):
        for shard, owners in servers.rows(f"SELECT owner FROM {table}").items():
            for owner in owners:
                assert cluster.shard_for(Account, owner) == shard
                assert servers.shards_of("account", "owner", owner) == [shard]
    with Session() as session:
        assert session.get_one(Savings, "s3").rate == 3
        session.expunge_all()
        everyone = session.scalars(select(Account)).all()
        assert (
            sorted(type(a).__name__ for a in everyone)
            == ["Loan"] * 12 + ["Savings"] * 12
        )
        savings = session.scalars(select(Savings)).all()
        assert sorted(s.rate for s in savings) == list(range(12))


def test_a_childs_columns_are_loaded_after_its_base_was(Session: Maker) -> None:
    with Session.begin() as session:
        session.add_all(Savings(owner=f"s{n}", rate=n) for n in range(8))
    with Session() as session:
        accounts = session.scalars(select(Account)).all()
        assert sorted(a.rate for a in accounts if isinstance(a, Savings)) == list(
            range(8)
        )
    with Session() as session:
        account: Any = session.get_one(Account, "s5")
        assert account.rate == 5


def test_single_table_inheritance_is_one_table_on_every_shard(
    Session: Maker, servers: Servers
) -> None:
    with Session.begin() as session:
        session.add_all(Alarm(text="a", level=n) for n in range(6))
        session.add_all(Event(text="e") for _ in range(6))
    with Session() as session:
        assert sorted(a.level for a in session.scalars(select(Alarm))) == list(range(6))
        assert len(session.scalars(select(Event)).all()) == 12
    kinds = servers.rows("SELECT kind FROM event")
    assert (
        sorted(k for rows in kinds.values() for k in rows)
        == ["alarm"] * 6 + ["event"] * 6
    )


def test_a_reference_table_is_written_everywhere_at_once(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    rows = "SELECT code, name FROM country ORDER BY code"
    with Session.begin() as session:
        session.add(Country(code="AT", name="Austria"))
        session.add(Country(code="PE", name="?"))
    both = [("AT", "Austria"), ("PE", "?")]
    assert servers.rows(rows) == dict.fromkeys(cluster.topology.shards, both)
    with Session.begin() as session:
        session.get_one(Country, "PE").name = "Peru"
        session.delete(session.get_one(Country, "AT"))
    left = [("PE", "Peru")]
    assert servers.rows(rows) == dict.fromkeys(cluster.topology.shards, left)


def test_a_home_table_is_on_the_home_shard_alone(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    with Session.begin() as session:
        session.add_all([Setting(name="a"), Setting(name="b")])
    home = cluster.topology.home
    tables = "SELECT tablename FROM pg_tables WHERE tablename = 'setting'"
    assert servers.rows(tables) == {home: ["setting"]}
    assert sorted(servers.rows_on(home, "SELECT name FROM setting")) == ["a", "b"]


# -- a session's life ------------------------------------------------------------------


def test_pending_becomes_persistent_and_is_found_again(session: ShardedSession) -> None:
    customer = Customer(id=7, name="A")
    session.add(customer)
    assert inspect(customer).pending
    assert customer in session.new
    session.flush()
    assert inspect(customer).persistent
    assert customer.version == 1
    assert object_session(customer) is session
    session.commit()
    assert session.get(Customer, 7) is customer
    assert session.get_one(Customer, {"id": 7}) is customer
    assert session.scalars(select(Customer).where(Customer.id == 7)).one() is customer
    assert session.scalars(select(Customer)).one() is customer
    assert session.query(Customer).filter_by(id=7).one() is customer
    order = Order(number=1, customer=customer)
    session.add(order)
    session.flush()
    assert order.customer is customer
    session.expire(order)
    assert order.customer is customer
    assert customer.orders == [order]


def test_autoflush_happens_before_a_query_over_all_shards(
    session: ShardedSession, cluster: Cluster
) -> None:
    session.add_all(
        Customer(id=key, name="A") for key in keys_on_each_shard(cluster, Customer)
    )
    with session.no_autoflush:
        assert session.scalars(select(Customer)).all() == []
    assert len(session.scalars(select(Customer)).all()) == 4


def test_missing_rows_are_none_or_an_error(session: ShardedSession) -> None:
    assert session.get(Customer, 404) is None
    assert session.get(Order, uuid4()) is None
    with pytest.raises(sa_exc.NoResultFound):
        session.get_one(Customer, 404)


def test_server_defaults_and_computed_columns_come_back(
    session: ShardedSession, cluster: Cluster
) -> None:
    for key in keys_on_each_shard(cluster, Customer):
        session.add(
            Customer(id=key, name="A", orders=[Order(number=n) for n in (1, 2)])
        )
    session.flush()
    orders = [o for c in session for o in getattr(c, "orders", [])]
    assert len(orders) == 8
    assert {o.state for o in orders} == {"new"}
    assert sorted(o.doubled for o in orders) == [2] * 4 + [4] * 4
    assert all(isinstance(o.placed_at, datetime) for o in orders)


def test_update_delete_and_refresh_go_to_the_rows_shard(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    keys = keys_on_each_shard(cluster, Customer)
    with Session.begin() as session:
        session.add_all(Customer(id=key, name="A") for key in keys)
    with Session.begin() as session:
        for key in keys[:2]:
            session.get_one(Customer, key).name = "B"
        for key in keys[2:]:
            session.delete(session.get_one(Customer, key))
    rows = servers.rows("SELECT id, name, version FROM customer")
    assert sorted(r for found in rows.values() for r in found) == sorted(
        (key, "B", 2) for key in keys[:2]
    )
    with Session() as session:
        customer = session.get_one(Customer, keys[0])
        servers.run(f"UPDATE customer SET name = 'C' WHERE id = {keys[0]}")
        session.refresh(customer)
        assert customer.name == "C"
        session.refresh(customer, with_for_update=True)
        session.expire(customer, ["name"])
        assert customer.name == "C"


def test_merge_inserts_updates_and_follows_relationships(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    keys = keys_on_each_shard(cluster, Customer)
    with Session.begin() as session:
        session.add_all(Customer(id=key, name="A") for key in keys[:2])
    with Session.begin() as session:
        for key in keys:
            session.merge(Customer(id=key, name="M", orders=[Order(number=1)]))
    assert servers.count("orders") == 4
    names = servers.rows("SELECT name FROM customer")
    assert names == {shard: ["M"] for shard in cluster.topology.shards}


def test_detached_and_pickled_objects_come_back_to_their_shard(
    Session: Maker, servers: Servers
) -> None:
    with Session(expire_on_commit=False) as session:
        session.add(customer := Customer(id=9, name="A", orders=[Order(number=1)]))
        session.commit()
    thawed = pickle.loads(pickle.dumps(customer))
    with Session.begin() as session:
        session.add(thawed)
        thawed.name = "thawed"
        thawed.orders[0].state = "sent"
    [(row,)] = servers.rows("SELECT name FROM customer").values()
    assert row == "thawed"
    assert [*servers.rows("SELECT state FROM orders").values()] == [["sent"]]
    copy = Customer(id=9)
    make_transient_to_detached(copy)
    with Session() as session:
        session.add(copy)
        assert copy.name == "thawed"
        session.delete(copy)
        session.commit()
    make_transient(copy)
    with Session.begin() as session:
        session.add(Customer(id=copy.id, name=copy.name))
    assert servers.count("customer") == 1


def test_a_changed_shard_key_is_refused(
    session: ShardedSession, cluster: Cluster
) -> None:
    here, there = keys_on_each_shard(cluster, Customer)[:2]
    session.add(customer := Customer(id=here, name="A", orders=[Order(number=1)]))
    session.commit()
    for value in (there, here + 10_000, None):
        customer.id = value
        with pytest.raises(ShardKeyError, match="shard"):
            session.flush()
        session.rollback()
    order = customer.orders[0]
    order.customer_id = there
    with pytest.raises(ShardKeyError, match="customer_id"):
        session.flush()
    session.rollback()
    assert (customer.id, order.customer_id) == (here, here)


def test_a_changed_shard_key_moves_the_row(
    session: ShardedSession, cluster: Cluster, servers: Servers
) -> None:
    one, two = keys_on_each_shard(cluster, Reading)[:2]
    session.add(reading := Reading(sensor=one, number=1, value=1))
    session.commit()
    reading.sensor = two
    session.commit()
    assert session.get(Reading, (two, 1)) is reading
    assert session.get(Reading, (one, 1)) is None
    shard = cluster.shard_for(Reading, two)
    assert servers.rows("SELECT sensor FROM reading") == {shard: [two]}


def test_a_shard_key_changed_while_expired_is_refused(
    session: ShardedSession, cluster: Cluster, servers: Servers
) -> None:
    one, two = keys_on_each_shard(cluster, Customer)[:2]
    session.add_all([Customer(id=one, name="1"), Customer(id=two, name="2")])
    session.add(order := Order(customer_id=one, number=1))
    session.commit()
    order.customer_id = two  # the old value is not loaded
    with pytest.raises(ShardKeyError):
        session.flush()
    session.rollback()
    order.customer = session.get_one(Customer, two)
    with pytest.raises(ShardKeyError):
        session.flush()
    session.rollback()
    assert servers.shards_of("orders", "customer_id", one) == [
        cluster.shard_for(Customer, one)
    ]


def test_assigning_an_equal_key_is_no_change(session: ShardedSession) -> None:
    session.add(customer := Customer(id=5, name="A"))
    session.commit()
    customer.id = 5
    customer.name = "B"
    session.commit()
    assert customer.name == "B"


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: Customer(name="A"), "no id"),
        (lambda: Order(number=1), "no customer_id"),
        (lambda: Customer(id="5", name="A"), "'5'"),
        (lambda: Customer(id=1.0, name="A"), "1.0"),
        (lambda: Customer(id=True, name="A"), "True"),
        (lambda: Customer(id=2**63, name="A"), "64 bits"),
        (lambda: Customer(id=func.abs(-1), name="A"), "SQL expression"),
        (lambda: Account(owner=None), "no owner"),
        (lambda: Account(owner=b"x"), "b'x'"),
        (lambda: Account(owner="\ud800"), "must be a str"),
        (lambda: Day(day=datetime(2024, 1, 1), total=1), "datetime"),
        (lambda: Blob(digest="x", size=1), "'x'"),
        (lambda: Event(id="no uuid", text="x"), "no uuid"),
        (lambda: Reading(number=1, value=1), "no sensor"),
    ],
)
def test_a_missing_or_wrong_key_is_refused_and_nothing_is_written(
    session: ShardedSession, servers: Servers, made: Any, match: str
) -> None:
    session.add(Customer(id=1, name="kept?"))
    session.add(made())
    with pytest.raises(ShardKeyError, match=match):
        session.flush()
    session.rollback()
    assert servers.count("customer") == 0
    session.add(Customer(id=1, name="A"))
    session.commit()
    assert servers.count("customer") == 1


def test_a_get_by_a_key_of_another_type_finds_what_postgresql_would(
    session: ShardedSession,
) -> None:
    session.add_all(Customer(id=n, name=str(n)) for n in range(1, 9))
    session.commit()
    for given, name in (("3", "3"), (3.6, "4")):
        session.expunge_all()
        found = session.get(Customer, given)
        assert (found and found.name) == name
    with pytest.raises(sa_exc.SQLAlchemyError):
        session.get(Customer, object())


def test_a_stale_version_is_refused_on_every_shard(
    Session: Maker, cluster: Cluster
) -> None:
    keys = keys_on_each_shard(cluster, Customer)
    with Session.begin() as session:
        session.add_all(Customer(id=key, name="A") for key in keys)
    for key in keys:
        with Session() as mine, Session() as theirs:
            here, there = mine.get_one(Customer, key), theirs.get_one(Customer, key)
            there.name = "theirs"
            theirs.commit()
            here.name = "mine"
            with pytest.raises(orm_exc.StaleDataError):
                mine.commit()
            mine.rollback()
            assert (here.name, here.version) == ("theirs", 2)


def test_a_composite_primary_key_is_got_in_every_form(session: ShardedSession) -> None:
    session.add_all(
        Reading(sensor=s, number=n, value=s * n) for s in range(9) for n in (1, 2)
    )
    session.commit()
    session.expunge_all()
    for sensor in range(9):
        assert session.get_one(Reading, (sensor, 2)).value == sensor * 2
        by_name = session.get_one(Reading, {"number": 1, "sensor": sensor})
        assert by_name.value == sensor
    assert session.get(Reading, (1, 3)) is None


def test_five_thousand_rows_are_added_in_few_statements(
    Session: Maker, cluster: Cluster, servers: Servers
) -> None:
    statements: list[str] = []
    with Session() as session:
        session.add_all(Reading(sensor=n, number=n, value=n) for n in range(5000))
        for shard in cluster.topology.shards:
            engine = session.get_bind(shard=shard)
            event.listen(
                engine,
                "before_cursor_execute",
                lambda c, cu, statement, *_: statements.append(statement),
            )
        session.commit()
    assert servers.count("reading") == 5000
    inserts = [s for s in statements if s.startswith("INSERT INTO reading")]
    assert 4 <= len(inserts) <= 24
    for shard, sensors in servers.rows("SELECT sensor FROM reading").items():
        assert {cluster.shard_for(Reading, s) for s in sensors} == {shard}


def test_objects_keep_the_order_in_which_they_were_added_within_a_shard(
    session: ShardedSession, servers: Servers
) -> None:
    session.add_all(made := [Ticket(title=str(n)) for n in range(40)])
    session.commit()
    ids = {t.id: int(t.title) for t in made}
    assert [ids[i] for i in sorted(ids)] == list(range(40))


def test_a_core_table_is_sharded_as_well(
    session: ShardedSession, cluster: Cluster, servers: Servers
) -> None:
    for number in range(12):
        session.execute(
            measurement.insert().values(station=f"st{number}", number=1, value=number)
        )
    session.execute(
        measurement.insert(),
        [{"station": "st1", "number": n, "value": n} for n in range(2, 5)],
    )
    session.commit()
    for shard, stations in servers.rows("SELECT station FROM measurement").items():
        assert {cluster.shard_for(measurement, s) for s in stations} == {shard}
    total = session.scalar(
        select(func.sum(measurement.c.value)).where(measurement.c.station == "st1")
    )
    assert total == 1 + 2 + 3 + 4
    rows = session.execute(select(measurement.c.value).where(measurement.c.number == 1))
    assert sorted(rows.scalars()) == list(range(12))
    changed = session.execute(
        measurement.update().where(measurement.c.station == "st1").values(value=0)
    )
    assert changed.rowcount == 4
    gone = session.execute(
        measurement.delete()
        .where(measurement.c.station == "st1")
        .returning(measurement.c.number)
    )
    assert sorted(gone.scalars()) == [1, 2, 3, 4]
    session.commit()
    assert servers.count("measurement") == 11


def test_sqlmodel_tables_are_sharded(
    cluster: Cluster, office: Servers, Session: Maker
) -> None:
    from sessions_sqlmodel import Hero, Team
    from sqlmodel import SQLModel
    from sqlmodel import select as model_select

    tables = [Team.__table__, Hero.__table__]
    cluster.create_all(SQLModel.metadata)
    office.empty(SQLModel.metadata)
    keys = keys_on_each_shard(cluster, Team)
    with Session.begin() as session:
        for key in keys:
            session.add(Team(id=key, name=str(key), heroes=[Hero(name="a")]))
    for table, column in zip(tables, ("id", "team_id"), strict=True):
        for key in keys:
            assert office.shards_of(table.name, column, key) == [
                cluster.shard_for(Team, key)
            ]
    with Session() as session:
        team = session.scalars(model_select(Team).where(Team.id == keys[2])).one()
        assert [h.name for h in team.heroes] == ["a"]
        assert len(session.scalars(model_select(Hero)).all()) == 4


def test_events_of_a_flush_fire_once_and_their_connection_is_usable(
    Session: Maker, cluster: Cluster
) -> None:
    counts: dict[str, int] = {}
    backends: dict[int, set[str]] = {}

    def count(name: str) -> None:
        def listener(*_: object) -> None:
            counts[name] = counts.get(name, 0) + 1

        event.listen(Session, name, listener)

    for name in (
        "before_flush",
        "after_flush",
        "after_flush_postexec",
        "before_commit",
        "after_commit",
        "after_rollback",
        "pending_to_persistent",
    ):
        count(name)

    def before_insert(_: Any, connection: Any, target: Customer) -> None:
        database = connection.execute(text("SELECT shard FROM shardalchemy.catalog"))
        backends.setdefault(target.id, set()).add(database.scalar())

    keys = keys_on_each_shard(cluster, Customer)
    event.listen(Customer, "before_insert", before_insert)
    try:
        with Session.begin() as session:
            session.add_all(Customer(id=key, name="A") for key in keys)
    finally:
        event.remove(Customer, "before_insert", before_insert)
    assert counts == {
        "before_flush": 1,
        "after_flush": 1,
        "after_flush_postexec": 1,
        "before_commit": 1,
        "after_commit": 1,
        "pending_to_persistent": 4,
    }
    assert backends == {key: {cluster.shard_for(Customer, key)} for key in keys}


def test_a_key_given_by_a_listener_counts(Session: Maker, servers: Servers) -> None:
    @event.listens_for(Session, "before_flush")
    def give(session: Any, *_: object) -> None:
        for new in session.new:
            new.id = 77

    with Session.begin() as session:
        session.add(Customer(name="A"))
    assert [*servers.rows("SELECT id FROM customer").values()] == [[77]]


def test_a_key_given_by_a_mapper_listener_comes_too_late(
    Session: Maker, servers: Servers
) -> None:
    def give(_: object, __: object, target: Customer) -> None:
        target.id = 78

    event.listen(Customer, "before_insert", give)
    try:
        with Session() as session:
            session.add(Customer(id=1, name="A"))
            # The shard is chosen before, so that the listener can have a connection.
            with pytest.raises((ShardKeyError, sa_exc.IntegrityError)):
                session.commit()
            session.rollback()
            session.add(Customer(name="A"))
            with pytest.raises(ShardKeyError, match="no id"):
                session.commit()
    finally:
        event.remove(Customer, "before_insert", give)
    assert servers.count("customer") == 0
