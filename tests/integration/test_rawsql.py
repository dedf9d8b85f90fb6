"""Plain SQL over sharded tables gives what one PostgreSQL gives, or is refused.

The same rows are kept in one plain database and in a cluster of four shards; what the
shards hold is read with psycopg.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import BigInteger, bindparam, make_url, select, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    selectinload,
)

from shardalchemy import Cluster, locator_id, reference_table, sharded_by
from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.ids import new_locator
from shardalchemy.local import LocalCluster
from shardalchemy.schema import placement_of
from tests.conftest import Servers


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "rs_orders"
    __table_args__ = (
        sa.UniqueConstraint("id", "customer_id"),
        {"info": sharded_by("customer_id")},
    )
    id: Mapped[uuid.UUID] = locator_id()
    customer_id: Mapped[int] = mapped_column(BigInteger)
    v: Mapped[int | None]
    lines: Mapped[list[Line]] = relationship(order_by=lambda: Line.no)


class Line(Base):
    __tablename__ = "rs_lines"
    __table_args__ = (
        sa.ForeignKeyConstraint(
            ["order_id", "customer_id"], ["rs_orders.id", "rs_orders.customer_id"]
        ),
        {"info": sharded_by("customer_id")},
    )
    order_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    no: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    v: Mapped[int | None]


class Tag(Base):
    __tablename__ = "rs_tags"
    __table_args__ = {"info": sharded_by("tag")}
    tag: Mapped[str] = mapped_column(primary_key=True)
    v: Mapped[int | None]


class Country(Base):
    __tablename__ = "rs_countries"
    __table_args__ = {"info": reference_table()}
    code: Mapped[str] = mapped_column(primary_key=True)
    v: Mapped[int | None]


class Note(Base):
    __tablename__ = "rs_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]


KEYS = [*range(1, 9), -3, 2**40]
WORDS = ["a", "b", "B", "ä", "x y", "", "it's", "100%"]


def rows() -> list[Any]:
    rng = random.Random(5)
    pin = placement_of(Order.__table__).pin
    assert pin is not None

    def v() -> int | None:
        return rng.choice([None, 1, 2, 3, 4])

    made: list[Any] = [Tag(tag=word, v=v()) for word in WORDS]
    made += [Country(code=code, v=v()) for code in ("de", "fr", "it")]
    made += [Note(id=n, body=f"rs_orders {n}") for n in range(3)]
    for key in KEYS[:-1]:
        slot = pin.slot(key)
        assert slot is not None
        for _ in range(rng.randrange(1, 4)):
            id_ = new_locator(slot)
            lines = [
                Line(no=no, customer_id=key, v=v()) for no in range(rng.randrange(3))
            ]
            made.append(Order(id=id_, customer_id=key, v=v(), lines=lines))
    return made


class Pair:
    """One database with all rows, and the cluster."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        url = make_url(servers.local.urls["s1"])
        self.name = f"rs_{uuid.uuid4().hex[:8]}"
        with servers.connect("s1") as connection:
            connection.execute(f"CREATE DATABASE {self.name}")
        self.engine = sa.create_engine(url.set(database=self.name))
        self.cluster: Cluster = servers.local.cluster()
        self.cluster.create_all(Base.metadata)
        Base.metadata.create_all(self.engine)
        self.plain = sa.orm.sessionmaker(self.engine)
        self.sharded = self.cluster.sessionmaker()
        made = rows()
        self.orders = [(o.id, o.customer_id) for o in made if isinstance(o, Order)]
        with self.plain.begin() as session:
            session.add_all(made)
            session.flush()
            for one in made:
                session.expunge(one)
                sa.orm.make_transient(one)
                for line in getattr(one, "lines", ()):
                    session.expunge(line)
                    sa.orm.make_transient(line)
        with self.sharded.begin() as session:
            session.add_all(made)

    def close(self) -> None:
        self.cluster.close()
        self.engine.dispose()
        with self.servers.connect("s1") as connection:
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")

    def plain_rows(self, table: str) -> Counter[Any]:
        with self.plain() as session:
            return Counter(map(tuple, session.execute(text(f"SELECT * FROM {table}"))))

    def held(self, table: str) -> Counter[Any]:
        """Return all rows of a sharded table that the servers hold, by psycopg."""
        return Counter(
            row
            for shard in self.servers
            for row in self.servers.rows(shard, f"SELECT * FROM {table}")
        )

    def check(self, sql: Any, params: Any = None, *, ordered: bool = False) -> str:
        """Compare what a text gives on both; return where it ran."""
        statement = text(sql) if isinstance(sql, str) else sql
        got: Any
        with self.sharded() as session:
            try:
                plan = session.explain(statement, params)
                got = [tuple(row) for row in session.execute(statement, params)]
            except UnsupportedQueryError:
                return "refused"
            except sa.exc.DBAPIError as error:
                got = type(error.orig)
        with self.plain() as session:
            try:
                expected: Any = [tuple(r) for r in session.execute(statement, params)]
            except sa.exc.DBAPIError as error:
                expected = type(error.orig)
        if isinstance(got, list) and isinstance(expected, list) and not ordered:
            assert Counter(map(repr, got)) == Counter(map(repr, expected)), str(sql)
        else:
            assert got == expected, str(sql)
        return str(plan.kind.value)

    def check_write(self, sql: Any, params: Any = None) -> None:
        """Commit a write on both, and compare all that the servers then hold."""
        statement = text(sql) if isinstance(sql, str) else sql
        found = []
        for maker in (self.plain, self.sharded):
            with maker.begin() as session:
                result = session.execute(statement, params)
                given = [tuple(r) for r in result] if result.returns_rows else None
                found.append((given, result.rowcount))
        assert found[0] == found[1]
        for table in ("rs_orders", "rs_lines", "rs_tags"):
            assert self.held(table) == self.plain_rows(table)


@pytest.fixture(scope="module")
def pair(shard_servers: LocalCluster) -> Iterator[Pair]:
    made = Pair(Servers(shard_servers))
    try:
        yield made
    finally:
        made.close()
        made.servers.run(
            "DROP TABLE IF EXISTS rs_lines, rs_orders, rs_tags, rs_countries, rs_notes"
            " CASCADE"
        )


# -- reads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id, v FROM rs_orders WHERE customer_id = :c ORDER BY v, id LIMIT 2",
        "SELECT count(*), sum(v), array_agg(v ORDER BY v, id) FROM public.rs_orders"
        " WHERE customer_id = :c",
        'SELECT o.v, l.no FROM "rs_orders" o LEFT JOIN rs_lines l'
        " ON l.order_id = o.id AND l.customer_id = o.customer_id"
        " WHERE o.customer_id = :c ORDER BY o.id, l.no",
        "WITH o AS (SELECT * FROM rs_orders), l AS (SELECT * FROM rs_lines"
        " WHERE customer_id = :c) SELECT o.v, count(l.no), rank() OVER (ORDER BY o.id)"
        " FROM o LEFT JOIN l ON l.order_id = o.id WHERE o.customer_id = :c"
        " GROUP BY o.id, o.v ORDER BY o.id",
        "SELECT max(v) FROM rs_lines WHERE customer_id = :c UNION ALL"
        " SELECT (SELECT count(*) FROM rs_lines l WHERE l.customer_id = o.customer_id)"
        " FROM rs_orders o WHERE o.customer_id = :c ORDER BY 1",
        r"SELECT c.code, o.v FROM rs_countries c, rs_orders o"
        r" WHERE o.customer_id = :c\:\:bigint AND c.v IS NOT NULL ORDER BY 1, o.id",
        "SELECT customer_id, 'rs_lines; --' FROM rs_orders /* rs_notes */"
        " JOIN rs_lines USING (customer_id) WHERE customer_id IN (:c, -0)"
        " AND no = 0 ORDER BY rs_orders.id, rs_lines.order_id",
    ],
)
def test_a_pinned_text_gives_what_one_server_gives(pair: Pair, sql: str) -> None:
    for key in [*KEYS, 99, None]:
        if "-0" in sql and key is not None and pair.check(sql, {"c": 0}) != "route":
            pytest.fail(sql)
        outcome = pair.check(sql, {"c": key}, ordered=True)
        assert outcome in (("route", "refused") if "-0" in sql else ("route",))


def test_a_text_key_and_a_locator(pair: Pair) -> None:
    for word in [*WORDS, "zz"]:
        quoted = word.replace("'", "''")
        sql = "SELECT tag, v FROM rs_tags WHERE tag = :t"
        assert pair.check(sql, {"t": word}) == "route"
        assert pair.check(f"SELECT count(*) FROM rs_tags WHERE tag = '{quoted}'")
    for id_, _ in pair.orders:
        sql = "SELECT customer_id, count(*) FROM rs_orders WHERE id = :id GROUP BY 1"
        assert pair.check(sql, {"id": id_}) == "route"
        assert pair.check(sql, {"id": str(id_)}) == "route"


def test_values_that_are_no_keys_are_compared_on_all_shards(pair: Pair) -> None:
    sql = "SELECT customer_id, v FROM rs_orders WHERE customer_id = :c"
    for value in (2.0, 2.5, "2", 2**70):
        assert pair.check(sql, {"c": value}) == "scatter"
        counting = sql.replace("customer_id, v", "count(*)")
        assert pair.check(counting, {"c": value}) == "refused"


def test_a_plain_select_is_scattered(pair: Pair) -> None:
    sql = "SELECT id, upper('ä') AS u, v + 1 AS w FROM rs_orders WHERE v > :v"
    assert pair.check(sql, {"v": 1}) == "scatter"
    assert pair.check("SELECT * FROM rs_tags") == "scatter"
    many = text("SELECT * FROM rs_orders WHERE customer_id IN :keys").bindparams(
        bindparam("keys", expanding=True)
    )
    assert pair.check(many, {"keys": KEYS}) == "scatter"
    assert pair.check(many, {"keys": KEYS[:1]}) == "route"
    assert pair.check(many, {"keys": []}) == "route"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM rs_orders",
        "SELECT * FROM rs_orders ORDER BY v LIMIT 3",
        "SELECT * FROM rs_orders, rs_notes WHERE customer_id = 1",
        "TRUNCATE rs_orders",
        "DO $$ BEGIN DELETE FROM rs_orders; END $$",
        "SELECT 1; DELETE FROM rs_orders",
        "COPY rs_orders TO STDOUT",
        "EXPLAIN SELECT * FROM rs_orders WHERE customer_id = 1",
        "UPDATE rs_countries SET v = 9",
        "UPDATE rs_orders SET v = 9",
        "INSERT INTO rs_tags (tag) VALUES ('m'), ('n'), ('o'), ('p'), ('q')",
    ],
)
def test_what_is_refused_touches_nothing(pair: Pair, sql: str) -> None:
    before = pair.held("rs_orders"), pair.held("rs_countries"), pair.held("rs_tags")
    with (
        pair.sharded.begin() as session,
        pytest.raises(UnsupportedQueryError) as caught,
    ):
        session.execute(text(sql))
    message = str(caught.value)
    assert "rs_" in message
    if "rs_countries" not in sql:
        assert "shard_key=…" in message
        assert "shard='…'" in message
    after = pair.held("rs_orders"), pair.held("rs_countries"), pair.held("rs_tags")
    assert before == after


def test_a_refused_text_runs_where_it_is_told_to(pair: Pair) -> None:
    with pair.sharded() as session:
        counts = {
            shard: session.scalar(
                text("SELECT count(*) FROM rs_orders"),
                execution_options={"shard": shard},
            )
            for shard in pair.servers
        }
    rows = pair.servers.where("SELECT id FROM rs_orders")
    assert counts == {shard: len(rows.get(shard, ())) for shard in pair.servers}


def test_reference_and_home_tables(pair: Pair) -> None:
    assert pair.check("SELECT * FROM rs_countries WHERE code <> :c", {"c": "x"})
    assert pair.check("SELECT count(*) FROM public.rs_countries") == "route"
    assert pair.check("SELECT body FROM rs_notes WHERE body LIKE 'rs_orders%'")
    assert pair.check("SELECT c.code, n.id FROM rs_countries c, rs_notes n") == "route"
    for broken in (
        "SELECT nothing FROM rs_notes WHERE body = 'rs_orders'",
        "SELECT no_function(1)",
        "SELECT * FROM no_table -- rs_orders",
    ):
        assert pair.check(broken) == "route"


def test_a_view_over_a_sharded_table_is_refused(pair: Pair) -> None:
    pair.servers.run("CREATE OR REPLACE VIEW rs_view AS SELECT * FROM rs_orders")
    try:
        with pair.servers.local.cluster() as other, other.sessionmaker()() as session:
            session.scalars(select(Order)).all()
            statement = text("SELECT * FROM rs_view WHERE customer_id = 1")
            with pytest.raises(UnsupportedQueryError, match="rs_view"):
                session.execute(statement)
    finally:
        pair.servers.run("DROP VIEW rs_view")


def test_a_process_that_has_seen_no_model(pair: Pair) -> None:
    statement = text("SELECT count(*) FROM rs_orders WHERE customer_id = 1")
    with pair.servers.local.cluster() as other, other.sessionmaker()() as session:
        with pytest.raises(UnsupportedQueryError, match="no declaration"):
            session.scalar(statement)
        session.scalars(select(Tag)).all()
        with pair.plain() as plain:
            assert session.scalar(statement) == plain.scalar(statement)


# -- the ORM -------------------------------------------------------------------------


def test_entities_from_a_text(pair: Pair) -> None:
    sql = text("SELECT * FROM rs_orders WHERE customer_id = :c ORDER BY id")
    for key in KEYS:
        found = []
        for maker in (pair.plain, pair.sharded):
            with maker() as session:
                orders = session.scalars(
                    select(Order)
                    .from_statement(sql)
                    .options(selectinload(Order.lines)),
                    {"c": key},
                ).all()
                found.append([(o.id, o.v, [x.no for x in o.lines]) for o in orders])
        assert found[0] == found[1]


def test_entities_from_all_shards(pair: Pair) -> None:
    sql = text("SELECT id, customer_id, v FROM rs_orders WHERE v > 1")
    statement = select(Order).from_statement(
        sql.columns(Order.id, Order.customer_id, Order.v)
    )
    found = []
    for maker in (pair.plain, pair.sharded):
        with maker() as session:
            orders = session.scalars(statement).all()
            found.append(sorted((o.id, o.customer_id, o.v) for o in orders))
    assert found[0] == found[1]
    assert found[0]


def test_typed_columns(pair: Pair) -> None:
    sql = text("SELECT v, customer_id FROM rs_orders WHERE customer_id = :c").columns(
        v=sa.String, customer_id=BigInteger
    )
    for key in KEYS:
        assert pair.check(sql.bindparams(c=key)) == "route"


async def test_async_sessions(pair: Pair) -> None:
    sql = text("SELECT id, v FROM rs_orders WHERE customer_id = :c ORDER BY id")
    async with (
        pair.servers.local.cluster() as cluster,
        cluster.async_sessionmaker()() as session,
    ):
        await session.scalars(select(Tag))
        for key in KEYS:
            got = (await session.execute(sql, {"c": key})).all()
            with pair.plain() as plain:
                assert got == plain.execute(sql, {"c": key}).all()
        everything = await session.execute(text("SELECT id FROM rs_orders"))
        assert len(everything.all()) == len(pair.orders)
        with pytest.raises(UnsupportedQueryError):
            await session.execute(text("SELECT count(*) FROM rs_orders"))


# -- writes --------------------------------------------------------------------------


def test_updates_and_deletes_of_one_key(pair: Pair) -> None:
    for key in KEYS:
        pair.check_write(
            "UPDATE rs_orders AS o SET v = coalesce(o.v, 0) + :n FROM rs_lines AS l"
            " WHERE o.customer_id = :c AND l.order_id = o.id"
            " AND l.customer_id = o.customer_id",
            {"c": key, "n": 10},
        )
    pair.check_write(
        "DELETE FROM rs_lines WHERE customer_id = :c AND no = 0", {"c": KEYS[0]}
    )
    id_ = pair.orders[-1][0]
    pair.check_write(
        "UPDATE rs_orders SET v = 77 WHERE id = :id RETURNING customer_id, v",
        {"id": id_},
    )


def test_inserts(pair: Pair) -> None:
    pair.check_write("INSERT INTO rs_tags (tag, v) VALUES (:t, 5)", {"t": "new"})
    pair.check_write(
        "INSERT INTO rs_tags (v, tag) VALUES (6, 'newer') RETURNING tag, v"
    )
    pair.check_write(
        "INSERT INTO rs_tags (tag, v) VALUES (:t, 5) ON CONFLICT (tag)"
        " DO UPDATE SET v = excluded.v + rs_tags.v",
        {"t": "new"},
    )
    id_, key = pair.orders[0]
    pair.check_write(
        "INSERT INTO rs_lines (order_id, no, customer_id, v)"
        " VALUES (:id, 50, :c, 1), (:id, 51, :c, NULL)",
        {"id": id_, "c": key},
    )
    pair.check_write(
        text("INSERT INTO rs_lines (order_id, no, customer_id) VALUES (:id, :no, :c)"),
        [{"id": id_, "no": no, "c": key} for no in range(60, 65)],
    )
    with pair.sharded() as session, pytest.raises(UnsupportedQueryError):
        session.execute(
            text("INSERT INTO rs_tags (tag) VALUES (:t)"),
            [{"t": f"many {n}"} for n in range(20)],
        )


def test_texts_for_two_shards_commit_as_one_transaction(pair: Pair) -> None:
    one, two = (
        "two a",
        next(
            f"two {n}"
            for n in range(99)
            if pair.cluster.shard_for(Tag, f"two {n}")
            != pair.cluster.shard_for(Tag, "two a")
        ),
    )
    sql = text("INSERT INTO rs_tags (tag) VALUES (:t)")
    with pair.sharded() as session:
        session.execute(sql, {"t": one})
        session.execute(sql, {"t": two})
        session.rollback()
        assert not {row[0] for row in pair.held("rs_tags")} & {one, two}
        session.execute(sql, {"t": one})
        session.execute(sql, {"t": two})
        session.commit()
    held = {
        t: pair.servers.where("SELECT 1 FROM rs_tags WHERE tag = %s", t)
        for t in (one, two)
    }
    assert {t: list(shards) for t, shards in held.items()} == {
        t: [pair.cluster.shard_for(Tag, t)] for t in (one, two)
    }
    with pair.plain.begin() as session:
        session.execute(sql, [{"t": one}, {"t": two}])


def test_a_row_that_a_constant_would_send_astray_is_refused_by_the_shard(
    pair: Pair,
) -> None:
    # A locator of another key's slot: routed by the key, and held to it by the CHECK.
    (id_, key), other = pair.orders[0], next(c for _, c in pair.orders if c != 1)
    assert key == 1
    sql = text("INSERT INTO rs_orders (id, customer_id) VALUES (:id, :c)")
    with (
        pair.sharded.begin() as session,
        pytest.raises(sa.exc.IntegrityError) as caught,
    ):
        session.execute(
            sql, {"id": new_locator(int(id_.int >> 64 & 0xFFF)), "c": other}
        )
    assert isinstance(caught.value.orig, psycopg.errors.CheckViolation)


# -- any text ------------------------------------------------------------------------


class Maker:
    """Makes SELECTs in plain SQL from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.number = 0

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def key(self) -> str:
        return self.pick(":a", ":a", ":a", ":b", "1", "-3", "1.0", "NULL", ":a + 0")

    def source(self, depth: int) -> tuple[str, str]:
        """Return a FROM item and its alias; it has customer_id and v."""
        self.number += 1
        alias = f"t{self.number}"
        if depth and self.rng.random() < 0.3:
            inner = self.query(depth - 1, columns=True)
            return f"({inner}) AS {alias}", alias
        table = self.pick("rs_orders", "rs_lines", "public.rs_orders", '"rs_lines"')
        return f"{table} {alias}", alias

    def criterion(self, aliases: list[str], depth: int) -> str:
        column = f"{self.rng.choice(aliases)}.customer_id"
        if self.rng.random() < 0.1:
            column = "customer_id"
        other = f"{self.rng.choice(aliases)}.customer_id"
        kind = self.rng.random()
        if kind < 0.3:
            return f"{column} = {self.key()}"
        if kind < 0.6:
            return f"{column} = {other}"
        if kind < 0.7:
            return f"{column} IN ({self.key()}, {self.key()})"
        if kind < 0.75:
            return f"NOT {column} = {self.key()}"
        if kind < 0.8:
            return f"({column} = {self.key()} OR {other} = {self.key()})"
        if kind < 0.85:
            return f"{column} = {self.key()} IS NOT TRUE"
        if kind < 0.95 and depth:
            inner, alias = self.source(depth - 1)
            word = self.pick("", "NOT ")
            return (
                f"{word}EXISTS (SELECT 1 FROM {inner} WHERE"
                f" {self.pick(alias, alias, aliases[0])}.customer_id ="
                f" {self.pick(other, self.key())})"
            )
        return f"{self.rng.choice(aliases)}.v > 1"

    def query(self, depth: int, *, columns: bool = False) -> str:
        first, alias = self.source(depth)
        sql, aliases = first, [alias]
        for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
            other, alias = self.source(depth)
            aliases.append(alias)
            join = self.pick("JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", ",", "U")
            if join == ",":
                sql = f"{sql}, {other}"
                continue
            if join == "U":
                sql = f"{sql} {self.pick('', 'LEFT', 'FULL')} JOIN {other}"
                sql += " USING (customer_id)"
                continue
            tree = aliases[-2:]
            on = f"{tree[1]}.customer_id = {tree[0]}.customer_id"
            if self.rng.random() < 0.4:
                on = " AND ".join(
                    self.criterion(tree, 0) for _ in range(self.rng.choice([1, 2]))
                )
            sql = f"{sql} {join} {other} ON {on}"
        where = [
            self.criterion(aliases, depth) for _ in range(self.rng.choice([0, 1, 1, 2]))
        ]
        if self.rng.random() < 0.5:
            pinned = self.rng.choice(aliases)
            where.append(f"{pinned}.customer_id = {self.pick(':a', ':a', ':b')}")
        listed = f"{self.rng.choice(aliases)}.customer_id, {aliases[0]}.v"
        if columns and self.rng.random() < 0.3 and len(aliases) == 1:
            listed = self.pick("*", f"{aliases[0]}.*")
        elif not columns and self.rng.random() < 0.4:
            listed = "count(*), max(customer_id)" if len(aliases) == 1 else "count(*)"
        sql = f"SELECT {listed} FROM {sql}"
        if where:
            sql += " WHERE " + " AND ".join(where)
        if listed.startswith("count") or self.rng.random() < 0.8:
            return sql
        tail = self.pick("ORDER BY 1, 2 LIMIT 3", "GROUP BY 1, 2", "UNION ALL")
        if tail == "UNION ALL":
            return f"{sql} UNION ALL {self.query(0, columns=True)}"
        return f"{sql} {tail}"

    def statement(self) -> str:
        if self.rng.random() < 0.3:
            inner = self.query(1, columns=True)
            outer = self.query(0).replace("rs_orders", "x").replace("public.x", "x")
            return f"WITH x AS ({inner}) {outer}"
        return self.query(2)


def test_random_texts(pair: Pair) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(600):
        sql = Maker(seed).statement()
        used = {
            name: value for name, value in (("a", 1), ("b", 2)) if f":{name}" in sql
        }
        outcomes[pair.check(sql, used)] += 1
    assert outcomes["route"] > 60, outcomes
    assert outcomes["scatter"] > 5, outcomes
