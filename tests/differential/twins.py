"""The two sides, and what it means that they are equal.

`Twins` holds one plain database and one cluster of four, in databases of their own on
the servers of a ``LocalCluster``. Rows are written past shardalchemy: what is judged
has no part in making the expectation.
"""

from __future__ import annotations

import collections
import dataclasses
import decimal
import itertools
import math
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import create_engine, insert, make_url
from sqlalchemy.orm import sessionmaker

from shardalchemy import Cluster
from shardalchemy.errors import ShardAlchemyError
from shardalchemy.local import LocalCluster
from shardalchemy.schema import Kind, placement_of
from shardalchemy.session import ShardedSession
from tests.differential.data import Rows, make_rows
from tests.differential.models import Base

__all__ = [
    "TIMEZONE",
    "Case",
    "Failed",
    "Mirror",
    "Outcome",
    "Refused",
    "Tally",
    "Twins",
    "comparable",
    "compare",
    "stored",
]

TIMEZONE = "America/New_York"
"""The TimeZone of every session: not UTC, and with a lost and a doubled hour."""


class Refused(Exception):
    """The cluster does not answer, and says why."""


class Failed(Exception):
    """The statement is an error, whichever it is."""


@dataclass
class Case:
    """A statement, and how much of its result is determined.

    ``order`` is ``"total"`` where the rows' order is, else the positions of the columns
    that ORDER BY names; rows are then compared as a multiset, and these columns in
    order. ``limited`` says that LIMIT picks among ties, so that only those columns and
    the number of rows are determined. ``loose`` columns may be any of equal values,
    as 1.0 and 1.00 in a group; ``approximate`` ones may differ in the last bits.
    ``work`` is what to do if it is not one statement; ``others`` are its further ones.
    ``again`` has the same shape and other values, and so is planned already.
    """

    statement: Any
    shape: str = ""
    order: str | tuple[int, ...] = ()
    limited: bool = False
    params: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    unique: bool = False
    loose: frozenset[int] = frozenset()
    approximate: frozenset[int] = frozenset()
    work: Callable[[Any], Any] | None = None
    others: list[Any] = field(default_factory=list)
    again: Case | None = None

    def run(self, session: Any) -> Any:
        """Return the names of the columns, and the rows as comparable values."""
        if self.work is not None:
            return self.work(session)
        result = session.execute(
            self.statement, self.params, execution_options=self.options
        )
        keys = list(result.keys())
        if self.unique:
            result = result.unique()
        return keys, [tuple(comparable(v) for v in row) for row in result.all()]


def comparable(value: Any, seen: frozenset[int] | set[int] = frozenset()) -> Any:
    """Return a value that is equal for equal results only: of one type, digit by digit.

    Of an object it has the loaded attributes; one that was met before in the same row
    stands for itself by its identity.
    """
    if isinstance(value, Base):
        seen = seen if isinstance(seen, set) else set()
        state = sa.inspect(value)
        name = type(value).__name__
        if id(value) in seen:
            return name, state.identity
        seen.add(id(value))
        attributes = (
            (a.key, comparable(state.dict[a.key], seen))
            for a in sorted(state.mapper.attrs, key=lambda a: a.key)
            if a.key in state.dict
        )
        return name, state.identity, *attributes
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, repr(value)
    if isinstance(value, sa.Row):
        return "Row", *(comparable(v, seen) for v in value)
    if isinstance(value, list | tuple):
        return type(value).__name__, *(comparable(v, seen) for v in value)
    if isinstance(value, dict):
        return "dict", *(
            (k, comparable(v, seen)) for k, v in sorted(value.items(), key=repr)
        )
    return type(value).__name__, repr(value)


def compare(case: Case, got: Any, expected: Any) -> str | None:
    """Return how *got* differs from *expected*, or None if both are the same answer."""
    if case.work is not None:
        return None if got == expected else _difference(got, expected)
    if got[0] != expected[0]:
        return f"\n  columns {got[0]!r}\n expected {expected[0]!r}"
    rows = [_tolerant(case, row) for row in got[1]]
    wanted = [_tolerant(case, row) for row in expected[1]]
    if case.order == "total":
        return None if rows == wanted else _difference(rows, wanted)
    if case.limited:
        if len(rows) != len(wanted):
            return f"{len(rows)} rows, expected {len(wanted)}"
    elif sorted(rows, key=repr) != sorted(wanted, key=repr):
        return _difference(sorted(rows, key=repr), sorted(wanted, key=repr))
    ordered = [tuple(row[i] for i in case.order) for row in rows]  # type: ignore[index]
    as_wanted = [tuple(row[i] for i in case.order) for row in wanted]  # type: ignore[index]
    return None if ordered == as_wanted else _difference(ordered, as_wanted)


def _tolerant(case: Case, row: Sequence[Any]) -> tuple[Any, ...]:
    if not case.loose and not case.approximate:
        return tuple(row)
    return tuple(
        _rounded(v)
        if i in case.approximate
        else _canonical(v)
        if i in case.loose
        else v
        for i, v in enumerate(row)
    )


def _canonical(value: Any) -> Any:
    """Return one value for all decimals that are equal, wherever they are within."""
    match value:
        case ("Decimal", str(text)):
            number = decimal.Decimal(text.removeprefix("Decimal('").removesuffix("')"))
            if not number.is_finite():
                return value
            return "Decimal", str(number.normalize(decimal.Context(prec=200)))
        case tuple():
            return tuple(map(_canonical, value))
    return value


def _rounded(value: Any) -> Any:
    match value:
        case ("float", str(text)):
            number = float(text)
            if math.isfinite(number):
                return "float", f"{number:.9g}"
    return value


def _difference(got: Any, expected: Any) -> str:
    """Say where two answers part; for rows, at the first that differs."""
    where = ""
    if isinstance(got, list) and isinstance(expected, list):
        pairs = enumerate(itertools.zip_longest(got, expected, fillvalue="no row"))
        row, (got_row, expected_row) = next((n, p) for n, p in pairs if p[0] != p[1])
        where = f" {len(got)} rows, expected {len(expected)}; the first other is {row}:"
        got, expected = got_row, expected_row
    return f"{where}\n      got {got!r:.1200}\n expected {expected!r:.1200}"


@dataclass(frozen=True)
class Outcome:
    """``word`` is equal, refused, "error on both" or WRONG; ``detail`` says more."""

    word: str
    detail: str = ""


@dataclass
class Tally:
    """What came of many statements."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    shapes: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )

    @property
    def total(self) -> int:
        return sum(self.outcomes.values())

    def count(self, shape: str, outcome: Outcome) -> None:
        self.outcomes[outcome.word] += 1
        self.shapes[shape][outcome.word] += 1
        if outcome.word == "refused":
            self.reasons[reason_of(outcome.detail)] += 1
        elif outcome.word == "error on both":
            self.errors[outcome.detail[:90]] += 1
        elif outcome.word == "equal":
            self.kinds[outcome.detail] += 1

    def report(self, longest: int = 40) -> str:
        """Return the outcome counts, the refusals by reason, and both by shape."""
        total = max(self.total, 1)
        lines = [f"{self.total} statements: {_counts(self.outcomes, total)}"]
        lines.append(f"answered as: {_counts(self.kinds, total)}")
        lines.append("refused because:")
        lines += [
            f"  {n:6} {n / total:6.1%}  {why}"
            for why, n in self.reasons.most_common(longest)
        ]
        lines.append("by shape:               count   equal refused")
        for shape, counts in sorted(self.shapes.items()):
            n = sum(counts.values())
            lines.append(
                f"  {shape:20} {n:6}  {counts['equal'] / n:6.1%}"
                f"  {counts['refused'] / n:6.1%}"
                + (f"  WRONG {counts['WRONG']}" if counts["WRONG"] else "")
            )
        lines += [f"  {n:6} error on both: {e}" for e, n in self.errors.most_common(12)]
        return "\n".join(lines)


def _counts(counter: collections.Counter[str], total: int) -> str:
    return ", ".join(f"{k} {n} ({n / total:.1%})" for k, n in counter.most_common())


def reason_of(message: str) -> str:
    """Return what refusals of one kind have in common, without names and values."""
    reason = re.split(r" cannot be run|\. |[:;]| \(", message.replace("\n", " "))[0]
    reason = re.sub(r"(public\.)?df_\w+|anon_\d+", "…", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason)
    return re.sub(r"\d+", "#", reason)[:100]


class Twins:
    """The plain database and the cluster, which hold the same rows.

    *collation* is what follows ``CREATE DATABASE … TEMPLATE template0``.
    """

    def __init__(
        self,
        servers: LocalCluster,
        metadata: sa.MetaData = Base.metadata,
        *,
        collation: str = "",
        timezone: str = TIMEZONE,
        **options: Any,
    ) -> None:
        self._urls = {name: make_url(url) for name, url in servers.urls.items()}
        self._tag = uuid.uuid4().hex[:8]
        self._made: list[tuple[sa.URL, str]] = []
        self.metadata = metadata
        first = next(iter(self._urls.values()))
        setting = {"options": f"-c timezone={timezone}"}

        def made(url: sa.URL, name: str) -> sa.URL:
            sql = f"CREATE DATABASE {name} TEMPLATE template0 {collation}"
            with _admin(url) as connection:
                connection.exec_driver_sql(sql)
            self._made.append((url, name))
            return url.set(database=name).update_query_dict(setting)

        try:
            self.engine = create_engine(made(first, f"df_plain_{self._tag}"))
            urls = {n: made(u, f"df_shard_{self._tag}") for n, u in self._urls.items()}
            self.shards = {
                n: create_engine(url, pool_size=1) for n, url in urls.items()
            }
            self._cluster = lambda: Cluster(urls, redis=servers.redis_url, **options)
            self.cluster = self._cluster()
            metadata.create_all(self.engine)
            self.cluster.create_all(metadata)
        except BaseException:
            self._drop()
            raise
        self.plain = sessionmaker(self.engine)
        self.sharded = self.cluster.sessionmaker()
        self.dataset = "none"
        self.rows: Rows = {}

    def close(self) -> None:
        """Close all connections and drop the databases."""
        self.cluster.close()
        for engine in (self.engine, *self.shards.values()):
            engine.dispose()
        self._drop()

    def _drop(self) -> None:
        for url, name in self._made:
            with _admin(url) as connection:
                connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")

    def __enter__(self) -> Twins:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Let the cluster be as of a new process, with nothing planned yet."""
        self.cluster.close()
        self.cluster = self._cluster()
        self.sharded = self.cluster.sessionmaker()

    # -- rows ------------------------------------------------------------------------

    def owner(self, slot: int) -> str:
        return self.cluster.topology.owners[slot]

    def fill(self, profile: str, seed: int) -> None:
        """Replace all rows on both sides by those of a data set."""
        self.load(make_rows(profile, seed, self.owner))
        self.dataset = f"{profile} {seed}"

    def load(self, rows: Rows) -> None:
        """Replace all rows on both sides by these."""
        topology = self.cluster.topology
        with self.engine.begin() as connection:
            _replace(connection, self.metadata.sorted_tables, rows)
        for shard, engine in self.shards.items():
            here: Rows = {}
            tables = []
            for table in self.metadata.sorted_tables:
                placement = placement_of(table)
                if placement.kind is Kind.HOME and shard != topology.home:
                    continue
                tables.append(table)
                here[table] = [
                    row
                    for row in rows.get(table, ())
                    if placement.kind is not Kind.SHARDED
                    or self.owner(placement.slot_of_values(row) or 0) == shard
                ]
            with engine.begin() as connection:
                _replace(connection, tables, here)
        self.rows = rows

    def shard_of(self, table: sa.Table, row: dict[str, Any]) -> str:
        return self.owner(placement_of(table).slot_of_values(row) or 0)

    # -- statements ------------------------------------------------------------------

    def judge(self, case: Case) -> Outcome:
        """Run a case on both sides and say what came of it."""
        try:
            expected = self.run(self.plain, case)
        except Failed as failed:
            try:
                got = self.run(self.sharded, case)
            except (Failed, Refused):
                return Outcome("error on both", str(failed))
            return Outcome(
                "WRONG", f"plain fails: {failed}\n but cluster gives {got!r}"
            )
        try:
            got = self.run(self.sharded, case)
        except Refused as refused:
            return Outcome("refused", str(refused))
        except Failed as failed:
            return Outcome("WRONG", f"only the cluster fails: {failed}")
        difference = compare(case, got, expected)
        if difference is not None:
            return Outcome("WRONG", difference)
        if case.again is not None:
            second = self.judge(case.again)
            if second.word == "WRONG":
                return Outcome("WRONG", f"with other values: {second.detail}")
        return Outcome("equal", self.kind_of(case))

    def run(self, maker: Any, case: Case) -> Any:
        with maker() as session:
            try:
                return case.run(session)
            except ShardAlchemyError as error:
                if maker is self.plain:
                    raise
                raise Refused(str(error)) from error
            except (sa.exc.SQLAlchemyError, ArithmeticError) as error:
                raise Failed(f"{type(error).__name__}: {error}") from error

    def kind_of(self, case: Case) -> str:
        """Return how the cluster answers, as its plan calls it."""
        if case.statement is None:
            return "several statements"
        with self.sharded() as session:
            try:
                plan = session.explain(
                    case.statement, case.params, execution_options=case.options
                )
            except ShardAlchemyError:
                return "unexplained"
            return str(plan.kind.value)


def stored(session: Any, table: sa.Table) -> list[str]:
    """Return a table's rows as *session* sees them; copies of one must agree."""
    statement = sa.select(table)
    kind = placement_of(table).kind
    if not isinstance(session, ShardedSession) or kind is Kind.HOME:
        return sorted(repr(tuple(row)) for row in session.execute(statement))
    found = [
        sorted(
            repr(tuple(row))
            for row in session.execute(statement, bind_arguments={"shard": shard})
        )
        for shard in session._cluster.topology.shards
    ]
    if kind is Kind.REFERENCE:
        assert all(rows == found[0] for rows in found), f"copies of {table} differ"
        return found[0]
    return sorted(row for rows in found for row in rows)


class Mirror(Twins):
    """Twins of which the second is plain too, with its rows in another order.

    It plans otherwise as well. What differs here is not determined by the statement,
    and so a fault of the grammar.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        url = self._urls[next(iter(self._urls))]
        settings = "hashagg", "hashjoin", "mergejoin", "material", "incremental_sort"
        off = "".join(f" -c enable_{name}=off" for name in settings)
        name = f"df_mirror_{self._tag}"
        self.engine.dispose()  # a template must not be in use
        with _admin(url) as connection:
            connection.exec_driver_sql(
                f"CREATE DATABASE {name} TEMPLATE df_plain_{self._tag}"
            )
        self._made.append((url, name))
        query = {"options": f"{self.engine.url.query['options']}{off}"}
        self.mirror = create_engine(url.set(database=name).update_query_dict(query))
        self.sharded = sessionmaker(self.mirror)

    def load(self, rows: Rows) -> None:
        super().load(rows)
        shuffled = {t: random.Random(1).sample(r, len(r)) for t, r in rows.items()}
        with self.mirror.begin() as connection:
            connection.exec_driver_sql("SET session_replication_role = replica")
            _replace(connection, self.metadata.sorted_tables, shuffled)
            connection.exec_driver_sql("SET session_replication_role = origin")

    def forget(self) -> None:
        """Do nothing: nothing is planned."""

    def kind_of(self, case: Case) -> str:
        return "mirrored"

    def close(self) -> None:
        self.mirror.dispose()
        super().close()


@contextmanager
def _admin(url: sa.URL) -> Iterator[sa.Connection]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _replace(connection: sa.Connection, tables: Sequence[sa.Table], rows: Rows) -> None:
    names = ", ".join(
        connection.dialect.identifier_preparer.format_table(t) for t in tables
    )
    connection.exec_driver_sql(f"TRUNCATE {names}")
    for table in tables:
        if rows.get(table):
            connection.execute(insert(table), rows[table])
