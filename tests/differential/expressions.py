"""Expressions of one row: criteria, values, what rows are ordered by."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    Integer,
    String,
    and_,
    any_,
    case,
    cast,
    exists,
    func,
    literal,
    not_,
    nulls_first,
    nulls_last,
    or_,
    select,
    true,
)
from sqlalchemy.dialects import postgresql as pg

from tests.differential import models as m
from tests.differential.data import STAMPS
from tests.differential.sources import Column, Joined, Source, Sources

__all__ = ["Expressions"]

UNORDERED = {"jsonb", "tsvector", "json"}
WORDS = ["a", "B", "ä", "paid", "x y", "", "view", "s1", "de", "é"]
Range = pg.Range


class Expressions(Sources):
    """Makes expressions over the columns of joined sources."""

    # -- criteria ----------------------------------------------------------------------

    def where(self, found: Joined, depth: int = 1) -> Any:
        """Return the statement with none to three criteria."""
        statement = found.statement
        if self.c.chance(45):
            statement = statement.where(self.pin(self.c.one(found.sources)))
        for _ in range(self.c.weighted([(5, 0), (4, 1), (1, 2)])):
            statement = statement.where(self.criterion(found, depth))
        return statement

    def criterion(self, found: Joined, depth: int = 1) -> Any:
        c = self.c
        how = c.weighted(
            [(12, "column"), (3, "pin"), (2, "or"), (1, "and"), (1, "not"), (5, "sub")]
        )
        if how == "pin":
            return self.pin(c.one(found.sources))
        if how == "or":
            return or_(self.criterion(found, 0), self.criterion(found, 0))
        if how == "and":
            return and_(self.criterion(found, 0), self.criterion(found, 0))
        if how == "not":
            return not_(self.criterion(found, 0))
        if how == "sub" and depth > 0:
            return self.subcriterion(found, depth - 1)
        return self.on_column(c.one(found.columns()))

    def on_column(self, column: Column) -> Any:
        x, c = column.expr, self.c
        if c.chance(12):
            return x.is_(None) if c.chance(50) else x.is_not(None)
        match column.family:
            case "int" | "wide" | "big":
                return c.pick(
                    x == c.below(6) + self.shift,
                    x > 1 + self.shift,
                    x.in_(self.shifted([1, 2, 5, 3])[:3]),
                    x.not_in([1 + self.shift, None]),
                    x.between(0 - self.shift, 3 + self.shift),
                    x.is_distinct_from(2 + self.shift),
                    x <= 3.5,
                )
            case "text":
                word = c.one(self.shifted(WORDS))
                return c.pick(
                    x == word,
                    x.in_(self.shifted(WORDS)[:4]),
                    x < "b",
                    x.like("%a%"),
                    x.ilike("A%"),
                    x.startswith("a", autoescape=True),
                    x.contains("%", autoescape=True),
                    func.lower(x) == word.lower(),
                    x.regexp_match("^[a-b]"),
                    x.collate("C") > "a",
                )
            case "numeric" | "free" | "float" | "double":
                return c.pick(
                    x == 1, x > decimal.Decimal("0.5"), x < 3, x.between(-1, 30)
                )
            case "cents":
                return x > decimal.Decimal("0.50")
            case "code":
                return c.pick(x == 2, x.in_([1, 3, 7]))
            case "bool":
                return c.pick(x, x.is_(True), ~x, x == False, x.is_not(False))  # noqa: E712
            case "enum":
                S = m.Status
                return c.pick(x == S.PAID, x.in_([S.NEW, S.CLOSED]), x > S.NEW)
            case "stamptz":
                return c.pick(
                    x >= STAMPS[1],
                    x.between(STAMPS[4], STAMPS[2]),
                    sa.extract("year", x) == 2024,
                    func.date_trunc("day", x) == STAMPS[1].replace(hour=4, minute=0),
                    cast(x, sa.Date) == datetime.date(2023, 12, 31),
                    x < func.now(),
                )
            case "date":
                return c.pick(
                    x == datetime.date(2024, 1, 1),
                    x >= datetime.date(2024, 2, 2),
                    sa.extract("month", x) == 2,
                )
            case "stamp":
                return x < datetime.datetime(2000, 1, 1)
            case "time":
                return x == datetime.time(0)
            case "interval":
                return x < datetime.timedelta(hours=25)
            case "bytea":
                return x > b"\x00"
            case "uuid":
                return x.in_(self.locators[:3])
            case "jsonb":
                return c.pick(
                    x["a"].astext == "1",
                    x["b"] == pg.JSONB.NULL,
                    x.contains({"a": 1}),
                    x.has_key("b"),
                    x.has_any(pg.array(["a", "d"])),
                    x[("b", "d")].astext == "true",
                    x["c"][0].astext == "1",
                    func.jsonb_typeof(x) == "array",
                )
            case "texts":
                return c.pick(
                    literal("a") == any_(x),
                    x.contains(["a"]),
                    x.overlap(["b", "ä"]),
                    func.cardinality(x) > 1,
                    x[1] == "a",
                )
            case "ints":
                return c.pick(literal(2) == any_(x), x.contains([3]), x == [3])
            case "range":
                return c.pick(x.contains(3), x.overlaps(Range(2, 4)), func.isempty(x))
            case "inet":
                return x.op("<<=", is_comparison=True)(cast("10.0.0.0/8", pg.INET))
            case "tsvector":
                return c.pick(
                    x.op("@@", is_comparison=True)(
                        func.to_tsquery("simple", "quick & fox")
                    ),
                    x.op("@@", is_comparison=True)(
                        func.websearch_to_tsquery("simple", "fox -brown")
                    ),
                )
        return x.is_not(None)

    def subcriterion(self, found: Joined, depth: int) -> Any:
        """Return a criterion with a subquery, correlated or not."""
        c = self.c
        outer = c.one(found.sources)
        inner = self._inner(outer)
        criteria = []
        if c.chance(40):
            criteria.append(self.simple(inner))
        if depth > 0 and c.chance(20):
            criteria.append(self.criterion(Joined(None, [inner]), 0))
        same = outer.account is not None and inner.account is not None
        correlated = [inner.account == outer.account] if same else []
        how = c.weighted(
            [
                (6, "exists"),
                (4, "not exists"),
                (5, "in keys"),
                (3, "in"),
                (3, "not in"),
                (2, "scalar"),
                (1, "any"),
                (1, "all"),
            ]
        )
        if how in ("exists", "not exists"):
            if same and c.chance(85):
                criteria += correlated
            elif c.chance(50):
                criteria.append(inner.v == outer.v)
            made = exists().where(*(criteria or [true()])).select_from(inner.element)
            return ~made if how == "not exists" else made
        if same and c.chance(25):
            criteria += correlated
        if how == "in keys" and same:
            keys = select(inner.account).where(*criteria)
            return (
                outer.account.not_in(keys) if c.chance(20) else outer.account.in_(keys)
            )
        if how == "scalar":
            value = c.pick(func.max(inner.v), func.count(), func.avg(inner.v))
            picked = select(value).select_from(inner.element).where(*criteria)
            return c.pick(
                outer.v < picked.scalar_subquery(), outer.v == picked.scalar_subquery()
            )
        values = select(inner.v).where(*criteria)
        if c.chance(25):
            values = values.order_by(inner.v, *inner.unique).limit(2)
        if how == "not in":
            return outer.v.not_in(values)
        if how == "any":
            return outer.v > sa.any_(values.scalar_subquery())
        if how == "all":
            return outer.v >= sa.all_(values.scalar_subquery())
        return outer.v.in_(values)

    def _inner(self, outer: Source) -> Source:
        inner = self.source(10)
        if inner.entity is not None and inner.element is inner.entity:
            # Not the enclosing statement's own: SQLAlchemy would correlate the two.
            inner = self.over(sa.orm.aliased(inner.entity), inner.entity)
        return inner

    # -- values ------------------------------------------------------------------------

    def value(self, found: Joined, depth: int = 1) -> Column:
        """Return a column, mostly, or something made of one row's."""
        c = self.c
        if c.chance(70):
            return c.one([*found.columns(), *self.accounts(found)])
        if depth and c.chance(20):
            return self.scalar(found)
        return self.made(c.one(found.columns()))

    @staticmethod
    def accounts(found: Joined) -> list[Column]:
        return [
            Column(s.account, "big") for s in found.sources if s.account is not None
        ]

    def made(self, column: Column) -> Column:
        x, c = column.expr, self.c
        text = Column(cast(x, String), "text")
        match column.family:
            case "int":
                return c.pick(
                    Column(func.coalesce(x, 0), "int"),
                    Column(x + (1 + self.shift), "int"),
                    Column(x * 2.5, "numeric"),
                    Column(x / 2.0, "numeric"),
                    Column(func.nullif(x, 2), "int"),
                    Column(func.abs(x) % 3, "int"),
                    Column(case((x > 3, "high"), (x > 0, "low"), else_="none"), "text"),
                    Column(x.is_(None), "bool"),
                    Column(-x, "int"),
                    Column(func.greatest(x, 2), "int"),
                    text,
                )
            case "text":
                return c.pick(
                    Column(func.lower(x), "text"),
                    Column(func.upper(x), "text"),
                    Column(func.length(x), "int"),
                    Column(func.coalesce(x, "?") + "!", "text"),
                    Column(func.concat(x, "-", x), "text"),
                    Column(func.left(x, 1), "text"),
                    Column(x.like("a%"), "bool"),
                    Column(x.collate("C"), "text"),
                )
            case "numeric":
                return c.pick(
                    Column(func.round(x, 1), "numeric"),
                    Column(x * 2, "numeric"),
                    Column(func.floor(x).is_(None), "bool"),
                    Column(x / 3, "numeric"),
                    text,
                )
            case "stamptz":
                return c.pick(
                    Column(func.date_trunc("day", x), "stamptz"),
                    Column(func.date_trunc("month", x), "stamptz"),
                    Column(cast(x, sa.Date), "date"),
                    Column(func.to_char(x, "YYYY-MM-DD HH24 TZ"), "text"),
                    Column(sa.extract("hour", x), "numeric"),
                    Column(x + datetime.timedelta(days=1), "stamptz"),
                    Column(func.timezone("Asia/Tokyo", x), "stamp"),
                    text,
                )
            case "date":
                return c.pick(
                    Column(x - datetime.date(2024, 1, 1), "int"),
                    Column(sa.extract("year", x), "numeric"),
                    text,
                )
            case "jsonb":
                return c.pick(
                    Column(x["a"], "jsonb"),
                    Column(x["a"].astext, "text"),
                    Column(func.jsonb_typeof(x), "text"),
                    Column(x["b"].astext, "text"),
                )
            case "texts":
                return c.pick(
                    Column(func.array_length(x, 1), "int"),
                    Column(x[1], "text"),
                    Column(func.array_to_string(x, ","), "text"),
                )
            case "range":
                return Column(func.lower(x, type_=Integer), "int")
            case "bool":
                return c.pick(Column(~x, "bool"), Column(cast(x, Integer), "int"))
            case "enum" | "uuid":
                return text
        return column

    def scalar(self, found: Joined) -> Column:
        """Return a scalar subquery in the columns."""
        c = self.c
        outer = c.one(found.sources)
        inner = self._inner(outer)
        value = c.pick(func.count(), func.max(inner.v), func.sum(inner.v))
        statement = select(value).select_from(inner.element)
        if outer.account is not None and inner.account is not None and c.chance(85):
            statement = statement.where(inner.account == outer.account)
        return Column(statement.scalar_subquery(), "int")

    # -- order -------------------------------------------------------------------------

    def term(self, x: Any, family: str = "int") -> Any:
        """Return an ORDER BY term over *x*."""
        c = self.c
        if family == "text" and c.chance(15):
            x = x.collate("C")
        x = c.pick(x, x, x.desc(), x.asc())
        return c.weighted([(5, x), (1, nulls_first(x)), (1, nulls_last(x))])

    def order(self, found: Joined) -> list[Any]:
        """Return ORDER BY terms that are total: the rows' keys come last."""
        c = self.c
        terms = []
        for _ in range(c.weighted([(3, 0), (4, 1), (1, 2)])):
            column = self.value(found, 0)
            if column.family not in UNORDERED and not column.loose:
                terms.append(self.term(column.expr, column.family))
        last = found.unique
        if c.chance(20):
            last = [u.desc() for u in last]
        return [*terms, *last]
