"""A table of any size that each peer can be asked about: the same rows for all.

The servers make the rows, from ``generate_series``: each shard those that its own
CHECK lets in, and once more those of a hash partition, for ``postgres_fdw``. A view
that makes all of them gives the answers that are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from sqlalchemy import BigInteger, Engine, Index, Select, create_engine, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shardalchemy import Cluster, sharded_by

__all__ = ["Receipt", "Sale", "Sales"]

CATEGORIES = 100
RECEIPTS = "bench_receipts"


class Base(DeclarativeBase):
    pass


class Sale(Base):
    __tablename__ = "bench_sales"
    __table_args__ = (
        Index("bench_sales_amount_idx", "amount", "id"),
        {"info": sharded_by("id")},
    )
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    category: Mapped[int]
    amount: Mapped[int]
    weight: Mapped[int]
    name: Mapped[str]


class Receipt(Base):
    """What is inserted; nothing reads it."""

    __tablename__ = RECEIPTS
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    amount: Mapped[int]
    name: Mapped[str]


_VALUES = f"""
    id, (id % {CATEGORIES})::int AS category, (id * 7919 % 1000003)::int AS amount,
    (id * 104729 % 1000003)::int AS weight, 'sale ' || id AS name
"""
_OWNED = """
    SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint
    WHERE conrelid = 'bench_sales'::regclass AND conname = 'shardalchemy_owner'
"""
_FILL = f"""
    INSERT INTO bench_sales (id, category, amount, weight, name)
    SELECT {_VALUES} FROM generate_series(1, {{rows}}::bigint) AS id WHERE {{owned}}
"""
# Not stored: it is read for the answers that are right.
_ALL = f"""
    CREATE VIEW bench_sales AS
    SELECT {_VALUES} FROM generate_series(1, {{rows}}::bigint) AS id
"""
_COLUMNS = "id bigint, category int, amount int, weight int, name varchar"
_FILL_HASHED = f"""
    CREATE TABLE bench_hash ({_COLUMNS}) PARTITION BY HASH (id);
    CREATE TABLE bench_hashed (LIKE bench_sales INCLUDING DEFAULTS INCLUDING INDEXES);
    INSERT INTO bench_hashed (id, category, amount, weight, name)
    SELECT {_VALUES} FROM generate_series(1, {{rows}}::bigint) AS id
    WHERE satisfies_hash_partition('bench_hash'::regclass, {{count}}, {{number}}, id)
"""
# As it is best told: to aggregate and join by partition, to wait for all servers at
# once, to fetch more than 100 rows a round trip.
_FOREIGN_ROOT = f"""
    CREATE EXTENSION postgres_fdw;
    CREATE TABLE bench_sales ({_COLUMNS}) PARTITION BY HASH (id);
    ALTER DATABASE bench_fdw SET enable_partitionwise_aggregate = on;
    ALTER DATABASE bench_fdw SET enable_partitionwise_join = on
"""
_FOREIGN_SHARD = """
    CREATE SERVER {name} FOREIGN DATA WRAPPER postgres_fdw OPTIONS (
        host '{host}', port '{port}', dbname '{database}',
        async_capable 'true', fetch_size '1000'
    );
    CREATE USER MAPPING FOR CURRENT_USER SERVER {name}
        OPTIONS (user '{user}', password '{password}');
    CREATE FOREIGN TABLE bench_sales_{name} PARTITION OF bench_sales
        FOR VALUES WITH (MODULUS {count}, REMAINDER {number})
        SERVER {name} OPTIONS (table_name 'bench_hashed');
    ANALYZE bench_sales_{name}
"""


class Sales:
    """``rows`` sales on a cluster's shards, and two databases beside the first shard's.

    ``one`` has all sales as a view, and receipts as on one server; ``fdw`` has the
    sales in foreign partitions, and is None where the server has no postgres_fdw.
    """

    def __init__(self, cluster: Cluster, urls: Mapping[str, str], rows: int) -> None:
        self.rows = rows
        self._urls = urls
        cluster.create_all(Base.metadata)
        with ThreadPoolExecutor(len(urls)) as pool:
            list(pool.map(self._fill, urls, range(len(urls))))
        self.one = self._database("bench_one")
        Base.metadata.create_all(self.one, tables=[Base.metadata.tables[RECEIPTS]])
        with plain(_text(self.one)) as connection:
            connection.execute(_ALL.format(rows=rows))
        self.fdw = self._foreign_partitions()

    def _fill(self, name: str, number: int) -> None:
        with plain(self._urls[name]) as connection:
            [(owned,)] = connection.execute(_OWNED).fetchall()
            connection.execute(_FILL.format(rows=self.rows, owned=owned))
            count = len(self._urls)
            connection.execute(
                _FILL_HASHED.format(rows=self.rows, count=count, number=number)
            )
            # As autovacuum would, sooner or later and in the middle of a measurement.
            connection.execute("VACUUM ANALYZE bench_sales")
            connection.execute("VACUUM ANALYZE bench_hashed")

    def _database(self, name: str) -> Engine:
        """Create a database on the first server."""
        home = next(iter(self._urls.values()))
        with plain(home) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return create_engine(make_url(home).set(database=name))

    def _foreign_partitions(self) -> Engine | None:
        engine = self._database("bench_fdw")
        with plain(_text(engine)) as connection:
            try:
                connection.execute(_FOREIGN_ROOT)
            except psycopg.errors.FeatureNotSupported:
                engine.dispose()
                return None
            for number, (name, text) in enumerate(self._urls.items()):
                url = make_url(text)
                statement = _FOREIGN_SHARD.format(
                    name=name,
                    number=number,
                    count=len(self._urls),
                    host=url.host,
                    port=url.port,
                    database=url.database,
                    user=url.username,
                    password=url.password,
                )
                connection.execute(statement)
        return engine

    def expected(self, statement: Select[Any]) -> list[tuple[Any, ...]]:
        """Return what *statement* gives on one server with all the rows."""
        with Session(self.one) as session:
            return [tuple(row) for row in session.execute(statement)]

    def close(self) -> None:
        for engine in (self.one, self.fdw):
            if engine is not None:
                engine.dispose()


def _text(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def plain(url: str) -> psycopg.Connection:
    """Connect past SQLAlchemy, each statement committed."""
    address = make_url(url).set(drivername="postgresql")
    return psycopg.connect(
        address.render_as_string(hide_password=False), autocommit=True
    )
