"""INSERT … SELECT between tables that are sharded, copied, and at home."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    Integer,
    String,
    cast,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    union_all,
)
from sqlalchemy.dialects import postgresql as pg

from tests.integration.test_planner_differential import (
    Both,
    Country,
    Customer,
    Gadget,
    Line,
    Note,
    Order,
    Party,
    Setting,
    Tag,
    both,
)

__all__ = ["both"]

PARTY = ["id", "type", "v"]


def customers(*columns: Any) -> Any:
    return select(Customer.id + 0, literal("party"), Customer.v, *columns)


SAME_SHARD: dict[str, Any] = {
    "all": lambda: select(Customer.id, Customer.name, Customer.v),
    "some": lambda: select(Customer.id, Customer.name, Customer.v).where(
        Customer.id.in_([11, 12, 13, 2**40, -3])
    ),
    "one": lambda: select(Customer.id, Customer.name, Customer.v).where(
        Customer.id == -3
    ),
    "joined": lambda: (
        select(Customer.id, Country.name, Customer.v)
        .join(Country, Country.code == Customer.country_code)
        .where(Customer.id < 0)
    ),
    "exists": lambda: select(Customer.id, Customer.name, Customer.v).where(
        ~select(Order.id).where(Order.customer_id == Customer.id).exists()
    ),
    "none": lambda: select(Customer.id, Customer.name, Customer.v).where(
        Customer.id == 77
    ),
}


@pytest.mark.parametrize("made", SAME_SHARD)
def test_rows_that_stay_on_their_shards(both: Both, made: str) -> None:
    statement = pg.insert(Party.__table__).from_select(PARTY, SAME_SHARD[made]())
    assert both.check_write(statement.on_conflict_do_nothing()) == "equal"
    returning = statement.on_conflict_do_nothing().returning(Party.id, Party.v)
    assert both.check_write(returning) == "equal"


MOVING: dict[str, Any] = {
    "another key": lambda: insert(Customer).from_select(
        ["id", "name", "v"], select(Party.id + 100, Party.type, Party.v)
    ),
    "from home": lambda: insert(Customer).from_select(
        ["id", "name"], select(Note.id + 100, Note.body)
    ),
    "from copies": lambda: insert(Tag).from_select(
        ["tag", "v"], select(Country.code, Country.v)
    ),
    "to home": lambda: insert(Note).from_select(
        ["id", "customer_id", "body"],
        select(Customer.id + 100, Customer.id, Customer.name).where(
            Customer.id.in_(range(1, 9))
        ),
    ),
    "to copies": lambda: insert(Country).from_select(
        ["code", "name", "v"], select(Tag.tag, Tag.tag, Tag.v)
    ),
    "copies to copies": lambda: insert(Country).from_select(
        ["code", "name"], select(Country.code + "x", Country.name)
    ),
    "into itself": lambda: insert(Tag).from_select(
        ["tag", "v"], select(Tag.tag + "!", Tag.v + 1)
    ),
    "upsert": lambda: (
        pg.insert(Tag)
        .from_select(["tag", "v"], select(Tag.tag, Tag.v + 1))
        .on_conflict_do_update(index_elements=["tag"], set_={"v": 7})
    ),
    "objects": lambda: insert(Tag.__table__).from_select(
        ["tag", "customer_id", "v"],
        select(Tag.tag + "!", Tag.customer_id, Tag.v).where(Tag.v > 100),
    ),
    "converted": lambda: insert(Gadget).from_select(
        ["code", "v"], select(Gadget.code, Gadget.v).where(Gadget.v > 100)
    ),
}


@pytest.mark.parametrize("made", MOVING)
def test_rows_that_go_to_other_shards(both: Both, made: str) -> None:
    assert both.check_write(MOVING[made]()) == "equal"


def test_rows_are_given_the_keys_and_locators_they_lack(both: Both) -> None:
    with both.sharded() as session:
        copied = select(Order.customer_id, Order.v, Order.status, Order.placed)
        before = len(session.scalars(select(Order.id)).all())
        names = ["customer_id", "v", "status", "placed"]
        result = session.execute(insert(Order).from_select(names, copied))
        assert result.rowcount == before
        ids = session.scalars(select(Order.id)).all()
        assert len(set(ids)) == 2 * before
        session.execute(
            insert(Setting).from_select(
                ["id"], select(Tag.v + 100).where(Tag.v == 3).where(Tag.tag == "a")
            )
        )
        both.everything(session)


def test_explain_says_where_rows_are_read(both: Both) -> None:
    with both.sharded() as session:
        one = insert(Party.__table__).from_select(PARTY, SAME_SHARD["one"]())
        assert len(session.explain(one).shards) == 1
        assert len(session.explain(MOVING["into itself"]()).shards) == 4


REFUSED: dict[str, Any] = {
    "for update": lambda: insert(Tag).from_select(
        ["tag", "v"], select(Tag.tag + "!", Tag.v).with_for_update()
    ),
    "another type": lambda: insert(Tag).from_select(
        ["tag", "v"], select(Tag.tag + "!", cast(Tag.v, String)).where(Tag.v > 99)
    ),
    "no type": lambda: insert(Customer).from_select(
        ["id", "name"], select(Note.id + 100, literal_column("'x'"))
    ),
}


@pytest.mark.parametrize("made", REFUSED)
def test_what_would_not_come_out_alike_is_refused(both: Both, made: str) -> None:
    assert both.check_write(REFUSED[made]()) in ("refused", "error on both")


def test_a_select_of_too_many_rows_is_refused(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(both.cluster, "gather_max_rows", 3, raising=False)
    assert both.check_write(MOVING["into itself"]()) == "refused"
    monkeypatch.undo()
    assert both.check_write(MOVING["into itself"]()) == "equal"


def test_at_home_nothing_changes(both: Both) -> None:
    own = insert(Note).from_select(
        ["id", "body"],
        union_all(
            select(Note.id + 50, Note.body),
            select(cast(text("90"), Integer), literal("x")),
        ),
    )
    assert both.check_write(own) == "equal"
    copies = insert(Note).from_select(
        ["id", "body"],
        select(func.row_number().over(order_by=Country.code) + 90, Country.name),
    )
    assert both.check_write(copies) == "equal"


def test_lines_stay_beside_their_orders(both: Both) -> None:
    names = ["order_id", "no", "customer_id", "v"]
    more = select(Order.id, literal(9), Order.customer_id, Order.v)
    assert both.check_write(insert(Line).from_select(names, more)) == "equal"
