"""Relationships between annotated classes: every way to load and change them."""

from __future__ import annotations

from typing import Any

import pytest
from sessions_models import (
    Country,
    Customer,
    Label,
    Line,
    Note,
    Order,
    Ticket,
    Visit,
    customer_label,
)
from sessions_servers import Servers, keys_on_each_shard
from sqlalchemy import exc as sa_exc
from sqlalchemy import func, inspect, select
from sqlalchemy.orm import (
    contains_eager,
    immediateload,
    joinedload,
    lazyload,
    raiseload,
    selectinload,
    sessionmaker,
    subqueryload,
    undefer,
    with_parent,
)

from shardalchemy import Cluster, ShardedSession, ShardKeyError

Maker = sessionmaker[ShardedSession]
EAGER = [lazyload, joinedload, selectinload, subqueryload, immediateload]


@pytest.fixture
def keys(Session: Maker, cluster: Cluster) -> list[int]:
    """Two customers a shard, each with two orders of two lines, and their keys."""
    keys = keys_on_each_shard(cluster, Customer, 2)
    with Session.begin() as session:
        session.add(Country(code="AT", name="Austria"))
        session.add(Country(code="PE", name="Peru"))
        for key in keys:
            country = ("AT", "PE")[key % 2]
            customer = Customer(id=key, name=f"c{key}", country_code=country)
            for number in (2, 1):
                order = Order(number=number, customer=customer)
                order.lines = [
                    Line(position=2, product=f"{key}.{number}.b"),
                    Line(position=1, product=f"{key}.{number}.a"),
                ]
            session.add(customer)
            session.flush()
            customer.visits.extend([Visit(number=n) for n in (3, 1, 2)])
            customer.notes.add_all([Note(body=f"n{n}") for n in range(3)])
    return keys


def shape(customers: Any) -> list[Any]:
    return sorted(
        (
            c.id,
            c.country.name,
            [(o.number, [line.product for line in o.lines]) for o in c.orders],
        )
        for c in customers
    )


def expected(keys: list[int]) -> list[Any]:
    return sorted(
        (
            key,
            ("Austria", "Peru")[key % 2],
            [(n, [f"{key}.{n}.a", f"{key}.{n}.b"]) for n in (1, 2)],
        )
        for key in keys
    )


@pytest.mark.parametrize("load", EAGER)
def test_all_customers_come_with_their_orders_in_order(
    session: ShardedSession, keys: list[int], load: Any
) -> None:
    # The copies of a country on every shard are one to select-in loading alone.
    country = selectinload if load is subqueryload else load
    statement = select(Customer).options(
        load(Customer.orders), country(Customer.country)
    )
    customers = session.scalars(statement).unique().all()
    assert shape(customers) == expected(keys)


@pytest.mark.parametrize("load", EAGER)
def test_one_customer_comes_with_orders_and_lines(
    session: ShardedSession, keys: list[int], load: Any
) -> None:
    for key in keys:
        statement = (
            select(Customer)
            .where(Customer.id == key)
            .options(load(Customer.orders).options(load(Order.lines)))
        )
        assert shape([session.scalars(statement).unique().one()]) == expected([key])
        session.expunge_all()


@pytest.mark.parametrize("load", EAGER)
def test_lines_of_orders_on_all_shards_are_loaded(
    session: ShardedSession, keys: list[int], load: Any
) -> None:
    orders = load(Customer.orders).options(load(Order.lines))
    customers = session.scalars(select(Customer).options(orders)).unique().all()
    assert shape(customers) == expected(keys)


@pytest.mark.parametrize("load", EAGER)
def test_the_many_to_one_side_is_loaded(
    session: ShardedSession, keys: list[int], load: Any
) -> None:
    orders = session.scalars(select(Order).options(load(Order.customer))).all()
    assert sorted(o.customer.id for o in orders) == sorted(keys * 2)
    lines = session.scalars(select(Line).options(load(Line.order))).all()
    assert sorted(line.order.number for line in lines) == [1] * 16 + [2] * 16


@pytest.mark.parametrize("load", [joinedload, selectinload, subqueryload])
def test_a_page_of_one_customers_orders_has_all_its_lines(
    session: ShardedSession, keys: list[int], load: Any
) -> None:
    statement = (
        select(Order)
        .where(Order.customer_id == keys[3])
        .options(load(Order.lines))
        .order_by(Order.number.desc())
        .limit(1)
    )
    order = session.scalars(statement).unique().one()
    assert [line.product for line in order.lines] == [
        f"{keys[3]}.2.a",
        f"{keys[3]}.2.b",
    ]


def test_raiseload_refuses(session: ShardedSession, keys: list[int]) -> None:
    customer = session.get_one(Customer, keys[0], options=[raiseload("*")])
    with pytest.raises(sa_exc.InvalidRequestError, match=r"Customer\.orders"):
        _ = customer.orders


def test_every_way_to_a_row_gives_the_same_object(
    session: ShardedSession, keys: list[int]
) -> None:
    customer = session.get_one(Customer, keys[5])
    order = customer.orders[0]
    assert session.get_one(Order, order.id) is order
    assert session.scalars(select(Order).where(Order.id == order.id)).one() is order
    every = session.scalars(select(Order)).all()
    assert any(o is order for o in every)
    assert order.customer is customer
    assert order.lines[0].order is order
    assert (
        session.scalars(
            select(Customer).join(Customer.orders).where(Order.id == order.id)
        ).one()
        is customer
    )


def test_a_lazy_many_to_one_asks_its_own_shard_and_then_the_identity_map(
    session: ShardedSession, keys: list[int], cluster: Cluster
) -> None:
    from sqlalchemy import event

    order = session.scalars(select(Order).where(Order.customer_id == keys[2])).first()
    assert order is not None
    asked: list[str] = []
    listeners = []
    for shard in cluster.topology.shards:

        def note(*_: object, shard: str = shard) -> None:
            asked.append(shard)

        engine = session.get_bind(shard=shard)
        event.listen(engine, "before_cursor_execute", note)
        listeners.append((engine, note))
    try:
        customer = order.customer
        session.expire(order, ["customer"])
        assert order.customer is customer
    finally:
        for engine, note in listeners:
            event.remove(engine, "before_cursor_execute", note)
    assert asked == [cluster.shard_for(Customer, keys[2])]


def test_contains_eager_and_with_parent(
    session: ShardedSession, keys: list[int]
) -> None:
    statement = (
        select(Customer)
        .join(Customer.orders)
        .where(Order.number == 2)
        .options(contains_eager(Customer.orders))
    )
    customers = session.scalars(statement).unique().all()
    assert [[o.number for o in c.orders] for c in customers] == [[2]] * 8
    customer = session.get_one(Customer, keys[0], populate_existing=True)
    session.expire(customer)
    mine = session.scalars(
        select(Order).where(with_parent(customer, Customer.orders))
    ).all()
    assert {o.customer_id for o in mine} == {keys[0]}


def test_exists_through_a_relationship_is_answered_on_every_shard(
    session: ShardedSession, keys: list[int]
) -> None:
    any_order = select(Customer).where(
        Customer.id == keys[0], Customer.orders.any(Order.number == 2)
    )
    assert session.scalars(any_order).one().id == keys[0]
    has = select(Order).where(
        Order.customer_id == keys[0], Order.customer.has(name=f"c{keys[0]}")
    )
    assert len(session.scalars(has).all()) == 2
    session.delete(session.scalars(select(Order).where(Order.number == 2)).first())
    both = select(Customer.id).where(
        Customer.orders.any(Order.number == 2), Customer.country.has(name="Peru")
    )
    left = {o.customer_id for o in session.scalars(select(Order).filter_by(number=2))}
    assert sorted(session.scalars(both)) == sorted(k for k in left if k % 2)
    without = select(Customer.id).where(~Customer.orders.any(Order.number == 2))
    assert set(session.scalars(without)) == set(keys) - left
    assert len(left) == len(keys) - 1


def test_a_write_only_collection_is_read_and_written_on_its_shard(
    session: ShardedSession, keys: list[int], servers: Servers, cluster: Cluster
) -> None:
    key = keys[1]
    customer = session.get_one(Customer, key)
    bodies = customer.notes.select().with_only_columns(Note.body)
    assert sorted(session.scalars(bodies).all()) == ["n0", "n1", "n2"]
    where = Note.body == "n2"
    customer.notes.remove(session.scalars(customer.notes.select().where(where)).one())
    session.execute(customer.notes.insert(), [{"body": "x"}, {"body": "y"}])
    session.execute(customer.notes.update().where(Note.body == "x").values(body="z"))
    session.execute(customer.notes.delete().where(Note.body == "y"))
    session.commit()
    assert sorted(session.scalars(bodies).all()) == ["n0", "n1", "z"]
    assert servers.shards_of("note", "body", "z") == [cluster.shard_for(Customer, key)]
    for visit in customer.visits:
        session.delete(visit)
    session.delete(customer)
    session.commit()
    assert servers.shards_of("note", "customer_id", key) == []


def test_a_dynamic_relationship_counts_slices_and_filters(
    session: ShardedSession, keys: list[int]
) -> None:
    customer = session.get_one(Customer, keys[4])
    assert customer.visits.count() == 3
    assert [v.number for v in customer.visits] == [1, 2, 3]
    assert [v.number for v in customer.visits[1:]] == [2, 3]
    assert customer.visits.filter(Visit.number > 1).first().number == 2
    customer.visits.append(Visit(number=9))
    assert (
        customer.visits.order_by(None).order_by(Visit.number.desc()).first().number == 9
    )
    customer.visits.remove(customer.visits[0])
    with pytest.raises(ShardKeyError, match="to None"):
        session.flush()


def test_delete_cascades_to_children_on_every_shard(
    session: ShardedSession, keys: list[int], servers: Servers
) -> None:
    for customer in session.scalars(select(Customer)).all():
        for visit in customer.visits:
            session.delete(visit)
        session.delete(customer)
    session.commit()
    for table in ("customer", "orders", "line", "note", "visit"):
        assert servers.count(table) == 0


def test_an_orphan_is_deleted_where_it_was(
    session: ShardedSession, keys: list[int], servers: Servers
) -> None:
    customer = session.get_one(Customer, keys[2])
    gone = customer.orders.pop(0)
    session.commit()
    assert servers.shards_of("orders", "id", gone.id) == []
    assert servers.shards_of("line", "order_id", inspect(gone).identity[0]) == []
    assert servers.count("orders") == 15


def test_an_order_cannot_be_moved_to_a_customer_of_another_shard(
    session: ShardedSession, keys: list[int]
) -> None:
    order = session.scalars(select(Order).where(Order.customer_id == keys[0])).first()
    assert order is not None
    assert order.customer.id == keys[0]
    order.customer = session.get_one(Customer, keys[-1])
    with pytest.raises(ShardKeyError, match="customer_id"):
        session.flush()
    session.rollback()
    assert order.customer_id == keys[0]


def test_a_child_gets_its_key_from_the_parent_it_is_appended_to(
    session: ShardedSession, keys: list[int], servers: Servers, cluster: Cluster
) -> None:
    for key in keys:
        customer = session.get_one(Customer, key)
        order = Order(number=3)
        customer.orders.append(order)
        order.lines.append(Line(position=1, product="new"))
        assert order.customer is customer
    session.commit()
    held = servers.rows("SELECT customer_id FROM line WHERE product = 'new'")
    for shard, found in held.items():
        assert {cluster.shard_for(Customer, key) for key in found} == {shard}
    assert sum(map(len, held.values())) == 8


def test_many_to_many_rows_are_written_on_their_shard(
    session: ShardedSession, keys: list[int], servers: Servers, cluster: Cluster
) -> None:
    for key in keys:
        customer = session.get_one(Customer, key)
        customer.labels = [Label(customer_id=key, name=n) for n in ("b", "a")]
    session.commit()
    for shard, found in servers.rows("SELECT customer_id FROM customer_label").items():
        assert {cluster.shard_for(customer_label, key) for key in found} == {shard}
    session.expunge_all()
    customer = session.get_one(Customer, keys[0])
    assert [label.name for label in customer.labels] == ["a", "b"]
    customer.labels.pop()
    session.commit()
    assert servers.count("customer_label") == 15


def test_many_to_many_is_read(session: ShardedSession, keys: list[int]) -> None:
    for key in keys:
        session.add_all(Label(customer_id=key, name=n) for n in ("b", "a"))
        session.flush()
        session.execute(
            customer_label.insert(),
            [{"customer_id": key, "label_name": n} for n in ("a", "b")],
        )
    session.commit()
    session.expunge_all()
    for load in (lazyload, joinedload, subqueryload, immediateload):
        statement = select(Customer).where(Customer.id == keys[1])
        customer = (
            session.scalars(statement.options(load(Customer.labels))).unique().one()
        )
        assert [label.name for label in customer.labels] == ["a", "b"]
        session.expunge_all()


def test_many_to_many_is_read_by_selectin_from_all_shards(
    session: ShardedSession, keys: list[int]
) -> None:
    for key in keys:
        session.add(Label(customer_id=key, name="a"))
        session.flush()
        session.execute(customer_label.insert().values(customer_id=key, label_name="a"))
    session.commit()
    session.expunge_all()
    statement = select(Customer).options(selectinload(Customer.labels))
    customers = session.scalars(statement).all()
    assert [[label.name for label in c.labels] for c in customers] == [["a"]] * 8


def test_a_reference_to_another_shard_is_loaded_without_a_foreign_key(
    session: ShardedSession, cluster: Cluster
) -> None:
    tickets = [Ticket(title=str(n)) for n in range(12)]
    session.add_all(tickets)
    session.flush()
    for ticket, parent in zip(tickets[1:], tickets, strict=False):
        ticket.parent_id = parent.id
    session.commit()
    session.expunge_all()
    statement = select(Ticket).options(selectinload(Ticket.parent))
    found = {t.id: t for t in session.scalars(statement)}
    assert all(t.parent is found[t.parent_id] for t in found.values() if t.parent_id)
    session.expunge_all()
    lazily = session.scalars(select(Ticket)).all()
    assert sum(t.parent is not None for t in lazily) == 11


def test_a_parent_of_another_shard_is_flushed_first(
    session: ShardedSession, servers: Servers
) -> None:
    last = Ticket(title="0")
    for number in range(1, 10):
        last = Ticket(title=str(number), parent=last)
    session.add(last)
    session.commit()
    rows = [
        r
        for found in servers.rows("SELECT id, parent_id FROM ticket").values()
        for r in found
    ]
    ids = {ident for ident, _ in rows}
    assert len(ids) == 10
    assert {parent for _, parent in rows} - {None} <= ids


def test_a_deferred_column_property_is_loaded_from_the_rows_shard(
    session: ShardedSession, keys: list[int]
) -> None:
    customer = session.get_one(Customer, keys[3])
    assert [o.line_count for o in customer.orders] == [2, 2]
    session.expunge_all()
    pinned = select(Order).where(Order.customer_id == keys[3])
    orders = session.scalars(pinned.options(undefer(Order.line_count))).all()
    assert [o.line_count for o in orders] == [2, 2]


def test_joins_with_reference_tables_and_between_colocated_tables_scatter(
    session: ShardedSession, keys: list[int]
) -> None:
    rows = session.execute(
        select(Customer.id, Country.name, Order.number, Line.product)
        .join(Customer.country)
        .join(Customer.orders)
        .join(Order.lines)
        .where(Country.code == "AT")
    ).all()
    assert sorted({row.id for row in rows}) == sorted(k for k in keys if k % 2 == 0)
    outer = session.execute(
        select(Customer.id, Order.id).outerjoin(
            Order, (Order.customer_id == Customer.id) & (Order.number > 99)
        )
    ).all()
    assert sorted(tuple(row) for row in outer) == sorted((key, None) for key in keys)
    count = session.scalar(
        select(func.count())
        .select_from(Customer)
        .join(Customer.orders)
        .where(Customer.id == keys[0])
    )
    assert count == 2
