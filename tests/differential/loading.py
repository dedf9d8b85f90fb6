"""What applications ask of the ORM: entities, loader options, polymorphism, pages."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import exists, func, select, true
from sqlalchemy.orm import (
    Bundle,
    aliased,
    contains_eager,
    defer,
    joinedload,
    load_only,
    raiseload,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    undefer,
    with_loader_criteria,
    with_polymorphic,
)

from tests.differential import models as m
from tests.differential.selects import Selects
from tests.differential.sources import Column, Joined, Source
from tests.differential.twins import Case, comparable, stored

__all__ = ["Loading"]


class Loading(Selects):
    """Makes a `Case` of each shape that an ORM adds."""

    def entities(self) -> Case:
        """A list of objects, filtered, sorted, cut: the commonest of all."""
        c = self.c
        cls = c.weighted(
            [
                (8, m.Account),
                (8, m.Purchase),
                (4, m.Item),
                (3, m.Specimen),
                (3, m.Event),
                (1, m.Label),
                (1, m.Device),
                (1, m.Region),
                (1, m.Memo),
                (1, m.CountedAccount),
            ]
        )
        if cls is m.CountedAccount:
            columns = [Column(cls.v, "int"), Column(cls.name, "text")]
            source = Source(cls, columns, [cls.id], cls.id)
        else:
            source = self.entity(cls)
        found = Joined(select(source.element), [source])
        statement = self.where(found)
        if cls is m.CountedAccount and c.chance(50):
            statement = statement.where(cls.counted > 1)
        statement = statement.options(*self.options(source.element, cls))
        return self.cut(statement, found, "entities")

    def cut(self, statement: Any, found: Joined, shape: str) -> Case:
        if self.c.chance(65):
            statement = self.window_of(statement.order_by(*self.order(found)))
            return Case(statement, f"{shape} ordered", "total", unique=True)
        return Case(statement, shape, unique=True)

    def options(self, entity: Any, cls: type[Any]) -> list[Any]:
        c = self.c
        eager = c.pick(selectinload, joinedload, subqueryload)
        single = c.pick(joinedload, selectinload)
        if c.chance(45):
            return []
        if cls is m.Account:
            return c.pick(
                [eager(entity.purchases)],
                [single(entity.region)],
                [single(entity.region), eager(entity.purchases)],
                [eager(entity.purchases).selectinload(m.Purchase.items)],
                [eager(entity.purchases).joinedload(m.Purchase.items)],
                [selectinload(entity.purchases).joinedload(m.Purchase.parent)],
                [eager(entity.items)],
                [single(entity.specimen)],
                [selectinload(entity.events)],
                [eager(entity.events)],
                [single(entity.region).joinedload(m.Region.parent)],
                [raiseload("*")],
                [load_only(entity.name, entity.v)],
                [defer(entity.titled), undefer(entity.balance)],
            )
        if cls is m.Purchase:
            return c.pick(
                [single(entity.account)],
                [eager(entity.items)],
                [single(entity.account).joinedload(m.Account.region)],
                [single(entity.parent)],
                [single(entity.account), eager(entity.items)],
                [joinedload(entity.account, innerjoin=True)],
            )
        if cls is m.Item:
            return [single(entity.purchase).joinedload(m.Purchase.account)]
        if cls is m.Event:
            return [single(entity.account)]
        if cls is m.Region:
            return c.pick([eager(entity.accounts)], [single(entity.parent)])
        return []

    def relationships(self) -> Case:
        """any(), has(), exists() and contains_eager()."""
        c = self.c
        Account, Purchase, Item, Region = m.Account, m.Purchase, m.Item, m.Region
        n = c.below(4) + self.shift
        cls, criterion = c.pick(
            (Account, Account.purchases.any()),
            (Account, ~Account.purchases.any()),
            (Account, Account.purchases.any(Purchase.v > n)),
            (Account, ~Account.purchases.any(Purchase.status == "paid")),
            (Account, Account.region.has(Region.v > 1)),
            (Account, ~Account.region.has()),
            (Account, Account.region.has(name="D")),
            (Account, Account.events.any(m.Event.v > n)),
            (Account, ~Account.events.any()),
            (Account, Account.purchases.any(Purchase.items.any(Item.v > n))),
            (Account, exists().where(Purchase.account_id == Account.id)),
            (Account, exists().where(m.Label.account_id == Account.id)),
            (Purchase, Purchase.account.has(Account.v > n)),
            (Purchase, Purchase.items.any()),
            (Purchase, ~Purchase.items.any(Item.v > n)),
            (Purchase, Purchase.parent.has(Purchase.v > n)),
            (Purchase, Purchase.account.has(Account.region.has(Region.code == "de"))),
            (m.Event, m.Event.account.has(Account.active)),
            (Region, Region.accounts.any(Account.v > n)),
            (Region, ~Region.accounts.any()),
        )
        source = self.over(cls, cls)
        found = Joined(select(cls).where(criterion), [source])
        return self.cut(self.where(found, 0), found, "any and has")

    def eager(self) -> Case:
        """contains_eager over a join that the application wrote."""
        c = self.c
        Account, Purchase = m.Account, m.Purchase
        statement = (
            select(Account)
            .join(Account.purchases, isouter=c.chance(50))
            .options(contains_eager(Account.purchases))
        )
        if c.chance(50):
            statement = statement.where(Purchase.v > 1)
        if c.chance(50):
            statement = statement.where(self.pin(self.over(Account, Account)))
        # The order of the rows is the order of the loaded collection.
        statement = statement.order_by(Account.id, Purchase.id)
        return Case(statement, "contains_eager", "total", unique=True)

    def mixtures(self) -> Case:
        """Entities beside columns, bundles, composites and hybrids."""
        c = self.c
        Account, Purchase, Specimen = m.Account, m.Purchase, m.Specimen
        how = c.pick(
            "pair", "bundle", "composite", "hybrid", "property", "alias", "summed"
        )
        order: list[Any] = [Account.id]
        if how == "pair":
            statement = select(Account, Purchase).join(Account.purchases)
            order.append(Purchase.id)
        elif how == "bundle":
            statement = select(Bundle("b", Account.id, Account.name), Account.v)
        elif how == "composite":
            statement = select(Specimen.point, Specimen.id)
            if c.chance(50):
                statement = statement.where(Specimen.point == m.Point(0, 1))
            order = [Specimen.id]
        elif how == "hybrid":
            statement = select(Account.id, Account.double).where(Account.double > 2)
            order = [Account.double.desc(), Account.id]
        elif how == "property":
            statement = select(Account.id, Account.titled)
            order = [Account.titled, Account.id]
        elif how == "alias":
            one, two = aliased(Account), aliased(Account)
            on = c.pick(
                one.id == two.id, one.v == two.v, one.region_code == two.region_code
            )
            statement = select(one, two.name).join(two, on)
            order = [one.id, two.id]
        else:
            sums = (
                select(Purchase.account_id, func.sum(Purchase.total).label("spent"))
                .group_by(Purchase.account_id)
                .subquery()
            )
            statement = select(Account, sums.c.spent).outerjoin(
                sums, sums.c.account_id == Account.id
            )
            order = [sums.c.spent.desc().nulls_last(), Account.id]
        if c.chance(60):
            statement = self.window_of(statement.order_by(*order))
            return Case(statement, "mixed columns", "total")
        return Case(statement, "mixed columns")

    def polymorphic(self) -> Case:
        c = self.c
        how = c.pick("base", "firm", "person", "selectin", "all", "of type")
        Party, Firm, Person = m.Party, m.Firm, m.Person
        entity: Any = Party
        options = []
        if how in ("firm", "person"):
            entity = Firm if how == "firm" else Person
        elif how == "selectin":
            options = [selectin_polymorphic(Party, [Firm, Person])]
        elif how == "all":
            entity = with_polymorphic(Party, "*")
        elif how == "of type":
            entity = with_polymorphic(Party, [Firm])
        source = Source(
            entity, self.over(Party, Party).columns[:0], [entity.id], entity.id
        )
        statement = select(entity).options(*options)
        if how == "all" and c.chance(40):
            statement = statement.where(entity.Firm.vat == "V1")
        if c.chance(40):
            statement = statement.where(self._account_pin(entity.id))
        if c.chance(40):
            statement = statement.where(entity.v > 1)
        if c.chance(50):
            statement = self.window_of(
                statement.order_by(self.term(entity.v), *source.unique)
            )
            return Case(statement, "polymorphic", "total", unique=True)
        return Case(statement, "polymorphic", unique=True)

    def criteria(self) -> Case:
        """with_loader_criteria, as for soft deletion and tenants."""
        c = self.c
        Account, Purchase = m.Account, m.Purchase
        option = c.pick(
            with_loader_criteria(Purchase, Purchase.v > 1),
            with_loader_criteria(Account, Account.active.is_(True)),
            with_loader_criteria(Account, Account.id.in_([1, 2, 3])),
            with_loader_criteria(
                Purchase,
                Purchase.account_id.in_(select(Account.id).where(Account.v > 2)),
            ),
        )
        statement = c.pick(
            select(Account).options(selectinload(Account.purchases)),
            select(Account).options(joinedload(Account.purchases)),
            select(Account).where(Account.purchases.any()),
            select(Purchase).options(joinedload(Purchase.account)),
        ).options(option)
        if c.chance(50):
            entity = statement.column_descriptions[0]["entity"]
            statement = statement.order_by(entity.id)
            return Case(
                self.window_of(statement), "loader criteria", "total", unique=True
            )
        return Case(statement, "loader criteria", unique=True)

    def pages(self) -> Case:
        """A page and the count of all rows, as lists in the web are made."""
        c = self.c
        source = self.entity(c.pick(m.Account, m.Purchase, m.Event))
        found = Joined(select(source.element), [source])
        all_rows = self.where(found)
        counting = select(func.count()).select_from(all_rows.subquery())
        page = (
            all_rows.order_by(*self.order(found))
            .limit(3)
            .offset(c.pick(0, 3, 6) + self.shift)
        )
        page = page.options(*self.options(source.element, source.entity or m.Account))

        def work(session: Any) -> Any:
            rows = session.execute(page).unique().all()
            return (
                comparable(session.scalar(counting)),
                [[comparable(v) for v in row] for row in rows],
            )

        return Case(page, "pages", work=work, others=[counting])

    def parts(self) -> Case:
        """yield_per: rows read in parts."""
        c = self.c
        source = self.entity()
        found = Joined(select(source.element), [source])
        statement = self.where(found, 0)
        order = c.chance(50)
        if order:
            statement = statement.order_by(*self.order(found))
        options = {"yield_per": c.pick(2, 3, 100)}

        def work(session: Any) -> Any:
            result = session.execute(statement, execution_options=options)
            rows = [comparable(v) for part in result.partitions() for (v,) in part]
            return rows if order else sorted(rows, key=repr)

        return Case(statement, "yield_per", options=options, work=work)

    def locking(self) -> Case:
        """FOR UPDATE in its forms; nobody else is there to wait for."""
        c = self.c
        source = self.entity(c.pick(m.Account, m.Purchase, m.Event), plain=True)
        found = Joined(select(source.element), [source])
        statement = self.where(found, 0).with_for_update(
            **c.pick(
                {},
                {"skip_locked": True},
                {"nowait": True},
                {"read": True},
                {"key_share": True},
                {"of": source.element},
            )
        )
        if c.chance(60):
            statement = statement.order_by(*found.unique)
            if c.chance(70):
                statement = statement.limit(2)
            return Case(statement, "FOR UPDATE", "total", unique=True)
        return Case(statement, "FOR UPDATE", unique=True)

    def scalars(self) -> Case:
        """exists() and counts that are asked alone."""
        c = self.c
        source = self.entity()
        found = Joined(select().select_from(source.element), [source])
        inner = self.where(found)
        statement = c.pick(
            select(inner.add_columns(sa.literal(1)).exists()),
            select(~inner.add_columns(sa.literal(1)).exists()),
            inner.add_columns(func.count()),
            inner.add_columns(func.count(source.unique[0])),
            inner.add_columns(sa.literal(1).label("one")).limit(1),
            inner.add_columns(true().label("t")).distinct(),
        )
        return Case(statement, "exists and count")

    def writes(self) -> Case:
        """UPDATE and DELETE, with all rows of the table compared afterwards."""
        c = self.c
        cls = c.pick(m.Account, m.Item, m.Label, m.Event, m.Specimen, m.Device)
        source = self.over(cls, cls)
        found = Joined(None, [source])
        criteria = [self.criterion(found)]
        if c.chance(65):
            criteria.append(self.pin(source))
        table = cls.__table__
        if cls is not m.Account and c.chance(40):
            statement: Any = sa.delete(cls).where(*criteria)
        else:
            value = c.pick(7, source.v + 1, func.coalesce(source.v, 0) * 2, sa.null())
            statement = sa.update(cls).where(*criteria).values(v=value)
        returning = c.chance(30)
        if returning:
            statement = statement.returning(source.unique[0], source.v)
        options = {"synchronize_session": c.pick(False, False, "fetch")}

        def work(session: Any) -> Any:
            result = session.execute(statement, execution_options=options)
            returned = sorted(map(repr, result)) if returning else None
            return returned, stored(session, table)

        return Case(statement, "writes", options=options, work=work)
