"""INSERT, UPDATE and DELETE of rows of several shards come out as on one PostgreSQL."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from sqlalchemy import (
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    lambda_stmt,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import with_loader_criteria
from sqlalchemy.types import DateTime, String

from shardalchemy.errors import ShardKeyError, UnsupportedQueryError
from tests.integration.test_planner_differential import (
    KEYS,
    ROWS,
    Both,
    Country,
    Customer,
    Firm,
    Gadget,
    Line,
    Note,
    Order,
    Party,
    Setting,
    Tag,
    both,
    plain_value,
)

__all__ = ["both"]

NEW = [{"id": n, "name": f"n{n}", "v": n % 5} for n in range(1000, 1040)]
TAGS = [{"tag": f"t{n}", "v": n} for n in range(20)]
OFF = {"synchronize_session": False}


# -- INSERT of many rows -------------------------------------------------------------


@pytest.mark.parametrize("target", [Customer, Customer.__table__])
@pytest.mark.parametrize("listening", [False, True])
def test_many_rows_are_each_written_on_their_shard(
    both: Both, target: Any, listening: bool
) -> None:
    from sqlalchemy import event

    maker = both.sharded
    if listening:
        both.sharded = both.cluster.sessionmaker()
        event.listen(both.sharded, "do_orm_execute", lambda state: None)
    try:
        assert both.check_write(insert(target), NEW) == "equal"
        assert both.check_write(insert(target).values(NEW)) == "equal"
        statement = insert(target).returning(Customer.id, Customer.name)
        assert both.check_write(statement, NEW) == "equal"
    finally:
        both.sharded = maker


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_returned_rows_come_in_the_order_given(
    both: Both, in_order: bool, values: bool
) -> None:
    def work(session: Any) -> Any:
        statement = insert(Customer)
        if values:
            statement = statement.values(NEW)
        statement = statement.returning(Customer, sort_by_parameter_order=in_order)
        rows = session.scalars(statement, None if values else NEW).all()
        assert all(row in session for row in rows)
        return tuple(row.id for row in rows)

    expected = "error on both" if values and in_order else "equal"
    assert both.compare(work) == expected


def test_the_result_tells_what_a_cursor_result_does(both: Both) -> None:
    def work(session: Any) -> Any:
        result = session.execute(insert(Tag.__table__), TAGS)
        with pytest.raises(sa_exc.ResourceClosedError):
            result.all()
        keys = [tuple(key) for key in result.inserted_primary_key_rows]
        changed = session.execute(update(Tag.__table__).values(v=1))
        gone = session.execute(delete(Tag.__table__).where(Tag.v == 1))
        return (
            keys,
            result.is_insert,
            result.returns_rows,
            result.rowcount,
            changed.rowcount,
            gone.rowcount,
            gone.closed,
        )

    assert both.compare(work) == "equal"


@pytest.mark.parametrize("core", [False, True])
def test_rows_that_name_other_columns_than_the_first(both: Both, core: bool) -> None:
    target = Tag.__table__ if core else Tag
    more = [{"tag": f"t{n}"} | ({"v": n} if n else {}) for n in range(12)]
    less = [{"tag": f"t{n}"} | ({} if n else {"v": 3}) for n in range(12)]
    assert both.check_write(insert(target), more) == "equal"
    assert both.check_write(insert(target), less) == (
        "error on both" if core else "equal"
    )


def test_defaults_are_made_once_for_each_row(both: Both) -> None:
    day = datetime.date(2024, 1, 1)
    customers = [{"id": n, "name": "x"} for n in range(100, 120)]
    orders = [{"customer_id": n, "status": "s", "placed": day} for n in range(100, 120)]
    for target in (Order, Order.__table__):
        for values in (False, True):
            with both.sharded() as session:
                session.execute(insert(Customer), customers)
                statement = insert(target)
                if values:
                    session.execute(statement.values(orders))
                else:
                    session.execute(statement, orders)
                found = session.execute(
                    select(Order.id, Order.customer_id).where(Order.customer_id >= 100)
                ).all()
                assert len({id_ for id_, _ in found}) == 20
                for id_, key in found:
                    assert session.get_one(Order, id_).customer_id == key


def test_a_converted_key(both: Both) -> None:
    rows = [{"code": n, "v": n} for n in range(100, 130)]
    for target in (Gadget, Gadget.__table__):
        assert both.check_write(insert(target), rows) == "equal"
        assert both.check_write(insert(target).values(rows)) == "equal"


def test_a_child_of_joined_inheritance(both: Both) -> None:
    rows = [{"id": n, "v": n, "vat": "x", "type": "firm"} for n in range(100, 120)]
    assert both.check_write(insert(Firm), rows) == "equal"
    returning = insert(Firm).returning(Firm, sort_by_parameter_order=True)
    assert both.check_write(returning, rows) == "equal"


def test_keys_that_a_sequence_counts(both: Both) -> None:
    with both.sharded() as session:
        session.execute(delete(Firm))
        session.execute(delete(Party))
        rows = [{"type": "party", "v": n} for n in range(20)]
        found = session.scalars(
            insert(Party).returning(Party, sort_by_parameter_order=True), rows
        ).all()
        assert [party.v for party in found] == list(range(20))
        assert len({party.id for party in found}) == 20


def test_rows_and_values_together(both: Both) -> None:
    table = Tag.__table__
    params = [{"x": f"t{n}", "n": n} for n in range(12)]
    statement = insert(table).values(tag=bindparam("x"), v=bindparam("n") + 1)
    assert both.check_write(statement, params) == "equal"
    fixed = insert(Tag).values(v=7)
    assert both.check_write(fixed, [{"tag": f"t{n}"} for n in range(12)]) == "equal"


@pytest.mark.parametrize("kind", ["nothing", "update", "where"])
def test_on_conflict_is_settled_on_each_shard(both: Both, kind: str) -> None:
    rows = [*ROWS[Tag], *TAGS]
    statement = pg.insert(Tag)
    if kind == "nothing":
        statement = statement.on_conflict_do_nothing()
    else:
        statement = statement.on_conflict_do_update(
            index_elements=["tag"],
            set_={"v": func.coalesce(Tag.v, 0) + statement.excluded.v + 1},
            where=Tag.v > 2 if kind == "where" else None,
        )
    rows = [{"tag": row["tag"], "v": row["v"]} for row in rows]
    assert both.check_write(statement, rows) == "equal"
    assert both.check_write(statement.values(rows)) == "equal"
    assert both.check_write(statement.returning(Tag.tag, Tag.v), rows) == "equal"


@pytest.mark.parametrize("many", [False, True])
def test_a_value_that_is_read_from_the_table_itself_is_refused(
    both: Both, many: bool
) -> None:
    v = select(func.max(Tag.v)).scalar_subquery()
    rows = [{"tag": f"t{n}", "v": v} for n in range(9 if many else 1)]
    assert both.check_write(insert(Tag).values(rows)) == "refused"
    assert both.check_write(insert(Tag).values(rows[0])) == "refused"
    child = insert(Firm).values(id=99, vat=cast(v, String))
    assert both.check_write(child) in ("refused", "error on both")


def test_a_row_without_a_usable_key_is_refused_before_any_is_written(
    both: Both,
) -> None:
    with both.sharded() as session:
        for bad in ("x", 2**70, 1.0):
            with pytest.raises(ShardKeyError):
                session.execute(insert(Customer), [*NEW, {"id": bad, "name": "x"}])
        assert session.get(Customer, 1000) is None


# -- UPDATE and DELETE by criteria -----------------------------------------------------

EACH_ROW: dict[str, Any] = {
    "all": lambda: update(Customer).values(v=7),
    "own value": lambda: update(Customer).values(v=Customer.v + 1),
    "in": lambda: update(Customer).where(Customer.id.in_(KEYS[:5])).values(v=8),
    "core": lambda: update(Customer.__table__).values(v=func.coalesce(Customer.v, 9)),
    "delete": lambda: delete(Line).where(Line.v > 2),
    "text": lambda: delete(Line).where(text("v > 2 OR v < 2")),
    "returning": lambda: (
        update(Order).values(v=Order.v + 1).returning(Order.id, Order.v)
    ),
    "returning entity": lambda: update(Customer).values(v=4).returning(Customer),
    "delete returning": lambda: delete(Tag).returning(Tag.tag),
    "exists": lambda: (
        update(Customer)
        .where(exists().where(Order.customer_id == Customer.id, Order.v > 2))
        .values(v=1)
    ),
    "not exists": lambda: delete(Line).where(
        ~exists().where(Order.customer_id == Line.customer_id, Order.v > 2)
    ),
    "scalar": lambda: update(Customer).values(
        v=select(func.count()).where(Order.customer_id == Customer.id).scalar_subquery()
    ),
    "scalar limit": lambda: update(Customer).values(
        v=select(Order.v)
        .where(Order.customer_id == Customer.id)
        .order_by(Order.v, Order.id)
        .limit(1)
        .scalar_subquery()
    ),
    "in subquery": lambda: (
        update(Customer)
        .where(Customer.v.in_(select(Order.v).where(Order.customer_id == Customer.id)))
        .values(v=1)
    ),
    "nested": lambda: (
        update(Customer)
        .where(
            exists().where(
                Order.customer_id == Customer.id,
                exists().where(
                    Line.customer_id == Order.customer_id, Line.v == Order.v
                ),
            )
        )
        .values(v=1)
    ),
    "from": lambda: (
        update(Order)
        .where(Order.customer_id == Customer.id, Customer.v == 3)
        .values(v=Order.v + 10)
    ),
    "using": lambda: delete(Line).where(
        Line.customer_id == Customer.id, Customer.v > 2
    ),
    "from a copy": lambda: (
        update(Customer)
        .where(Customer.country_code == Country.code)
        .values(name=Country.name)
    ),
    "a copy in a subquery": lambda: (
        update(Customer)
        .where(Customer.country_code.in_(select(Country.code)))
        .values(v=select(func.max(Country.v)).scalar_subquery())
    ),
    "criteria": lambda: (
        update(Customer)
        .values(v=2)
        .options(with_loader_criteria(Customer, Customer.name == "n"))
    ),
    "lambda": lambda: lambda_stmt(lambda: update(Customer).values(v=7)),
    "joined child": lambda: (
        update(Firm).where(Firm.id == Party.id, Party.v > 2).values(vat="y")
    ),
}


@pytest.mark.parametrize("made", EACH_ROW)
@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch", False])
def test_a_write_of_rows_by_themselves(both: Both, made: str, sync: Any) -> None:
    options = {"synchronize_session": sync}
    expected = {"equal", "error on both"} if sync == "evaluate" else {"equal"}
    assert both.check_write(EACH_ROW[made](), options=options) in expected


OF_OTHER_SHARDS: dict[str, Any] = {
    "uncorrelated": lambda: delete(Line).where(
        Line.customer_id.in_(select(Customer.id).where(Customer.v == 3))
    ),
    "by no key": lambda: update(Order).where(Order.v == Line.v).values(v=1),
    "scalar": lambda: update(Tag).values(v=select(func.max(Order.v)).scalar_subquery()),
    "limited copies": lambda: update(Tag).values(
        v=select(Country.v).limit(1).scalar_subquery()
    ),
    "unknown function": lambda: update(Tag).values(v=func.pg_backend_pid()),
    "sequence": lambda: update(Tag).values(v=func.nextval("pd_parties_id_seq")),
    "text that calls": lambda: update(Tag).values(v=text("pg_backend_pid()")),
    "age of today": lambda: (
        update(Order)
        .where(func.age(Order.placed) > literal_column("interval '1 day'"))
        .values(v=1)
    ),
    "the key": lambda: update(Tag).where(Tag.tag.in_(["a", "zz"])).values(tag="q"),
    "home table": lambda: delete(Tag).where(Tag.customer_id == Note.customer_id),
    "a cte used twice": lambda: _twice(),
}


def _twice() -> Any:
    cte = select(Customer.id, Customer.v).cte()
    one, two = cte.alias(), cte.alias()
    return (
        update(Order)
        .where(Order.customer_id == one.c.id, one.c.v == two.c.v)
        .values(v=1)
    )


@pytest.mark.parametrize("made", OF_OTHER_SHARDS)
def test_a_write_that_depends_on_other_shards_is_refused(both: Both, made: str) -> None:
    assert both.check_write(OF_OTHER_SHARDS[made](), options=OFF) == "refused"


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch", False])
@pytest.mark.parametrize("kind", ["add", "fixed", "delete", "function"])
def test_objects_follow_as_in_a_plain_session(both: Both, kind: str, sync: Any) -> None:
    def work(session: Any) -> Any:
        objects = session.scalars(select(Customer)).all()
        statement = {
            "add": update(Customer).where(Customer.v > 2).values(v=Customer.v + 1),
            "fixed": update(Customer).where(Customer.v > 2).values(name="new"),
            "delete": delete(Customer).where(Customer.id == -3),
            "function": update(Customer).values(v=func.coalesce(Customer.v, 5)),
        }[kind]
        session.execute(statement, execution_options={"synchronize_session": sync})
        held = sorted(
            (repr(plain_value(o)[:4]) for o in objects if o in session), key=repr
        )
        session.expire_all()
        return held, sorted(session.execute(select(Customer.id, Customer.v)).all())

    assert both.compare(work) == "equal"


@pytest.mark.parametrize("sync", ["auto", "fetch"])
def test_objects_of_a_reference_table_follow_once(both: Both, sync: str) -> None:
    def work(session: Any) -> Any:
        objects = session.scalars(select(Country).order_by(Country.code)).all()
        statement = update(Country).where(Country.v > 0).values(v=Country.v + 1)
        session.execute(statement, execution_options={"synchronize_session": sync})
        return [country.v for country in objects]

    assert both.compare(work) == "equal"


# -- many parameter sets ---------------------------------------------------------------


def test_parameter_sets_go_each_to_its_shard(both: Both) -> None:
    table = Customer.__table__
    sets = [{"x": key, "y": n} for n, key in enumerate(KEYS)]
    pinned = update(table).where(table.c.id == bindparam("x"))
    assert both.check_write(pinned.values(v=bindparam("y")), sets) == "equal"
    assert both.check_write(pinned, [{"x": k, "v": 5} for k in KEYS]) == "equal"
    unpinned = update(table).where(table.c.v == bindparam("x")).values(v=table.c.v + 7)
    assert both.check_write(unpinned, [{"x": n} for n in range(1, 5)]) == "equal"
    nowhere = [{"x": None, "y": 1}, {"x": None, "y": 2}]
    assert both.check_write(pinned.values(v=bindparam("y")), nowhere) == "equal"
    with both.sharded() as session, pytest.raises(UnsupportedQueryError, match="lives"):
        session.execute(pinned, [{"x": 1, "id": 2}, {"x": 2, "id": 3}])


def test_the_row_count_of_many_parameter_sets(both: Both) -> None:
    table = Customer.__table__

    def work(session: Any) -> int:
        statement = update(table).where(table.c.id == bindparam("x")).values(v=1)
        return session.execute(statement, [{"x": k} for k in KEYS]).rowcount

    assert both.compare(work) == "equal"


def test_orm_updates_by_primary_key(both: Both) -> None:
    customers = [{"id": key, "v": n, "name": "b"} for n, key in enumerate(KEYS)]
    assert both.check_write(update(Customer), customers) == "equal"
    orders = [{"id": row["id"], "v": n} for n, row in enumerate(ROWS[Order])]
    assert both.check_write(update(Order), orders) == "equal"
    firms = [{"id": row["id"], "v": 1, "vat": "z"} for row in ROWS[Firm]]
    assert both.check_write(update(Firm), firms) == "equal"
    missing = [{"id": 77, "v": 1}, {"id": 78, "v": 2}]
    assert both.check_write(update(Customer), missing) == "error on both"
    without = [{"v": 1}, {"v": 2}]
    assert both.check_write(update(Customer), without) == "error on both"

    def objects(session: Any) -> Any:
        held = session.scalars(select(Customer)).all()
        session.execute(update(Customer), customers)
        return sorted((c.id, c.v, c.name) for c in held)

    assert both.compare(objects) == "equal"


def test_orm_updates_by_primary_key_that_would_move_a_row(both: Both) -> None:
    order = ROWS[Order][0]
    other = next(k for k in KEYS if k != order["customer_id"])
    same = {"id": order["id"], "customer_id": order["customer_id"], "v": 4}
    assert both.check_write(update(Order), [same]) == "equal"
    with both.sharded() as session, pytest.raises(ShardKeyError, match="customer_id"):
        session.execute(update(Order), [{"id": order["id"], "customer_id": other}])


# -- what each shard would evaluate for itself -----------------------------------------


def test_now_is_one_moment_on_all_shards(both: Both) -> None:
    stamp = cast(func.now(), String)
    added = select(Customer.name).where(Customer.id.in_(range(1000, 1020)))
    with both.sharded() as session:
        session.execute(update(Customer).values(name=stamp))
        session.execute(update(Tag).values(v=3))
        names = set(session.scalars(select(Customer.name)))
        assert len(names) == 1
        session.rollback()
        statement = insert(Customer).values(name=stamp)
        session.execute(statement, [{"id": n} for n in range(1000, 1020)])
        names = set(session.scalars(added))
        assert len(names) == 1
        upsert = pg.insert(Customer).values(name="x")
        upsert = upsert.on_conflict_do_update(
            index_elements=["id"], set_={"name": stamp}
        )
        session.execute(upsert, [{"id": n} for n in range(1000, 1020)])
        assert len(set(session.scalars(added))) == 1
    past = delete(Line).where(func.now() > cast("2020-01-01", DateTime(timezone=True)))
    assert both.check_write(past, options=OFF) == "equal"
    today = update(Order).where(Order.placed < func.current_date()).values(v=1)
    assert both.check_write(today) == "equal"


def test_what_is_made_for_each_row_differs_from_row_to_row(both: Both) -> None:
    with both.sharded() as session:
        session.execute(
            update(Customer).values(name=cast(func.gen_random_uuid(), String))
        )
        assert len(set(session.scalars(select(Customer.name)))) == len(KEYS)


# -- reference tables -----------------------------------------------------------------


COPIED: dict[str, Any] = {
    "now": lambda: update(Country).values(name=cast(func.now(), String)),
    "one random": lambda: insert(Country).values(
        code="zz", name=cast(func.random(), String)
    ),
    "two random": lambda: insert(Country).values(
        [
            {"code": c, "name": cast(func.gen_random_uuid(), String)}
            for c in ("yy", "zz")
        ]
    ),
    "upsert": lambda: (
        pg.insert(Country)
        .values(code="de", name="x")
        .on_conflict_do_update(
            index_elements=["code"], set_={"name": cast(func.now(), String)}
        )
    ),
    "default": lambda: insert(Setting).values(id=50, v=1),
    "defaults": lambda: insert(Setting).values([{"id": n} for n in range(50, 55)]),
    "returning": lambda: insert(Setting).values(id=50).returning(Setting),
}


@pytest.mark.parametrize("made", COPIED)
def test_copies_are_given_one_value(both: Both, made: str) -> None:
    with both.sharded() as session:
        session.execute(COPIED[made]())
        both.everything(session)  # compares the copies
    with both.sharded() as session:
        session.execute(insert(Setting), [{"id": n} for n in range(50, 60)])
        tokens = session.scalars(select(Setting.token).where(Setting.id >= 50)).all()
        assert len(set(tokens)) == 10
        both.everything(session)


def test_an_onupdate_of_a_reference_table(both: Both) -> None:
    with both.sharded() as session:
        with pytest.raises(UnsupportedQueryError, match="touched"):
            session.execute(update(Setting).values(v=4))
        session.execute(update(Setting).values(v=4, touched="x"))
        rows = [{"id": n, "v": n, "touched": "y"} for n in range(1, 4)]
        session.execute(update(Setting), rows)
        assert len(set(session.scalars(select(Setting.token)))) == 3
        both.everything(session)


def test_what_differs_from_row_to_row_is_refused_for_copies(both: Both) -> None:
    each = cast(func.gen_random_uuid(), String)
    assert both.check_write(update(Country).values(name=each)) == "refused"
    rows = [{"code": "yy"}, {"code": "zz"}]
    assert both.check_write(insert(Country).values(name=each), rows) == "refused"


@pytest.mark.parametrize("method", ["insert", "objects", "update"])
def test_legacy_bulk_methods_reach_every_copy(both: Both, method: str) -> None:
    def work(session: Any) -> Any:
        rows = [{"code": c, "name": "n"} for c in ("yy", "zz")]
        if method == "insert":
            session.bulk_insert_mappings(Country, rows)
        elif method == "objects":
            session.bulk_save_objects([Country(**row) for row in rows])
        else:
            session.bulk_update_mappings(Country, [{"code": "de", "name": "n"}])
        return both.everything(session)

    assert both.compare(work) == "equal"


@pytest.mark.parametrize("method", ["insert", "defaults", "objects", "update"])
def test_legacy_bulk_methods_of_a_sharded_table(both: Both, method: str) -> None:
    def work(session: Any) -> Any:
        if method in ("insert", "defaults"):
            session.bulk_insert_mappings(
                Customer, NEW, return_defaults=method == "defaults"
            )
        elif method == "objects":
            session.bulk_save_objects([Customer(**row) for row in NEW])
        else:
            session.bulk_update_mappings(
                Customer, [{"id": key, "name": "n"} for key in KEYS]
            )
        return both.everything(session)

    assert both.compare(work) == "equal"


# -- changed keys ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "converted", "inheritance", "locator"])
def test_a_changed_key(both: Both, kind: str) -> None:
    def work(session: Any) -> Any:
        for n in range(3):
            if kind == "text":
                session.get_one(Tag, ["a", "b", "x y"][n]).tag = f"new{n}"
            elif kind == "converted":
                session.get_one(Gadget, n + 1).code = n + 50
            elif kind == "inheritance":
                session.get_one(Firm, n + 5).id = n + 50
            else:
                session.get_one(Order, ROWS[Order][n]["id"]).parent_id = None
            session.flush()
        return both.everything(session)

    # What refers to a party does not follow it, on one server or on several.
    expected = "error on both" if kind == "inheritance" else "equal"
    assert both.compare(work) == expected
