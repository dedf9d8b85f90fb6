"""SELECTs over columns: rows, groups, windows, sets, CTEs, laterals, functions."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Integer,
    String,
    column,
    distinct,
    func,
    literal,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql import aggregate_order_by

from tests.differential import models as m
from tests.differential.expressions import UNORDERED, Expressions
from tests.differential.sources import Column, Joined
from tests.differential.twins import Case

__all__ = ["Selects", "distinct_on"]

_UNGROUPED = UNORDERED
# What min() and max() take on every version of PostgreSQL.
_EXTREMES = {
    *("int", "wide", "big", "text", "numeric", "free", "float", "double", "cents"),
    *("date", "time", "stamp", "stamptz", "interval", "enum", "texts", "ints", "code"),
}
_SUMMED = {"int", "wide", "big", "numeric", "free", "float", "cents"}


class Selects(Expressions):
    """Makes a `Case` of each shape."""

    def window_of(self, statement: Any) -> Any:
        """Return the statement with LIMIT, OFFSET or FETCH, or none of them."""
        c = self.c
        if c.chance(50):
            n = c.pick(3, 1, 5, 10, 0, 1000) + self.shift
            statement = statement.fetch(n) if c.chance(10) else statement.limit(n)
        if c.chance(25):
            statement = statement.offset(c.pick(1, 2, 20) + self.shift)
        return statement

    def labelled(self, columns: list[Column]) -> tuple[list[Any], frozenset[int]]:
        labels = [x.expr.label(f"c{i}") for i, x in enumerate(columns)]
        return labels, frozenset(i for i, x in enumerate(columns) if x.loose)

    # -- rows --------------------------------------------------------------------------

    def rows(self) -> Case:
        """Columns of joined tables, filtered, ordered and cut."""
        found = self.joined()
        columns = [self.value(found) for _ in range(self.c.pick(2, 1, 3, 4))]
        # 1.0 and 1.00 are told apart here: nothing merges them.
        labels, _ = self.labelled(columns)
        statement = self.where(found).add_columns(*labels)
        how = self.c.weighted([(3, "none"), (5, "total"), (2, "columns"), (1, "ties")])
        if how == "none":
            return Case(statement, "rows")
        if how == "total":
            ordered = self.window_of(statement.order_by(*self.order(found)))
            return Case(ordered, "rows ordered", "total")
        keys = [i for i, x in enumerate(columns) if x.family not in UNORDERED][:2]
        if not keys or any(columns[i].loose for i in keys):
            return Case(statement, "rows")
        # COLLATE in the order would leave equal texts apart, so plainly by the columns.
        ordered = statement.order_by(*(labels[i] for i in keys))
        if how == "ties":
            ordered = ordered.fetch(self.c.pick(2, 1, 5), with_ties=True)
            return Case(ordered, "with ties", tuple(keys))
        if self.c.chance(40):
            return Case(ordered.limit(3), "rows ordered", tuple(keys), limited=True)
        return Case(ordered, "rows ordered", tuple(keys))

    def distinct(self) -> Case:
        found = self.joined(2)
        columns = [
            x
            for x in (self.value(found) for _ in range(self.c.pick(1, 2, 3)))
            if x.family != "tsvector"
        ] or [Column(found.sources[0].v, "int")]
        labels, loose = self.labelled(columns)
        statement = self.where(found)
        if self.c.chance(25):
            # The first row of each group of ties is the one that ORDER BY says.
            by = found.sources[0].v
            statement = statement.add_columns(by.label("d"), *labels)
            statement = distinct_on(statement, by)
            order = self.order(found)
            return Case(statement.order_by(by, *order), "distinct on", "total")
        statement = statement.add_columns(*labels).distinct()
        if self.c.chance(50) and not any(x.family in UNORDERED for x in columns):
            statement = statement.order_by(*labels)
            if not loose and self.c.chance(50):
                statement = self.window_of(statement)
            return Case(statement, "distinct", "total", loose=loose)
        return Case(statement, "distinct", loose=loose)

    # -- aggregates --------------------------------------------------------------------

    def aggregate(self, found: Joined, depth: int = 0) -> tuple[Any, str]:
        """Return an aggregate and a note: "loose", "approximate", "unordered" or ""."""
        c = self.c
        columns = found.columns()
        v = c.one(found.sources).v
        total = [c.pick(v.desc(), v), *found.unique]

        def one(*families: str) -> Any:
            options = [x for x in columns if x.family in families]
            return c.one(options) if options else Column(v, "int")

        how = c.weighted(
            [
                (8, "count"),
                (6, "sum"),
                (4, "avg"),
                (5, "extreme"),
                (3, "distinct"),
                (1, "sum distinct"),
                (2, "spread"),
                (2, "bool"),
                (3, "list"),
                (2, "string"),
                (2, "json"),
                (2, "percentile"),
                (1, "bits"),
                (3, "made"),
            ]
        )
        match how:
            case "count":
                made: Any = c.pick(func.count(), func.count(c.one(columns).expr))
                note = ""
            case "sum" | "avg":
                x = one(*_SUMMED, "double")
                made = func.sum(x.expr) if how == "sum" else func.avg(x.expr)
                if how == "avg" and x.family == "cents":
                    # The average of cents is a fraction, which Cents would truncate.
                    made = func.avg(sa.type_coerce(x.expr, BigInteger))
                note = "approximate" if x.family == "double" else ""
            case "extreme":
                x = one(*_EXTREMES)
                made = c.pick(func.min(x.expr), func.max(x.expr))
                note = "loose" if x.loose else ""
            case "distinct":
                x = one(*(_EXTREMES - {"free"}), "uuid", "bool")
                made, note = func.count(distinct(x.expr)), ""
            case "sum distinct":
                made, note = func.sum(distinct(v)), ""
            case "spread":
                x = one("int", "numeric", "float", "wide")
                made = c.pick(
                    func.stddev(x.expr),
                    func.variance(x.expr),
                    func.stddev_pop(x.expr),
                    func.var_samp(x.expr),
                )
                note = "approximate" if x.family == "float" else ""
            case "bool":
                x = one("bool")
                test = x.expr if x.family == "bool" else v > 2
                made = c.pick(func.bool_and(test), func.bool_or(test), func.every(test))
                note = ""
            case "list":
                x = one("int", "text", "numeric", "date", "uuid", "stamptz", "big")
                if c.chance(30) and x.family in ("int", "text"):
                    made = func.array_agg(distinct(x.expr))
                else:
                    made = func.array_agg(aggregate_order_by(x.expr, *total))
                note = ""
            case "string":
                x = one("text")
                text = sa.cast(x.expr, sa.Text)
                made = func.string_agg(text, aggregate_order_by(literal("|"), *total))
                note = ""
            case "json":
                x = one("int", "text", "numeric", "stamptz", "jsonb", "texts")
                value = c.pick(
                    x.expr, func.json_build_object("k", x.expr, "v", v), x.expr
                )
                aggregate = c.pick(func.json_agg, func.jsonb_agg)
                made = aggregate(aggregate_order_by(value, *total))
                note = "unordered"
            case "percentile":
                x = one("int", "float", "numeric")
                made = c.pick(
                    func.percentile_cont(0.5), func.percentile_disc(0.25), func.mode()
                ).within_group(c.pick(x.expr, x.expr, x.expr.desc()))
                note = ""
            case "bits":
                made, note = c.pick(func.bit_and(v), func.bit_or(v)), ""
            case _:
                made = c.pick(
                    func.coalesce(func.sum(v), 0),
                    func.sum(v) + func.count(),
                    func.round(func.avg(v), 2),
                    func.sum(sa.case((v > 2, 1), else_=0)),
                    func.max(v) - func.min(v),
                    func.count(v) * 100 / func.nullif(func.count(), 0),
                    func.sum(v * 2) / 2.0,
                    func.coalesce(func.max(v), func.count()),
                )
                note = ""
        if how not in ("made", "list") and c.chance(20):
            made = made.filter(self.on_column(c.one(columns)))
        return made, note

    def aggregates(
        self, found: Joined, first: int
    ) -> tuple[list[Any], Case, Collection[str]]:
        """Return labelled aggregates, how they are compared, and notes of them."""
        made = [self.aggregate(found) for _ in range(self.c.pick(1, 2, 3))]
        labels = [x.label(f"a{i}") for i, (x, _) in enumerate(made)]
        notes = {i + first: note for i, (_, note) in enumerate(made)}
        made_case = Case(
            None,
            loose=frozenset(i for i, n in notes.items() if n == "loose"),
            approximate=frozenset(i for i, n in notes.items() if n == "approximate"),
        )
        return labels, made_case, set(notes.values())

    def totals(self) -> Case:
        """Aggregates over all rows."""
        found = self.joined(2)
        labels, made, _ = self.aggregates(found, 0)
        statement = self.where(found).add_columns(*labels)
        if self.c.chance(10):
            statement = statement.having(func.count() > self.c.pick(0, 3))
        made.statement, made.shape, made.order = statement, "totals", "total"
        return made

    def groups(self) -> Case:
        """GROUP BY, HAVING, and the order of groups."""
        c = self.c
        found = self.joined(2)
        options = [x for x in found.columns() if x.family not in _UNGROUPED]
        by = [
            c.one([*options, *self.accounts(found)])
            for _ in range(c.weighted([(4, 1), (1, 2)]))
        ]
        if c.chance(20):
            by = [self.made(by[0])]
            if by[0].family in _UNGROUPED:
                by = [Column(found.sources[0].v, "int")]
        labels, loose = self.labelled(by)
        aggregates, made, notes = self.aggregates(found, len(by))
        statement = self.where(found).add_columns(*labels, *aggregates)
        if c.chance(15):
            # A constant in GROUP BY would be a position.
            statement = statement.group_by(*labels)
        else:
            statement = statement.group_by(*(x.expr for x in by))
        if c.chance(25):
            statement = statement.having(
                c.pick(
                    func.count() > 1,
                    func.sum(found.sources[0].v) > 3,
                    func.max(found.sources[0].v).is_not(None),
                )
            )
        made.loose |= loose
        made.shape = "groups"
        if c.chance(60):
            terms = (
                [c.pick(func.count().desc(), aggregates[0].desc())]
                if c.chance(40)
                else []
            )
            if terms and (made.loose or made.approximate):
                terms = []
            if terms and "unordered" in notes:
                terms = [func.count().desc()]
            statement = statement.order_by(*terms, *labels)
            made.order = "total"
            if not made.loose:
                statement = self.window_of(statement)
        made.statement = statement
        return made

    def grouping_sets(self) -> Case:
        found = self.joined(2)
        v = found.sources[0].v
        other = self.c.one(found.columns("text", "int", "bool", "date"))
        sets = self.c.pick(
            func.rollup(v, other.expr),
            func.cube(v, other.expr),
            func.grouping_sets(tuple_(v), tuple_(other.expr), tuple_()),
            func.rollup(v),
        )
        statement = self.where(found, 0)
        named = [v.label("c0")]
        if len(sets.clauses) > 1:
            named.append(other.expr.label("c1"))
        labels, made, _ = self.aggregates(found, len(named))
        made.statement = statement.add_columns(*named, *labels).group_by(sets)
        made.shape = "grouping sets"
        return made

    # -- windows -----------------------------------------------------------------------

    def windows(self) -> Case:
        c = self.c
        found = self.joined(2)
        v = c.one(found.sources).v
        total = [c.pick(v, v.desc()), *found.unique]
        options = [x for x in found.columns() if x.family not in _UNGROUPED]
        partition: Any = c.weighted(
            [
                (4, found.sources[0].account),
                (2, None),
                (3, c.one(options).expr),
                (1, [v, c.one(options).expr]),
            ]
        )
        over: dict[str, Any] = {} if partition is None else {"partition_by": partition}
        made = c.pick(
            func.row_number().over(order_by=total, **over),
            func.rank().over(order_by=v, **over),
            func.dense_rank().over(order_by=v.desc(), **over),
            func.percent_rank().over(order_by=v, **over),
            func.ntile(3).over(order_by=total, **over),
            func.lag(v).over(order_by=total, **over),
            func.lead(v, 2, -1).over(order_by=total, **over),
            func.first_value(v).over(order_by=total, **over),
            func.last_value(v).over(order_by=total, rows=(None, None), **over),
            func.sum(v).over(order_by=total, **over),
            func.sum(v).over(order_by=v, **over),
            func.sum(v).over(order_by=total, rows=(-1, 1), **over),
            func.avg(v).over(**over),
            func.count().over(**over),
            func.max(v).filter(v < 4).over(**over),
            func.count().over(order_by=v, range_=(None, 0), **over),
        )
        statement = self.where(found).add_columns(
            *(u.label(f"u{i}") for i, u in enumerate(found.unique)),
            v.label("v"),
            made.label("w"),
        )
        if c.chance(30):
            inner = statement.subquery()
            statement = select(inner).where(inner.c.w <= c.pick(1, 2))
            return Case(statement, "windows")
        if c.chance(40):
            ordered = self.window_of(statement.order_by(*self.order(found)))
            return Case(ordered, "windows", "total")
        return Case(statement, "windows")

    def grouped_windows(self) -> Case:
        """Windows over groups."""
        found = self.joined(2)
        v = found.sources[0].v
        by = self.c.one([*found.columns("text", "int", "date"), *self.accounts(found)])
        statement = self.where(found).add_columns(
            by.expr.label("c0"),
            func.sum(v).label("s"),
            func.rank().over(order_by=func.sum(v).desc()).label("r"),
            func.sum(func.count()).over(order_by=by.expr).label("w"),
        )
        return Case(statement.group_by(by.expr), "windows over groups")

    # -- sets --------------------------------------------------------------------------

    def arm(self, depth: int, named: bool) -> Any:
        if depth and self.c.chance(25):
            return self._set(depth - 1, named)
        found = self.joined(2, 10)
        source = found.sources[-1]
        text = source.of("text")
        word = self.c.one(text).expr if text else literal("x", String)
        columns = (
            [source.v.label("c0"), word.label("c1")] if named else [source.v, word]
        )
        statement = self.where(found, 0).add_columns(*columns)
        if self.c.chance(10):
            statement = statement.order_by(*found.unique).limit(3)
        return statement

    def _set(self, depth: int, named: bool) -> Any:
        how = self.c.weighted(
            [
                (4, sa.union_all),
                (4, sa.union),
                (2, sa.intersect),
                (2, sa.except_),
                (1, sa.intersect_all),
                (1, sa.except_all),
            ]
        )
        return how(*(self.arm(depth, named) for _ in range(self.c.pick(2, 2, 3))))

    def sets(self) -> Case:
        c = self.c
        named = c.chance(75)
        made = self._set(1, named)
        if not named:  # then the columns are called as those of the first SELECT
            return Case(made.order_by("v"), "set operations", (0,))
        if c.chance(20):
            inner = made.subquery()
            return Case(
                select(inner.c.c0, func.count().label("n")).group_by(inner.c.c0),
                "set operations",
            )
        if c.chance(50):
            statement = made.order_by(c.pick("c0", sa.desc("c0")), "c1")
            return Case(self.window_of(statement), "set operations", "total")
        return Case(made, "set operations")

    # -- CTEs --------------------------------------------------------------------------

    def ctes(self) -> Case:
        c = self.c
        inner = self.entity()
        if inner.account is None:
            inner = self.entity(m.Account)
        body = select(inner.account.label("k"), inner.v.label("v"))
        if c.chance(60):
            body = body.where(self.criterion(Joined(None, [inner]), 0))
        if c.chance(40):
            body = select(
                inner.account.label("k"), func.sum(inner.v).label("v")
            ).group_by(inner.account)
        cte = body.cte("it")
        how = c.weighted(
            [(3, "once"), (3, "twice"), (2, "in"), (2, "max"), (2, "join")]
        )
        if how == "once":
            statement = select(cte.c.k, cte.c.v)
            if c.chance(50):
                statement = statement.where(self._account_pin(cte.c.k))
        elif how == "twice":
            a, b = cte.alias(), cte.alias()
            on = c.pick(a.c.k == b.c.k, a.c.v == b.c.v)
            statement = select(a.c.k, b.c.v).join_from(a, b, on)
        elif how == "in":
            outer = self.entity(m.Purchase, plain=True)
            statement = select(outer.account.label("k"), outer.v.label("v")).where(
                outer.account.in_(select(cte.c.k).where(cte.c.v > 1))
            )
        elif how == "max":
            top = select(func.max(cte.c.v)).scalar_subquery()
            statement = select(cte.c.k, cte.c.v).where(cte.c.v == top)
        else:
            outer = self.entity(m.Account)
            statement = (
                select(outer.account.label("k"), cte.c.v)
                .select_from(outer.element)
                .join(cte, cte.c.k == outer.account, isouter=c.chance(50))
            )
        return Case(statement, "CTEs")

    def recursive(self) -> Case:
        c = self.c
        how = c.pick("purchases", "regions", "numbers")
        if how == "purchases":
            Purchase, child = m.Purchase, sa.orm.aliased(m.Purchase)
            top = select(
                Purchase.id, Purchase.account_id, literal(0).label("depth")
            ).where(Purchase.parent_id.is_(None))
            if c.chance(50):
                top = top.where(self._account_pin(Purchase.account_id))
            cte = top.cte("chain", recursive=True)
            step = select(child.id, child.account_id, cte.c.depth + 1).join(
                cte, child.parent_id == cte.c.id
            )
            made = cte.union_all(step)
            statement = c.pick(
                select(made),
                select(made.c.depth, func.count().label("n")).group_by(made.c.depth),
            )
        elif how == "regions":
            Region, child_ = m.Region, sa.orm.aliased(m.Region)
            cte = (
                select(Region.code)
                .where(Region.code == "de")
                .cte("down", recursive=True)
            )
            made = cte.union(
                select(child_.code).where(child_.parent_code == cte.c.code)
            )
            statement = select(made)
            if c.chance(60):
                statement = select(m.Account.id).where(
                    m.Account.region_code.in_(select(made.c.code))
                )
        else:
            cte = select(literal(1).label("n")).cte("numbers", recursive=True)
            made = cte.union_all(select(cte.c.n + 1).where(cte.c.n < 5))
            statement = select(made.c.n)
            if c.chance(60):
                statement = (
                    select(made.c.n, func.count(m.Account.id).label("a"))
                    .select_from(made)
                    .outerjoin(m.Account, m.Account.v == made.c.n)
                    .group_by(made.c.n)
                )
        return Case(statement, "recursive CTEs")

    # -- VALUES, functions, laterals ---------------------------------------------------

    def values(self) -> Case:
        c = self.c
        made = sa.values(
            column("k", BigInteger), column("w", String), name="vals"
        ).data([(1, "x"), (2, "y"), (5, "x"), (99, "z")])
        outer = self.entity(m.Account)
        statement = (
            select(made.c.w, outer.account.label("k"), outer.v.label("v"))
            .select_from(made)
            .join(outer.element, outer.account == made.c.k, isouter=c.chance(50))
        )
        if c.chance(30):
            statement = statement.with_only_columns(
                made.c.w, func.count(outer.account).label("n")
            ).group_by(made.c.w)
        elif c.chance(40):
            statement = self.window_of(statement.order_by(made.c.w, made.c.k))
            return Case(statement, "VALUES", "total")
        return Case(statement, "VALUES")

    def functions(self) -> Case:
        """Set-returning functions, over rows or alone."""
        c = self.c
        how = c.pick("tags", "series", "elements", "column", "alone")
        Purchase, Specimen = m.Purchase, m.Specimen
        if how == "tags":
            each = func.unnest(Purchase.tags).table_valued("tag").render_derived()
            tag = each.c.tag
            statement = select(Purchase.id, tag).select_from(Purchase)
            statement = statement.join(each, true(), isouter=c.chance(50))
            if c.chance(50):
                statement = statement.with_only_columns(
                    tag, func.count().label("n")
                ).group_by(tag)
        elif how == "series":
            each = func.generate_series(1, 4).table_valued("n").render_derived()
            n = each.c.n
            statement = (
                select(n, func.count(Purchase.id).label("c"))
                .select_from(each)
                .outerjoin(Purchase, Purchase.v == n)
                .group_by(n)
            )
        elif how == "elements":
            arrays = sa.case(
                (func.jsonb_typeof(Specimen.doc) == "array", Specimen.doc),
                else_=sa.cast(sa.literal("[]"), pg.JSONB),
            )
            each = (
                func.jsonb_array_elements(arrays)
                .table_valued(column("x", pg.JSONB))
                .render_derived()
            )
            statement = select(Specimen.id, each.c.x).select_from(Specimen)
            statement = statement.join(each, true())
        elif how == "column":
            statement = select(
                Specimen.id, func.unnest(Specimen.numbers, type_=Integer).label("n")
            )
        else:
            statement = select(func.generate_series(1, 3).column_valued("n"))
        return Case(statement, "set-returning functions")

    def laterals(self) -> Case:
        """The first rows of each row."""
        c = self.c
        outer = self.entity(m.Account)
        inner = self.entity(c.pick(m.Purchase, m.Item, m.Event, m.Label))
        side = select(
            inner.v.label("v"), *(u.label(f"u{i}") for i, u in enumerate(inner.unique))
        )
        side = side.where(inner.account == outer.account)
        if c.chance(70):
            side = side.order_by(inner.v.desc().nulls_last(), *inner.unique).limit(2)
        else:
            side = select(func.sum(inner.v).label("v"), func.count().label("n")).where(
                inner.account == outer.account
            )
        if outer.element is m.Account:
            side = side.correlate(m.Account)
        else:
            side = side.correlate(outer.element)
        lateral = side.lateral()
        found = Joined(select().select_from(outer.element), [outer])
        statement = found.statement.join(lateral, true(), isouter=c.chance(50))
        statement = statement.add_columns(outer.account.label("k"), *lateral.c)
        if c.chance(40):
            statement = statement.where(self.simple(outer))
        return Case(statement, "laterals")

    def counted(self) -> Case:
        """count(*) over a SELECT, and other SELECTs from one."""
        c = self.c
        found = self.joined(2)
        inner = self.where(found).add_columns(
            *(u.label(f"u{i}") for i, u in enumerate(found.unique)),
            found.sources[0].v.label("v"),
        )
        if c.chance(40):
            inner = self.window_of(inner.order_by(*self.order(found)))
        elif c.chance(20):
            inner = inner.distinct()
        sub = inner.subquery()
        statement = c.pick(
            select(func.count().label("n")).select_from(sub),
            select(func.sum(sub.c.v).label("s"), func.count(sub.c.v).label("n")),
            select(sub.c.v, func.count().label("n")).group_by(sub.c.v),
            select(sub.c.v).order_by(sub.c.v).limit(3),
        )
        with contextlib.suppress(AttributeError):
            if statement._limit_clause is not None:
                return Case(statement, "SELECT FROM SELECT", "total")
        return Case(statement, "SELECT FROM SELECT")


def distinct_on(statement: Any, *by: Any) -> Any:
    """Return the statement with DISTINCT ON, as this SQLAlchemy spells it."""
    if hasattr(pg, "distinct_on"):
        return statement.ext(pg.distinct_on(*by))
    return statement.distinct(*by)
