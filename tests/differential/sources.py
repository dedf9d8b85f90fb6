"""FROM elements: entities, their aliases, subqueries and CTEs, and joins of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    bindparam,
    cast,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import aliased

from tests.differential import models as m
from tests.differential.choices import Choices
from tests.differential.data import LABELS, Rows

__all__ = ["Column", "Joined", "Source", "Sources"]

# In each: the columns by what may be done with them. "wide" are numbers at the ends of
# their type, which no arithmetic may touch; "free" numerics of different scale.
_COLUMNS: dict[type[m.Base], dict[str, str]] = {
    m.Account: {
        "v": "int",
        "name": "text",
        "email": "text",
        "active": "bool",
        "balance": "numeric",
        "score": "float",
        "status": "enum",
        "joined": "stamptz",
        "region_code": "text",
        "titled": "text",
        "double": "int",
    },
    m.Purchase: {
        "v": "int",
        "status": "text",
        "placed": "date",
        "total": "numeric",
        "tags": "texts",
        "doc": "jsonb",
        "id": "uuid",
        "parent_id": "uuid",
    },
    m.Item: {"v": "int", "no": "int", "sku": "text", "price": "cents"},
    m.Specimen: {
        "v": "int",
        "i_small": "wide",
        "i_int": "wide",
        "i_big": "wide",
        "n_fixed": "numeric",
        "n_free": "free",
        "f_real": "float",
        "f_double": "double",
        "flag": "bool",
        "t_text": "text",
        "t_varchar": "text",
        "t_char": "text",
        "t_c": "text",
        "d_date": "date",
        "d_time": "time",
        "d_timetz": "timetz",
        "d_stamp": "stamp",
        "d_stamptz": "stamptz",
        "d_span": "interval",
        "u": "uuid",
        "raw": "bytea",
        "doc": "jsonb",
        "numbers": "ints",
        "span": "range",
        "address": "inet",
        "body": "text",
        "words": "tsvector",
        "code": "code",
    },
    m.Event: {"v": "int", "kind": "text", "at": "stamptz", "id": "uuid"},
    m.Label: {"v": "int", "label": "text"},
    m.Device: {"v": "int", "code": "code"},
    m.Party: {"v": "int", "type": "text"},
    m.Firm: {"v": "int", "vat": "text"},
    m.Region: {"v": "int", "code": "text", "name": "text", "parent_code": "text"},
    m.Memo: {"v": "int", "body": "text"},
}
# The column by which rows of different tables belong together: an account's id.
_ACCOUNT = {
    m.Account: "id",
    m.Purchase: "account_id",
    m.Item: "account_id",
    m.Specimen: "id",
    m.Event: "account_id",
    m.Label: "account_id",
    m.Device: "account_id",
    m.Party: "id",
    m.Firm: "id",
    m.Memo: "account_id",
}
_UNIQUE = {
    m.Purchase: ["id"],
    m.Item: ["purchase_id", "no"],
    m.Label: ["label"],
    m.Device: ["code"],
    m.Region: ["code"],
}
_ENTITIES = [
    (10, m.Account),
    (10, m.Purchase),
    (6, m.Item),
    (4, m.Specimen),
    (4, m.Event),
    (2, m.Region),
    (2, m.Label),
    (1, m.Device),
    (1, m.Party),
    (1, m.Firm),
    (1, m.Memo),
]
_FRIENDS = {  # what an application joins with what
    m.Account: [m.Purchase, m.Region, m.Specimen, m.Item, m.Event, m.Label, m.Memo],
    m.Purchase: [m.Account, m.Item, m.Purchase, m.Event],
    m.Item: [m.Purchase, m.Account],
    m.Specimen: [m.Account, m.Purchase],
    m.Event: [m.Account, m.Purchase, m.Event, m.Label],
    m.Label: [m.Account, m.Event],
    m.Device: [m.Account, m.Label],
    m.Party: [m.Account, m.Party],
    m.Firm: [m.Account],
    m.Region: [m.Account, m.Region],
    m.Memo: [m.Account, m.Memo, m.Region],
}
KEYS = [*range(1, 14), -3, 2**40, 50, 55]


@dataclass(frozen=True)
class Column:
    expr: Any
    family: str

    @property
    def loose(self) -> bool:
        """Whether equal values of it may look different."""
        return self.family == "free"


@dataclass(frozen=True)
class Source:
    """Something with columns; ``unique`` together tell its rows apart."""

    element: Any
    columns: Sequence[Column]
    unique: Sequence[Any]
    account: Any = None
    key: Any = None  # the shard key, where that is not the account
    entity: type[m.Base] | None = None

    def of(self, *families: str) -> list[Column]:
        return [c for c in self.columns if c.family in families]

    @property
    def v(self) -> Any:
        return self.of("int")[0].expr


@dataclass
class Joined:
    """A SELECT without columns, and what it selects from."""

    statement: Any
    sources: list[Source]

    @property
    def unique(self) -> list[Any]:
        return [u for source in self.sources for u in source.unique]

    def columns(self, *families: str) -> list[Column]:
        found = [c for s in self.sources for c in s.columns]
        return [c for c in found if c.family in families] if families else found


class Sources:
    """Makes FROM elements and what pins them.

    With *shift*, the same choices make a statement of the same shape and other values.
    """

    def __init__(self, choices: Choices, rows: Rows, shift: int = 0) -> None:
        self.c = choices
        self.shift = shift
        locators = [r["id"] for r in rows.get(m.Purchase.__table__, ())][:12]
        locators.append(uuid.UUID(int=7 << 76 | 2 << 62))
        self.locators = self.shifted(locators)
        self.keys = self.shifted(KEYS)

    def shifted(self, values: Sequence[Any]) -> list[Any]:
        return [*values[self.shift :], *values[: self.shift]]

    # -- elements ----------------------------------------------------------------------

    def entity(self, cls: type[m.Base] | None = None, plain: bool = False) -> Source:
        cls = cls or self.c.weighted(_ENTITIES)
        element: Any = cls
        if not plain and self.c.chance(30):
            element = aliased(cls)
        return self.over(element, cls)

    def over(self, element: Any, cls: type[m.Base]) -> Source:
        return Source(
            element,
            [Column(getattr(element, n), f) for n, f in _COLUMNS[cls].items()],
            [getattr(element, n) for n in _UNIQUE.get(cls, ["id"])],
            getattr(element, _ACCOUNT[cls]) if cls in _ACCOUNT else None,
            {
                m.Event: lambda: element.id,
                m.Label: lambda: element.label,
                m.Device: lambda: element.code,
                m.Region: lambda: element.code,
                m.Memo: lambda: element.id,
            }.get(cls, lambda: None)(),
            cls,
        )

    def subquery(self, inner: Source | None = None) -> Source:
        """Return a source that is a SELECT of another."""
        inner = inner or self.entity()
        k = inner.account if inner.account is not None else literal(1, BigInteger)
        unique = [u.label(f"u{i}") for i, u in enumerate(inner.unique)]
        statement = select(k.label("k"), inner.v.label("v"), *unique)
        if self.c.chance(40):
            statement = statement.where(self.simple(inner))
        made = self.c.weighted(
            [
                (4, lambda: statement),
                (3, lambda: self._top(statement, inner)),
                (2, lambda: self._grouped(inner, k)),
                (1, lambda: select(k.label("k"), inner.v.label("v")).distinct()),
                (1, lambda: self._ranked(statement, inner)),
                (1, lambda: self._united(inner, k)),
            ]
        )()
        element = made.cte() if self.c.chance(25) else made.subquery()
        names = [c for c in element.c if c.key.startswith("u")]
        columns = [Column(element.c.k, "big"), Column(element.c.v, "int")]
        whole = names or [element.c.k, element.c.v]
        return Source(element, columns, whole, element.c.k)

    def _top(self, statement: Any, inner: Source) -> Any:
        order = [*self.c.some([inner.v.desc(), inner.v], 0, 1), *inner.unique]
        statement = statement.order_by(*order).limit(
            self.c.pick(3, 1, 10, 0) + self.shift
        )
        return statement.offset(2 + self.shift) if self.c.chance(25) else statement

    def _grouped(self, inner: Source, k: Any) -> Any:
        value = self.c.pick(func.count(), func.sum(inner.v), func.max(inner.v))
        return select(k.label("k"), cast(value, sa.Integer).label("v")).group_by(k)

    def _ranked(self, statement: Any, inner: Source) -> Any:
        rank = func.row_number().over(
            partition_by=self.c.pick(inner.account, inner.v),
            order_by=[inner.v.desc(), *inner.unique],
        )
        return statement.add_columns(rank.label("rank"))

    def _united(self, inner: Source, k: Any) -> Any:
        other = self.entity()
        k2 = other.account if other.account is not None else literal(1, BigInteger)
        return union_all(
            select(k.label("k"), inner.v.label("v")),
            select(k2.label("k"), other.v.label("v")),
        )

    def source(self, nested: int = 15) -> Source:
        return self.subquery() if self.c.chance(nested) else self.entity()

    # -- joins -------------------------------------------------------------------------

    def joined(self, most: int = 3, nested: int = 15) -> Joined:
        """Return one to *most* sources, joined as applications do, mostly."""
        first = self.source(nested)
        found = Joined(select().select_from(first.element), [first])
        weights = [(5, 1), (4, 2), (1, 3)][:most]
        for _ in range(self.c.weighted(weights) - 1):
            self._join(found)
        return found

    def _join(self, found: Joined) -> None:
        c = self.c
        other = c.one(found.sources)
        friends = _FRIENDS.get(other.entity) if other.entity else None
        if friends and c.chance(80):
            new = self.entity(c.one(friends))
        else:
            new = self.source(20)
        if new.entity is other.entity and new.element is other.element:
            new = self.over(aliased(new.entity), new.entity)
        elif any(new.element is s.element for s in found.sources):
            assert new.entity is not None
            new = self.over(aliased(new.entity), new.entity)
        on = self._on(other, new)
        if c.chance(15):
            on = and_(on, self.simple(c.pick(new, other)))
        how = c.weighted(
            [(10, "inner"), (8, "left"), (2, "full"), (1, "cross"), (1, "where")]
        )
        if how == "cross":
            found.statement = found.statement.join(new.element, true())
        elif how == "where":
            found.statement = found.statement.select_from(new.element).where(on)
        else:
            found.statement = found.statement.join(
                new.element, on, isouter=how == "left", full=how == "full"
            )
        found.sources.append(new)

    def _on(self, left: Source, right: Source) -> Any:
        """Return an equality; FULL JOIN takes nothing else for its first criterion."""
        pair = {left.entity, right.entity}
        if pair == {m.Account, m.Region}:
            a, r = (left, right) if left.entity is m.Account else (right, left)
            return a.element.region_code == r.element.code
        if pair == {m.Purchase, m.Item} and self.c.chance(70):
            p, i = (left, right) if left.entity is m.Purchase else (right, left)
            on = p.element.id == i.element.purchase_id
            both = and_(on, p.account == i.account)
            return both if self.c.chance(50) else on
        if pair == {m.Purchase} and self.c.chance(60):
            return left.element.id == right.element.parent_id
        if pair == {m.Region}:
            return left.element.code == right.element.parent_code
        if left.account is not None and right.account is not None:
            if self.c.chance(90):
                return left.account == right.account
            return and_(left.account == right.account, left.v == right.v)
        return left.v == right.v

    # -- what pins ---------------------------------------------------------------------

    def pin(self, source: Source) -> Any:
        """Return a criterion on a shard key, a locator, or an account's id."""
        c = self.c
        if source.entity is m.Purchase and c.chance(25):
            column = c.pick(source.element.id, source.element.parent_id)
            one = c.one(self.locators)
            return c.pick(column == one, column.in_(self.locators[:2]))
        if source.key is not None and (source.account is None or c.chance(50)):
            return self._other_pin(source)
        return self._account_pin(source.account)

    def _other_pin(self, source: Source) -> Any:
        c = self.c
        values: list[Any] = {
            m.Event: [uuid.UUID(int=1), uuid.UUID(int=2)],
            m.Label: LABELS,
            m.Device: [1, 2, 3, 99],
            m.Region: ["de", "fr", "zz"],
        }.get(source.entity, [1, 2, 3])  # type: ignore[call-overload]
        values = self.shifted(values)
        if c.chance(50):
            return source.key == c.one(values)
        return source.key.in_(c.some(values, 0, 3))

    def _account_pin(self, key: Any) -> Any:
        c = self.c
        one = c.one(self.keys)
        some = c.some(self.keys, 1, 4)
        return c.weighted(
            [
                (12, lambda: key == one),
                (8, lambda: key.in_(some)),
                (1, lambda: key.in_([])),
                (1, lambda: key.not_in(some)),
                (1, lambda: literal(one, BigInteger) == key),
                (1, lambda: key == bindparam(None, one)),
                (1, lambda: key.in_(bindparam(None, some, key.type, expanding=True))),
                (1, lambda: key.in_(sa.literal_column(str(n)) for n in some)),
                (2, lambda: or_(key == one, key == some[0])),
                (1, lambda: or_(key == one, key.is_(None))),
                (1, lambda: and_(key == one, key == some[0])),
                (1, lambda: ~(key != one)),
                (1, lambda: ~key.in_(some)),
                (1, lambda: key == cast(str(one), BigInteger)),
                (1, lambda: cast(key, BigInteger) == one),
                (1, lambda: cast(key, Text) == str(one)),
                (1, lambda: key == cast(literal(one + 0.5), sa.Numeric)),
                (1, lambda: key == c.pick(5.0, 2.5, Decimal(4), Decimal("4.5"))),
                (1, lambda: key == literal(5.0, sa.Double)),
                (1, lambda: key == func.any(literal(some, pg.ARRAY(BigInteger)))),
                (1, lambda: tuple_(key, literal(1)).in_([(one, 1), (some[0], 2)])),
                (1, lambda: key.between(2, 5)),
                (1, lambda: key.is_(None)),
                (1, lambda: key.is_not_distinct_from(one)),
                (1, lambda: key == one + literal(0)),
            ]
        )()

    def simple(self, source: Source) -> Any:
        """Return a short criterion on one source."""
        if source.account is not None and self.c.chance(30):
            return self._account_pin(source.account)
        return self.c.pick(
            source.v == 1 + self.shift,
            source.v > 2 - self.shift,
            source.v.in_(self.shifted([1, 2, 3, 4])[:3]),
            source.v.is_(None),
        )
