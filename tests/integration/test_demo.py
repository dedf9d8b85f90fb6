"""``shardalchemy demo`` on real servers: what it shows, and that it finds damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from shardalchemy import Cluster
from shardalchemy.cli import demo, main
from shardalchemy.cli.audit import Audit, audit
from shardalchemy.cli.load import fill
from shardalchemy.cli.sale import Sale, hold
from shardalchemy.cli.shop import ShopSize, models
from shardalchemy.cli.tally import Tally
from shardalchemy.local import LocalCluster

SMALL = (
    *("--customers", "300", "--products", "50", "--seconds", "3"),
    *("--buyers", "8", "--processes", "2"),
)
DEMO = (sys.executable, "-W", "error", "-m", "shardalchemy.cli", "demo", *SMALL)


def plain(url: str) -> psycopg.Connection:
    """Connect to one server behind the library's back, each statement committed."""
    address = make_url(url).set(drivername="postgresql")
    return psycopg.connect(
        address.render_as_string(hide_password=False), autocommit=True
    )


def count(url: str, table: str) -> int:
    with plain(url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return row[0] if row else 0


@pytest.fixture
def kept() -> Iterator[Path]:
    """A new directory that the servers' user can reach; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name) / "kept"


def running(directory: Path) -> list[Path]:
    return list(directory.glob("servers/*/data/postmaster.pid"))


@pytest.mark.parametrize("ack", ["committed", "prepared"])
def test_it_runs_as_advertised(ack: str) -> None:
    done = subprocess.run(
        [*DEMO, "--ack", ack], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    verdicts = [line.split()[0] for line in lines if line.startswith(("ok ", "FAIL"))]
    assert verdicts == ["ok"] * 13
    assert "350 of 350 customers and products" in done.stdout
    (customers,) = (line.split() for line in lines if line.startswith("customers "))
    assert sum(map(int, customers[1:-1])) == int(customers[-1]) == 300
    assert lines[-1] == "Sound: every invariant holds."


def test_an_interrupt_stops_everything_and_says_so(kept: Path) -> None:
    with subprocess.Popen(
        [*DEMO, "--seconds", "60", "--keep", str(kept)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Starting")
        assert process.stdout.readline().startswith("Filling")
        assert running(kept)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, complaints = process.communicate(timeout=30)
    assert process.returncode == 130
    assert complaints == "\nInterrupted; the servers are stopped.\n"
    assert not running(kept)


def test_damage_is_shown_and_fails_and_can_be_looked_at(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hold_and_lose(sale: Sale, progress: Callable[[int, int], object]) -> Tally:
        tally = hold(sale, progress)
        with plain(sale.urls["s1"]) as connection:
            assert connection.execute("DELETE FROM payments").rowcount > 0
        return tally

    monkeypatch.setattr(demo, "hold", hold_and_lose)
    with pytest.raises(SystemExit) as caught:
        main(["demo", *SMALL, "--shards", "2", "--keep", str(kept)])
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert "FAIL  Orders match their lines and payments" in output
    assert "NOT SOUND" in output
    assert not running(kept)
    with LocalCluster(directory=kept, with_redis=False) as servers:
        payments = {name: count(url, "payments") for name, url in servers.urls.items()}
    assert payments.keys() == {"s1", "s2"}
    assert payments["s1"] == 0 < payments["s2"]


def test_an_unexpected_error_is_shown_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hold_and_err(sale: Sale, progress: Callable[[int, int], object]) -> Tally:
        tally = hold(sale, progress)
        tally.errors["ValueError: unheard of"] += 1
        return tally

    monkeypatch.setattr(demo, "hold", hold_and_err)
    with pytest.raises(SystemExit) as caught:
        main(["demo", *SMALL, "--shards", "1", "--seconds", "1"])
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert "1 x error: ValueError: unheard of" in output
    assert "FAIL" not in output.replace("see FAIL", "")


# --- the audit -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sold(
    shard_servers: LocalCluster,
) -> Iterator[tuple[Mapping[str, str], Cluster, Tally]]:
    """A shop in databases of its own, after a short sale."""
    urls = {}
    for name, url in shard_servers.urls.items():
        with plain(url) as connection:
            connection.execute("CREATE DATABASE demo")
        urls[name] = make_url(url).set(database="demo").render_as_string(False)
    size = ShopSize(customers=40, products=20, hot=2, pieces=1, seed=1)
    with Cluster(urls) as cluster:
        cluster.create_all(models.Base.metadata)
        assert sum(fill(cluster, urls, size)) == 60
        sale = Sale(
            urls=urls,
            redis=shard_servers.redis_url,
            size=size,
            seconds=2,
            buyers=4,
            processes=2,
            ack="committed",
        )
        opened: list[Any] = []
        tally = hold(sale, lambda *more: opened.append(more))
        assert opened[0] == (0, 0)
        assert sum(orders for orders, _ in opened) == len(tally.orders)
        yield urls, cluster, tally
    for url in shard_servers.urls.values():
        with plain(url) as connection:
            connection.execute("DROP DATABASE demo WITH (FORCE)")


@pytest.fixture
def look(sold: tuple[Mapping[str, str], Cluster, Tally]) -> Callable[[], Audit]:
    urls, cluster, tally = sold
    return lambda: audit(urls, cluster.topology, tally)


def failing(found: Audit) -> set[str]:
    return {check.name for check in found.checks if not check.ok}


def test_a_sale_leaves_a_sound_shop_and_sells_out(
    look: Callable[[], Audit], sold: tuple[Mapping[str, str], Cluster, Tally]
) -> None:
    found, (_, _, tally) = look(), sold
    assert failing(found) == set()
    assert found.sound
    assert tally.errors == {}
    assert tally.refusals["sold out"] > 0
    assert found.hot == 2
    assert sum(found.rows["customers"].values()) == 40
    assert sum(found.rows["orders"].values()) == len(tally.orders) > 0
    assert max(tally.by_participants("place order")) > 1
    assert set(tally.by_participants("fill cart")) == {1}


def test_a_row_on_the_wrong_shard_is_found(
    look: Callable[[], Audit], sold: tuple[Mapping[str, str], Cluster, Tally]
) -> None:
    urls, cluster, _ = sold
    stray = next(
        email
        for email in (f"{n}@example.org" for n in range(1000))
        if cluster.shard_for(models.EmailClaim, email) == "s2"
    )
    with plain(urls["s1"]) as connection:
        connection.execute(
            "ALTER TABLE email_claims DROP CONSTRAINT shardalchemy_owner"
        )
        connection.execute(
            "INSERT INTO email_claims VALUES (%s, gen_random_uuid())", [stray]
        )
        try:
            assert "Every row is where the ring says" in failing(look())
        finally:
            connection.execute("DELETE FROM email_claims WHERE email = %s", [stray])


def test_an_order_that_was_acknowledged_and_is_not_there_is_found(
    look: Callable[[], Audit], sold: tuple[Mapping[str, str], Cluster, Tally]
) -> None:
    orders = sold[2].orders
    orders.append("ffffffff-0000-0000-0000-000000000000")
    try:
        assert failing(look()) == {"Orders acknowledged are orders stored"}
    finally:
        orders.pop()


def test_a_session_that_wrote_on_other_shards_than_it_said_is_found(
    look: Callable[[], Audit], sold: tuple[Mapping[str, str], Cluster, Tally]
) -> None:
    tally = sold[2]
    true = min(tally.by_participants("place order"))
    orders = tally.latencies["place order", true]
    said = tally.latencies["place order", true + 1]
    said.append(orders.pop())
    try:
        assert failing(look()) == {"Orders are on as many servers as sessions wrote on"}
    finally:
        orders.append(said.pop())
