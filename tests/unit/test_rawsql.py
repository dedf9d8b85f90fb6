"""What plain SQL is taken to say: routed where that is certain, else refused."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import subprocess
import sys
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    TypeDecorator,
    Uuid,
    bindparam,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import psycopg

from shardalchemy import reference_table, sharded_by
from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.ids import Locator, new_locator
from shardalchemy.planner import Analyser
from shardalchemy.planner.lexing import NotUnderstood, lexed
from shardalchemy.planner.rawsql import read
from shardalchemy.ring import KEY_TYPES
from shardalchemy.schema import Kind


class Code(TypeDecorator[int]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> str | None:
        return None if value is None else f"c{value:03}"


def declared() -> MetaData:
    metadata = MetaData()
    by_customer = sharded_by("customer_id")
    Table(
        "orders",
        metadata,
        Column("id", Uuid, primary_key=True, info={"shardalchemy": Locator()}),
        Column("customer_id", BigInteger, nullable=False),
        Column("v", Integer),
        info=by_customer,
    )
    Table(
        "lines",
        metadata,
        Column("no", Integer, primary_key=True),
        Column("customer_id", BigInteger, primary_key=True),
        Column("v", Integer),
        info=by_customer,
    )
    for name, type_ in (
        ("tags", String()),
        ("days", Date()),
        ("blobs", LargeBinary()),
        ("smalls", SmallInteger()),
        ("things", Uuid()),
        ("codes", Code(20)),
        ("Odd Name", Integer()),
    ):
        key = Column("k", type_, primary_key=True)
        Table(name, metadata, key, Column("v", String), info=sharded_by("k"))
    Table("logs", metadata, Column("k", Integer, primary_key=True), schema="audit")
    Table(
        "logs",
        metadata,
        Column("k", Integer, primary_key=True),
        schema="shop",
        info=sharded_by("k"),
    )
    code = Column("code", String, primary_key=True)
    Table("countries", metadata, code, info=reference_table())
    Table("notes", metadata, Column("id", Integer, primary_key=True))
    return metadata


METADATA = declared()
GUARDED = [
    *(f"public.{n}" for n in METADATA.tables if n != "notes" and "." not in n),
    "shop.logs",
    "public.orders_view",
]


def analyser() -> Analyser:
    made = Analyser(dict)
    made.guard(GUARDED)
    made.see(METADATA.tables.values())
    return made


ANALYSER = analyser()


def slot(key: object, family: str = "int8") -> int:
    found = KEY_TYPES[family].slot(key)
    assert found is not None
    return found


def needed(statement: Any, params: dict[str, Any] | None = None) -> Any:
    """Return the slots of a text that is routed, or what else becomes of it."""
    if isinstance(statement, str):
        statement = text(statement)
    analysis, extracted = ANALYSER.analyse(statement)
    if analysis.kind is not Kind.SHARDED:
        return analysis.kind.value
    slots = analysis.needed_slots(extracted or (), params or {})
    if slots is not None and len({*slots}) < 2:
        return slots
    return "refused" if analysis.scatter_problem else ("scattered", slots)


def refusal(statement: Any, params: dict[str, Any] | None = None) -> str:
    with pytest.raises(UnsupportedQueryError) as caught:
        needed(statement, params)
    return str(caught.value)


# -- routed --------------------------------------------------------------------------

FIVE = slot(5)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM orders WHERE customer_id = :c",
        "select count(*), max(v) from orders where :c = customer_id",
        "SELECT * FROM public.orders WHERE public.orders.customer_id = :c;",
        'SELECT * FROM "orders" AS "O" WHERE "O"."customer_id" = 5',
        "SELECT * FROM ORDERS WHERE Customer_ID = (:c)",
        "SELECT * FROM orders WHERE (v > 3 AND customer_id = :c) AND v < 9",
        "SELECT * FROM orders WHERE customer_id IN (:c)",
        "SELECT * FROM orders WHERE customer_id IN (5, :c)",
        r"SELECT * FROM orders WHERE customer_id = :c\:\:bigint",
        "SELECT * FROM orders WHERE customer_id = CAST(:c AS int)",
        "SELECT * FROM orders o JOIN lines l ON l.customer_id = o.customer_id"
        " WHERE o.customer_id = :c ORDER BY o.v DESC NULLS LAST LIMIT 3 OFFSET 1",
        "SELECT * FROM orders JOIN lines USING (customer_id) WHERE customer_id = :c",
        "SELECT * FROM orders o LEFT JOIN lines l ON l.customer_id = o.customer_id"
        " AND l.v = o.v WHERE o.customer_id = :c",
        "SELECT * FROM lines l RIGHT JOIN orders o ON l.customer_id = o.customer_id"
        " WHERE o.customer_id = :c",
        "SELECT * FROM orders o, lines l WHERE o.customer_id = l.customer_id"
        " AND l.customer_id = 5",
        "SELECT * FROM orders o LEFT JOIN (lines l JOIN lines m ON"
        " l.customer_id = m.customer_id) ON l.customer_id = o.customer_id"
        " WHERE o.customer_id = 5",
        "SELECT * FROM orders o, countries c WHERE o.customer_id = 5",
        "WITH o AS (SELECT * FROM orders WHERE customer_id = :c) SELECT * FROM o",
        "WITH o AS (SELECT * FROM orders) SELECT sum(v) FROM o WHERE customer_id = :c",
        "WITH o AS (SELECT customer_id AS k FROM orders WHERE customer_id = :c),"
        " l AS (SELECT lines.* FROM lines JOIN o ON o.k = lines.customer_id)"
        " SELECT count(*) FROM l",
        "WITH orders AS (SELECT * FROM orders WHERE customer_id = 5)"
        " SELECT * FROM orders, orders AS more",
        "SELECT * FROM (SELECT customer_id c, v FROM orders) z WHERE z.c = :c",
        "SELECT (SELECT max(v) FROM lines l WHERE l.customer_id = o.customer_id)"
        " FROM orders o WHERE o.customer_id = :c",
        "SELECT v FROM orders WHERE customer_id = 5 AND EXISTS (SELECT 1 FROM lines"
        " WHERE lines.customer_id = 5 AND lines.v = orders.v)",
        "SELECT v FROM orders WHERE customer_id = :c UNION ALL"
        " SELECT v FROM lines WHERE customer_id = :c ORDER BY 1 LIMIT 3",
        "SELECT v, count(*) FILTER (WHERE v > 1), string_agg(v::text, ',' ORDER BY v),"
        " row_number() OVER (PARTITION BY v ORDER BY max(v)) FROM orders"
        " WHERE customer_id = :c GROUP BY v HAVING count(*) > 1",
        "SELECT DISTINCT ON (v) v, now(), CASE WHEN v IS NOT NULL THEN 1 END,"
        " extract(year FROM now()), v BETWEEN 1 AND 2, NOT v = 3"
        " FROM orders WHERE customer_id = :c FOR UPDATE OF orders SKIP LOCKED",
        "/* orders /* nested */ */ SELECT v -- FROM lines\nFROM orders"
        " WHERE customer_id = :c",
        "UPDATE orders SET v = v + 1 WHERE customer_id = :c RETURNING id, v",
        "UPDATE orders AS o SET v = l.v FROM lines AS l WHERE o.customer_id = :c"
        " AND l.customer_id = o.customer_id",
        "DELETE FROM orders WHERE customer_id = :c AND v IS NULL RETURNING *",
        "DELETE FROM orders o USING lines l WHERE l.customer_id = o.customer_id"
        " AND l.customer_id = :c",
        "INSERT INTO lines (no, customer_id, v) VALUES (1, :c, DEFAULT)",
        "INSERT INTO lines (customer_id, no) VALUES (:c, 1), (5, 2) RETURNING no",
        "INSERT INTO lines (customer_id, no, v) VALUES (:c, 1, 2)"
        " ON CONFLICT (no, customer_id) DO UPDATE SET v = excluded.v + lines.v",
        "INSERT INTO lines (no, customer_id) VALUES (1, :c) ON CONFLICT DO NOTHING",
    ],
)
def test_a_text_with_every_table_pinned_goes_to_one_slot(sql: str) -> None:
    assert needed(sql, {"c": 5}) == {FIVE}


def test_parameters_from_wherever_they_come() -> None:
    sql = text("SELECT * FROM orders WHERE customer_id = :c")
    assert needed(sql.bindparams(c=5)) == {FIVE}
    assert needed(sql.bindparams(c=5), {"c": 6}) == {slot(6)}
    assert needed(sql.bindparams(bindparam("c", type_=BigInteger)), {"c": 5}) == {FIVE}
    assert needed(sql.columns(Column("id", Uuid)), {"c": 5, "unused": 1}) == {FIVE}
    many = text("SELECT * FROM orders WHERE customer_id IN :c AND v > 1").bindparams(
        bindparam("c", expanding=True)
    )
    assert needed(many, {"c": [5, 5, None]}) == {FIVE}
    assert needed(many, {"c": []}) == set()
    assert needed(many, {"c": [5, 6]}) == ("scattered", {FIVE, slot(6)})


def test_one_text_with_other_values() -> None:
    for key in range(40):
        statement = text("SELECT * FROM lines WHERE customer_id = :c").bindparams(c=key)
        assert needed(statement) == {slot(key)}


def test_a_missing_parameter_is_left_to_sqlalchemy() -> None:
    assert needed("SELECT * FROM orders WHERE customer_id = :c") == set()


def test_nothing_equals_null() -> None:
    sql = "SELECT count(*) FROM orders WHERE customer_id = :c"
    assert needed(sql, {"c": None}) == set()


class Level(enum.IntEnum):
    FIVE = 5


KEY = uuid.uuid5(uuid.NAMESPACE_DNS, "a")


@pytest.mark.parametrize(
    ("table", "value", "expected"),
    [
        ("lines", 5, FIVE),
        ("lines", 5.0, None),
        ("lines", decimal.Decimal(5), None),
        ("lines", "5", None),
        ("lines", True, None),
        ("lines", Level.FIVE, None),
        ("lines", 2**63, None),
        ("smalls", 5, FIVE),
        ("tags", "a", slot("a", "text")),
        ("tags", "", slot("", "text")),
        ("tags", 5, None),
        ("days", datetime.date(2024, 1, 2), slot(datetime.date(2024, 1, 2), "date")),
        ("days", datetime.datetime(2024, 1, 2), None),
        ("days", "2024-01-02", None),
        ("blobs", b"a", slot(b"a", "bytea")),
        ("blobs", "a", None),
        ("things", KEY, slot(KEY, "uuid")),
        ("things", str(KEY), slot(KEY, "uuid")),
        ("things", "nothing", None),
        ("codes", "c005", slot("c005", "text")),
        ("codes", 5, None),
    ],
)
def test_a_value_pins_where_postgresql_compares_it_as_a_key(
    table: str, value: object, expected: int | None
) -> None:
    column = "customer_id" if table == "lines" else "k"
    sql = f"SELECT max(v) FROM {table} WHERE {column} = :x"
    outcome = needed(sql, {"x": value})
    assert outcome == ("refused" if expected is None else {expected})


def test_a_parameter_with_a_type_of_the_key() -> None:
    sql = text("SELECT max(v) FROM codes WHERE k = :x")
    typed = sql.bindparams(bindparam("x", type_=Code(20)))
    assert needed(typed, {"x": 5}) == {slot("c005", "text")}
    as_text = sql.bindparams(bindparam("x", type_=String))
    assert needed(as_text, {"x": "c005"}) == "refused"


def test_a_locator_pins() -> None:
    key = new_locator(1234)
    assert needed("SELECT max(v) FROM orders WHERE id = :x", {"x": key}) == {1234}
    assert needed(f"SELECT max(v) FROM orders WHERE id = '{key}'") == {1234}
    assert needed(f"SELECT max(v) FROM orders WHERE id = '{key}'::uuid") == {1234}


@pytest.mark.parametrize(
    ("sql", "key"),
    [
        ("k = 'it''s'", "it's"),
        ("k = $$it's$$", "it's"),
        ("k = $t$ $$ '$t$", " $$ '"),
        ("k = '100% ä'", "100% ä"),
        ("k = 'orders; -- DROP'::text", "orders; -- DROP"),
    ],
)
def test_constants(sql: str, key: str) -> None:
    assert needed(f"SELECT max(v) FROM tags WHERE {sql}") == {slot(key, "text")}


@pytest.mark.parametrize(
    "criterion",
    [
        r"k = E'\x61'",
        r"k = 'a\b'",
        "k = 'abc'::varchar(2)",
        "k = lower('a')",
        "k = 'a' || 'b'",
        "k = 'a' COLLATE \"C\"",
        "k LIKE 'a'",
        "k >= 'a'",
        "k <> 'a'",
        "NOT k = 'a'",
        "k = 'a' OR v = 'b'",
        "(k = 'a') IS NOT TRUE",
        "k = 'a' IS NOT TRUE",
        "lower(k) = 'a'",
        "k COLLATE \"C\" = 'a'",
        "k NOT IN ('a')",
        "k = ANY ('{a}')",
        "(k, v) = ('a', 'b')",
        "CASE WHEN k = 'a' THEN true END",
        "v = 'x' AND v = :x AND k = :x",
    ],
)
def test_what_pins_nothing(criterion: str) -> None:
    sql = f"SELECT max(v) FROM tags WHERE {criterion}"
    assert needed(sql, {"x": "a"}) == "refused"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM orders o JOIN lines l ON l.v = o.v WHERE o.customer_id = 5",
        "SELECT * FROM orders o FULL JOIN lines l ON l.customer_id = o.customer_id"
        " AND o.customer_id = 5",
        "SELECT * FROM orders o LEFT JOIN lines l ON o.customer_id = 5"
        " AND l.customer_id = 5",
        "SELECT * FROM orders o LEFT JOIN lines l ON l.customer_id = o.customer_id"
        " WHERE l.customer_id = 5",
        "SELECT * FROM lines l, orders o LEFT JOIN lines m ON m.customer_id = 5"
        " WHERE o.customer_id = 5",
        "SELECT * FROM orders WHERE customer_id = 5 UNION SELECT * FROM orders",
        "WITH o AS (SELECT * FROM orders) SELECT * FROM o a, o b"
        " WHERE a.customer_id = 5 AND b.customer_id = 5",
        "WITH o AS (SELECT * FROM orders LIMIT 3) SELECT * FROM o"
        " WHERE customer_id = 5",
        "SELECT * FROM (SELECT customer_id, count(*) FROM orders GROUP BY 1) z"
        " WHERE customer_id = 5",
        "SELECT * FROM (SELECT v AS customer_id FROM orders) z WHERE customer_id = 5",
        "SELECT * FROM (SELECT customer_id, rank() OVER (ORDER BY v) FROM orders) z"
        " WHERE customer_id = 5",
        "SELECT *, (SELECT count(*) FROM lines) FROM orders WHERE customer_id = 5",
        # An unqualified name in a subquery may be of a column that is not declared.
        "SELECT * FROM orders WHERE customer_id = 5 AND EXISTS"
        " (SELECT 1 FROM lines WHERE lines.v = customer_id)",
        # A criterion within a subquery filters no rows around it.
        "SELECT v FROM orders o WHERE NOT EXISTS (SELECT 1 FROM lines l WHERE"
        " l.customer_id = o.customer_id AND l.customer_id = 5)",
        "SELECT v FROM orders o WHERE NOT EXISTS"
        " (SELECT 1 FROM lines l WHERE l.customer_id = 5 AND o.customer_id = 5)",
        "SELECT v, EXISTS (SELECT 1 FROM lines l WHERE l.customer_id = 5"
        " AND o.customer_id = l.customer_id) FROM orders o",
        "UPDATE orders SET v = 1",
        "UPDATE orders SET v = (SELECT max(v) FROM lines) WHERE customer_id = 5",
        "DELETE FROM orders USING lines WHERE orders.customer_id = 5",
        "INSERT INTO lines (no, customer_id) VALUES (1, 5), (2, 6)",
        "INSERT INTO lines (no, customer_id, v)"
        " VALUES (1, 5, (SELECT max(v) FROM orders))",
    ],
)
def test_a_table_that_is_not_pinned_makes_it_refused(sql: str) -> None:
    assert needed(sql) == "refused"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM orders",
        "SELECT id, v + 1 AS w, coalesce(lower(v::text), 'x') FROM orders WHERE v > 3",
        "SELECT * FROM orders WHERE v IN (1, 2) OR customer_id = 5",
    ],
)
def test_a_plain_select_of_one_table_is_scattered(sql: str) -> None:
    assert needed(sql) == ("scattered", None)


@pytest.mark.parametrize(
    "tail",
    [
        "ORDER BY v",
        "LIMIT 1",
        "WHERE random() < 0.5",
        "WHERE v = (SELECT 1)",
        "FOR UPDATE",
        "GROUP BY id",
        "WHERE ts < current_timestamp",
    ],
)
def test_a_select_that_is_not_plain_is_not_scattered(tail: str) -> None:
    assert needed(f"SELECT id FROM orders {tail}") == "refused"


# -- home and reference tables -------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 'orders'",
        "SELECT body AS orders FROM notes WHERE body = 'orders' -- of orders",
        "WITH orders AS (SELECT * FROM notes) SELECT count(*) FROM orders",
        "INSERT INTO notes (orders) VALUES ('lines')",
        "INSERT INTO rank (orders) VALUES (count('lines'))",
        "UPDATE notes SET body = $$orders$$ WHERE id = 1",
        "DELETE FROM notes WHERE body = 'countries'",
        'SELECT * FROM "Orders"',
        "SELECT * FROM audit.logs",
        "SELECT relname FROM pg_catalog.pg_class WHERE relname = 'orders'",
        "SELECT body FROM notes, countries",
        "INSERT INTO notes (body) SELECT code FROM countries",
    ],
)
def test_no_sharded_table_is_named_after_all(sql: str) -> None:
    assert needed(sql) == "home"


def test_a_word_in_a_comment_alone_lets_anything_through() -> None:
    assert needed("VACUUM notes -- not orders") == "home"
    assert needed("DO /* orders */ $$ BEGIN END $$") == "home"


def test_reference_tables() -> None:
    assert needed("SELECT * FROM countries WHERE code = :c") == "reference"
    assert needed("SELECT count(*) FROM public.countries c") == "reference"
    locking, _ = ANALYSER.analyse(text("SELECT * FROM countries FOR UPDATE"))
    assert locking.locks_copies


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE countries SET code = 'x'",
        "DELETE FROM countries",
        "INSERT INTO countries (code) VALUES ('x')",
    ],
)
def test_a_write_of_a_reference_table(sql: str) -> None:
    assert "countries" in refusal(sql)


# -- refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "TABLE orders",
        "VALUES ((SELECT count(*) FROM orders))",
        "TRUNCATE orders",
        "COPY orders TO STDOUT",
        "EXPLAIN SELECT * FROM orders",
        "EXPLAIN ANALYZE DELETE FROM orders WHERE customer_id = 5",
        "CREATE TABLE x AS SELECT * FROM orders WHERE customer_id = 5",
        "CREATE VIEW x AS SELECT * FROM orders",
        "ALTER TABLE orders ADD COLUMN x int",
        "DROP TABLE orders",
        "LOCK TABLE orders",
        "ANALYZE orders",
        "LISTEN orders",
        "SET search_path = orders",
        "PREPARE x AS SELECT * FROM orders",
        "EXECUTE orders",
        "DO $$ BEGIN DELETE FROM orders WHERE customer_id = 5; END $$",
        "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql"
        " AS 'SELECT count(*) FROM orders'",
        "MERGE INTO orders USING lines ON true WHEN MATCHED THEN DELETE",
        "DECLARE c CURSOR FOR SELECT * FROM orders",
        "SELECT * INTO x FROM orders WHERE customer_id = 5",
        "SELECT * FROM orders WHERE customer_id = 5; DELETE FROM orders",
        "SELECT 1; SELECT * FROM orders",
        "WITH d AS (DELETE FROM orders WHERE customer_id = 5 RETURNING *)"
        " SELECT * FROM d",
        "WITH RECURSIVE o AS (SELECT * FROM orders WHERE customer_id = 5)"
        " SELECT * FROM o",
        "SELECT * FROM orders TABLESAMPLE system (5) WHERE customer_id = 5",
        "SELECT * FROM orders AS o (customer_id, id, v) WHERE customer_id = 5",
        "SELECT * FROM orders NATURAL JOIN lines WHERE customer_id = 5",
        "SELECT * FROM orders o, LATERAL (SELECT 1) x WHERE customer_id = 5",
        "SELECT * FROM orders, generate_series(1, 3) WHERE customer_id = 5",
        "SELECT total(id) FROM orders WHERE customer_id = 5",
        "SELECT shardalchemy_lower(v) FROM orders WHERE customer_id = 5",
        "SELECT date_add(v, 1) FROM orders WHERE customer_id = 5",
        "SELECT s.lower(v) FROM orders WHERE customer_id = 5",
        'SELECT "LOWER"(v) FROM orders WHERE customer_id = 5',
        "SELECT query_to_xml('SELECT * FROM orders', true, true, '')",
        "SELECT 'orders'::regclass",
        "SELECT 'orders'::mytype",
        "SELECT pg_relation_size('orders')",
        "SELECT nextval('orders') FROM notes",
        "SELECT * FROM orders WHERE customer_id OPERATOR(pg_catalog.=) 5",
        "SELECT * FROM orders WHERE customer_id = 5 AND v @@@ 3",
        "SELECT * FROM orders WHERE CURRENT OF c",
        r'SELECT * FROM U&"ord\0065rs"',
        "SELECT U&'x' FROM orders WHERE customer_id = 5",
        "SELECT 'a' \n 'b' FROM orders WHERE customer_id = 5",
        "SELECT 'a\\' FROM orders WHERE customer_id = 5 --'",
        "SELECT * FROM orders WHERE customer_id = 5 /* open",
        "SELECT * FROM orders WHERE customer_id = 5\u00a0OR true",
        "SELECT * FROM orders WHERE customer_id = 5x",
        "SELECT * FROM orders WHERE v[1:2] = 3 AND customer_id = 5",
        "SELECT ':c' FROM orders WHERE customer_id = 5",
        "SELECT x'1F' FROM orders WHERE customer_id = 5",
        f"SELECT {'x' * 64} FROM orders WHERE customer_id = 5",
        "INSERT INTO lines VALUES (1, 5, 3)",
        "INSERT INTO lines (no, customer_id) SELECT no, 5 FROM lines"
        " WHERE customer_id = 5",
        "INSERT INTO lines (no) VALUES (1)",
        "INSERT INTO lines (no, customer_id) VALUES (1, 2 + 3)",
        "INSERT INTO lines (no, customer_id) VALUES (1, DEFAULT)",
        "INSERT INTO lines DEFAULT VALUES",
        "INSERT INTO lines (no, customer_id) VALUES (1, 5)"
        " ON CONFLICT (no, customer_id) DO UPDATE SET customer_id = 6",
        "UPDATE lines SET customer_id = 6 WHERE customer_id = 5",
        "UPDATE orders SET id = gen_random_uuid() WHERE customer_id = 5",
        "UPDATE lines SET (customer_id, v) = (6, 1) WHERE customer_id = 5",
        "SELECT * FROM orders, notes WHERE customer_id = 5",
        "SELECT * FROM orders WHERE customer_id = 5 AND v IN (SELECT id FROM notes)",
        "INSERT INTO notes (id) SELECT v FROM orders WHERE customer_id = 5",
        "SELECT * FROM orders, countries WHERE customer_id = 5 FOR UPDATE",
        "SELECT * FROM orders_view WHERE customer_id = 5",
        "SELECT * FROM public.orders_view WHERE customer_id = 5",
        "SELECT * FROM logs WHERE k = 5",
        "SELECT * FROM other.orders WHERE customer_id = 5",
        "nonsense about orders",
        "SELECT FROM WHERE orders",
        f"SELECT {'(' * 3000}1{')' * 3000} FROM orders",
    ],
)
def test_what_is_not_certain_is_refused(sql: str) -> None:
    refusal(sql, {"c": 5})


def test_the_refusal_names_the_tables_and_the_ways_out() -> None:
    message = refusal("TRUNCATE orders, lines")
    for part in ("orders", "lines", "TRUNCATE", "shard_key=…", "shard='…'"):
        assert part in message


def test_a_qualified_name() -> None:
    assert needed("SELECT max(k) FROM shop.logs WHERE k = 5") == {FIVE}
    assert needed('SELECT max(k) FROM "Odd Name" WHERE k = 5') == {FIVE}


def test_a_table_without_a_declaration_in_this_process() -> None:
    bare = Analyser(dict)
    bare.guard(GUARDED)
    statement = text("SELECT * FROM orders WHERE customer_id = 5")
    with pytest.raises(UnsupportedQueryError, match="no declaration"):
        bare.analyse(statement)
    bare.analyse(select(METADATA.tables["lines"]))  # of the same MetaData
    assert bare.analyse(statement)[0].kind is Kind.SHARDED


def test_a_table_that_is_declared_in_two_ways() -> None:
    twice = analyser()
    other = MetaData()
    Table(
        "orders",
        other,
        Column("id", Integer, primary_key=True),
        info=sharded_by("id"),
    )
    statement = text("SELECT * FROM orders WHERE customer_id = 5")
    assert twice.analyse(statement)[0].kind is Kind.SHARDED
    twice.see(other.tables.values())
    with pytest.raises(UnsupportedQueryError, match="two ways"):
        twice.analyse(statement)


# -- how it reads --------------------------------------------------------------------


def compiled(sql: str) -> str:
    return str(text(sql).compile(dialect=psycopg.dialect()))


def test_a_text_is_read_once() -> None:
    sql = compiled("SELECT * FROM orders WHERE customer_id = :c AND v = 77")
    before = read.cache_info().misses
    assert read(sql) is read(sql)
    assert read.cache_info().misses == before + 1


def test_the_parser_is_imported_for_a_sharded_table_only() -> None:
    program = """
import sys
from sqlalchemy import text
from shardalchemy.planner import Analyser
analyser = Analyser(dict)
analyser.guard(["public.orders"])
analyser.analyse(text("SELECT * FROM notes"))
print("sqlglot" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("sql", "plain"),
    [
        ("a=-5", "a = - 5"),
        ("a<-5", "a < - 5"),
        ("a--b\n+c", "a + c"),
        ("a*/*x*/b", "a * b"),
        ("a||'x'", "a || 's0'"),
        ("$a$ $$ $a$x", "'s0' x"),
        ("E'\\'' || e''", "'s0' || 's1'"),
        ('"a""b".c', '"a""b" . c'),
        ("a::b%%2", "a :: b % 2"),
        ("%(p)s+%(q)s", "$1 + $2"),
        ("in (__[POSTCOMPILE_p])", "in ( $1 )"),
        ("Min(a), f(a), in (b)", "shardalchemy_Min ( a ) , f ( a ) , in ( b )"),
        ("1.5e3,.5", "1.5e3 , .5"),
    ],
)
def test_tokens_are_cut_as_postgresql_cuts_them(sql: str, plain: str) -> None:
    assert lexed(sql).sql == plain


@pytest.mark.parametrize(
    "sql", ["a@-5", "a!=-5", "a ? b", "'open", '"open', "$x$ open", "a\x01", "a :b"]
)
def test_tokens_in_doubt(sql: str) -> None:
    with pytest.raises(NotUnderstood):
        lexed(sql)


PIECES = st.sampled_from(
    r"""
    select from where and or not in is null true ( ) , . ; = <> - -- /* */ ' " $$ $a$ E'
    U&" :: : :c orders lines notes countries customer_id v k o l * 5 '5' "orders" public
    join left using on union all with as exists count( lower( values insert into update
    set delete returning for order by group limit case when then end between like
    """.split()  # noqa: SIM905
)


@given(st.lists(PIECES, max_size=25))
def test_any_pieces_are_understood_or_refused(pieces: list[str]) -> None:
    sql = " ".join(["select * from orders", *pieces])
    with contextlib.suppress(UnsupportedQueryError):
        needed(sql, {"c": 5})


QUOTES = st.sampled_from(
    [
        "/* {} */",
        "/* /* {} */ ' */",
        "-- {}\n",
        "'{}' = 'x' AND",
        "'''{}' = 'x' AND",
        "E'\\'{}' = 'x' AND",
        "$$ {} $$ = 'x' AND",
        "$t$ $$ {} ' $t$ = 'x' AND",
        "/**/ --{}'\n",
    ]
)


@given(st.lists(st.tuples(QUOTES, st.sampled_from(["OR true", "lines", "; '", "$$"]))))
def test_what_is_quoted_or_a_comment_changes_nothing(
    noise: list[tuple[str, str]],
) -> None:
    words = " ".join(
        quote.format(word.replace("'", "") if "'" in quote else word)
        for quote, word in noise
        if not ("$$" in quote and "$$" in word) and not ("$t$" in quote and "$" in word)
    )
    sql = f"SELECT max(v) FROM orders WHERE {words} customer_id = 5"
    assert needed(sql) == {FIVE}
