"""Ten million rows through ``yield_per``: how much memory, and how quickly.

The servers make the rows. Each way of reading them has a process of its own, so that
its peak of resident memory is its own too; it adds up the ids, so that a row that is
missing, or there twice, shows.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shardalchemy import Cluster, sharded_by
from shardalchemy.local import LocalCluster
from tests.bench.sales import plain

__all__ = ["main"]

CHUNK = 1_000


class Base(DeclarativeBase):
    pass


class Event(Base):
    __tablename__ = "bench_events"
    __table_args__ = {"info": sharded_by("id")}
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    amount: Mapped[int]


_OWNED = """
    SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint
    WHERE conrelid = 'bench_events'::regclass AND conname = 'shardalchemy_owner'
"""
_FILL = """
    ALTER TABLE bench_events SET UNLOGGED;
    INSERT INTO bench_events (id, amount)
    SELECT id, id % 1000 FROM generate_series(1, {rows}::bigint) AS id WHERE {owned}
"""


def fill(url: str, rows: int) -> None:
    with plain(url) as connection:
        [(owned,)] = connection.execute(_OWNED).fetchall()
        connection.execute(_FILL.format(rows=rows, owned=owned))
        connection.execute("VACUUM ANALYZE bench_events")


def stream(way: str, urls: Mapping[str, str]) -> dict[str, float]:
    """Read all events in one way; return what was read, seconds, bytes of memory."""
    kind, what = way.split(", ")
    cluster = Cluster(dict(urls))
    engine = create_engine(next(iter(urls.values())))
    make = cluster.sessionmaker() if kind == "4 shards" else lambda: Session(engine)
    found = total = 0
    with make() as session:
        warm_up(session)
        before = peak()
        start = time.perf_counter()
        if what == "columns":
            rows: Any = session.execute(
                select(Event.id, Event.amount).execution_options(yield_per=CHUNK)
            )
        else:
            rows = session.scalars(select(Event).execution_options(yield_per=CHUNK))
        for row in rows:
            found += 1
            total += row.id
        seconds = time.perf_counter() - start
    cluster.close()
    engine.dispose()
    return {
        "rows": found,
        "sum": total,
        "seconds": seconds,
        "peak": peak(),
        "growth": peak() - before,
    }


def warm_up(session: Any) -> None:
    """Open what the first statement opens, and import what it imports."""
    session.scalars(select(Event).where(Event.id == 1)).all()


def peak() -> int:
    """Return the most memory that this process has had resident, in bytes.

    Not of getrusage() where there is a choice: on Linux that counts what the parent
    had when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    [kilobytes] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


WAYS = (
    "1 shard, columns",
    "4 shards, columns",
    "1 shard, objects",
    "4 shards, objects",
)


def main(rows: int = 10_000_000) -> str:
    """Fill servers with *rows* events and stream them; return the table."""
    lines = [
        "| way | rows | rows a second | peak RSS | growth while streaming | target |",
        "|---|---:|---:|---:|---:|---|",
    ]
    with LocalCluster(4, with_redis=False) as local:
        with local.cluster() as cluster:
            cluster.create_all(Base.metadata)
        start = time.perf_counter()
        with ThreadPoolExecutor(len(local.urls)) as pool:
            list(pool.map(lambda url: fill(url, rows), local.urls.values()))
        loaded = time.perf_counter() - start
        for way in WAYS:
            found = _in_a_process(way, local.urls)
            exact = (rows, rows * (rows + 1) // 2) == (found["rows"], found["sum"])
            of_all = way.startswith("4 shards")
            wrong = " (wrong)" if of_all and not exact else ""
            lines.append(
                f"| {way}{wrong} | {found['rows']:,} |"
                f" {found['rows'] / found['seconds']:,.0f} |"
                f" {found['peak'] / 2**20:.0f} MB | {found['growth'] / 2**20:.1f} MB |"
                f" {'< 200 MB' if of_all else ''} |"
            )
    table = "\n".join(lines)
    return f"{table}\n\n{rows:,} rows were made in {loaded:.1f} s; yield_per={CHUNK}."


def _in_a_process(way: str, urls: Mapping[str, str]) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, "-m", "tests.bench.streaming", way],
        input=json.dumps(dict(urls)),
        capture_output=True,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(out.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(stream(sys.argv[1], json.load(sys.stdin))))
