"""``shardalchemy txns`` and ``recover`` as an operator runs them, on real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from shardalchemy.commit import Gid
from shardalchemy.local import LocalCluster
from tests.commit.accounts import Base
from tests.conftest import Servers

COMMAND = [sys.executable, "-m", "shardalchemy.cli"]
NUMBERS = {"s1": 0, "s2": 1, "s3": 2}


class Operator:
    """Runs commands against three servers, and makes what they are to find."""

    def __init__(self, local: LocalCluster, cluster: str) -> None:
        self.local = local
        self.servers = Servers(local)
        self.cluster = cluster
        self.url = local.urls["s1"].replace("+psycopg", "")
        self.password = make_url(self.url).password or "?"

    def run(self, *arguments: str, url: str | None = None) -> tuple[int, str, str]:
        """Return the exit status, the output and the errors of a command."""
        done = subprocess.run(
            [*COMMAND, *arguments, url or self.url],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert self.password not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def listed(self) -> list[dict[str, Any]]:
        status, out, err = self.run("txns", "--json")
        assert (status, err) == (0, "")
        document = json.loads(out)
        assert document["cluster"] == self.cluster
        return document["transactions"]

    def gid(self, *shards: str) -> Gid:
        numbers = tuple(NUMBERS[shard] for shard in shards)
        return Gid(self.cluster[:8], uuid.uuid4().hex, numbers)

    def prepare(self, shard: str, gid: Gid) -> None:
        """Prepare a participant of *gid*, and go."""
        marker = "INSERT INTO shardalchemy.txn (gid, outcome) VALUES (%s, 'committed')"
        with self.servers.connect(shard) as connection:
            connection.execute("BEGIN")
            connection.execute(marker, [str(gid)])
            connection.execute(
                "INSERT INTO accounts VALUES (%s, 1)", [uuid.uuid4().int % 2**60]
            )
            connection.execute(f"PREPARE TRANSACTION '{gid.on(NUMBERS[shard])}'")


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    with LocalCluster(3, with_redis=False) as local:
        with local.cluster(recover_in_background=False) as cluster:
            cluster.create_all(Base.metadata)
        servers = Servers(local)
        # The rows of these tests are of no interest, but for whether they are there.
        check = "SELECT conname FROM pg_constraint WHERE contype = 'c'"
        for shard in servers:
            for (name,) in servers.rows(
                shard, check + " AND conrelid = 'accounts'::regclass"
            ):
                with servers.connect(shard) as connection:
                    connection.execute(f'ALTER TABLE accounts DROP CONSTRAINT "{name}"')
        yield local


@pytest.fixture
def operator(local: LocalCluster) -> Iterator[Operator]:
    servers = Servers(local)
    servers.run("TRUNCATE accounts; DELETE FROM shardalchemy.txn")
    ((cluster,),) = servers.rows("s1", "SELECT cluster::text FROM shardalchemy.catalog")
    yield Operator(local, cluster)
    for shard, rows in servers.prepared().items():
        for (gid,) in rows:
            with servers.connect(shard) as connection:
                connection.execute(psycopg.sql.SQL("ROLLBACK PREPARED {}").format(gid))


def test_there_may_be_nothing(operator: Operator) -> None:
    assert operator.run("txns") == (0, "No prepared transactions.\n", "")
    assert operator.listed() == []
    assert operator.run("recover") == (0, "Nothing to recover.\n", "")


def test_what_all_have_prepared_is_committed(operator: Operator) -> None:
    gid = operator.gid("s1", "s2")
    operator.prepare("s1", gid)
    operator.prepare("s2", gid)
    (found,) = operator.listed()
    assert found["gid"] == str(gid)
    assert found["state"] == "decided"
    assert found["outcome"] == "commit"
    assert found["participants"] == {"s1": "prepared", "s2": "prepared"}
    assert 0 <= found["age"] < 30
    _, out, _ = operator.run("txns")
    assert f"{gid}  decided: commit" in out
    assert "    s2: prepared" in out
    status, out, err = operator.run("recover", "--grace", "0")
    assert (status, err) == (0, "")
    assert out == f"committed    {gid}\n"
    held = operator.servers.where("SELECT balance FROM accounts")
    assert held == {"s1": [(1,)], "s2": [(1,)]}
    assert operator.servers.prepared() == {}


def test_what_one_has_not_prepared_is_left_its_grace_and_rolled_back(
    operator: Operator,
) -> None:
    gid = operator.gid("s2", "s3")
    operator.prepare("s3", gid)
    _, out, _ = operator.run("txns", "--grace", "500")
    assert f"{gid}  prepared  " in out
    assert "    s2: not prepared" in out
    assert "waits for the grace time, 49" in out
    status, out, _ = operator.run("recover", "--grace", "500")
    assert status == 0
    assert out.startswith("1 younger than the grace time of 500 s")
    assert operator.servers.prepared() != {}
    _, out, _ = operator.run("txns", "--grace", "0")
    assert "waits for nothing: run recover" in out
    status, out, _ = operator.run("recover", "--grace", "0")
    assert (status, out) == (0, f"rolled back  {gid}\n")
    assert operator.servers.prepared() == {}
    assert operator.servers.where("SELECT 1 FROM accounts") == {}


def test_markers_and_tombstones_show_what_is_decided(operator: Operator) -> None:
    committed, rolled_back = operator.gid("s1", "s2"), operator.gid("s1", "s2")
    for gid in (committed, rolled_back):
        operator.prepare("s1", gid)
    with operator.servers.connect("s2") as connection:
        connection.execute(
            "INSERT INTO shardalchemy.txn (gid, outcome)"
            " VALUES (%s, 'committed'), (%s, 'aborted')",
            [str(committed), str(rolled_back)],
        )
    found = {t["gid"]: t for t in operator.listed()}
    assert found[str(committed)]["participants"]["s2"] == "committed"
    assert found[str(committed)]["outcome"] == "commit"
    assert found[str(rolled_back)]["participants"]["s2"] == "rolled back"
    assert found[str(rolled_back)]["outcome"] == "roll back"
    _, out, _ = operator.run("recover", "--grace", "0")
    assert sorted(out.splitlines()) == [
        f"committed    {committed}",
        f"rolled back  {rolled_back}",
    ]


def test_others_transactions_and_databases_are_left_alone(operator: Operator) -> None:
    url = make_url(operator.url)
    with operator.servers.connect("s1") as connection:
        connection.execute("CREATE DATABASE beside")
    foreign = "someone's \x1b[31m"
    near = f"sa1:{operator.cluster[:8]}:not one of ours"
    ours = f"{operator.gid('s1', 's2').on(0)}"
    elsewhere = url.set(database="beside").render_as_string(hide_password=False)
    try:
        for target, gid in (
            (operator.url, foreign),
            (operator.url, near),
            (elsewhere, ours),
        ):
            with psycopg.connect(target) as connection:
                connection.execute("SELECT pg_current_xact_id()")
                literal = psycopg.sql.Literal(gid)
                connection.execute(
                    psycopg.sql.SQL("PREPARE TRANSACTION {}").format(literal)
                )
        found = {t["gid"]: t for t in operator.listed()}
        assert set(found) == {foreign, near}
        assert {t["state"] for t in found.values()} == {"foreign"}
        _, out, _ = operator.run("txns")
        assert "\x1b" not in out
        assert r"someone's \x1b[31m  foreign" in out
        assert "recovery leaves it alone" in out
        assert operator.run("recover", "--grace", "0")[:2] == (
            0,
            "Nothing to recover.\n",
        )
        left = operator.servers.rows("s1", "SELECT gid FROM pg_prepared_xacts")
        assert {gid for (gid,) in left} == {foreign, near, ours}
    finally:
        with psycopg.connect(elsewhere, autocommit=True) as connection:
            connection.execute(f"ROLLBACK PREPARED '{ours}'")
        with operator.servers.connect("s1") as connection:
            connection.execute("DROP DATABASE beside")


def test_a_server_that_is_down_is_named_and_leaves_it_in_doubt(
    operator: Operator,
) -> None:
    gid, sure = operator.gid("s1", "s2"), operator.gid("s1", "s2", "s3")
    operator.prepare("s1", gid)
    for shard in ("s1", "s3"):
        operator.prepare(shard, sure)
    with operator.servers.connect("s3") as connection:
        connection.execute(f"COMMIT PREPARED '{sure.on(2)}'")
    operator.local.servers["s2"].stop()
    try:
        status, out, err = operator.run("txns", "--grace", "0")
        assert (status, err) == (0, "")
        assert f"{gid}  in doubt" in out
        assert "    s2: unreachable" in out
        assert "waits for shard s2, out of reach" in out
        assert f"{sure}  decided: commit" in out
        assert "Shard s2 is out of reach: connection failed" in out
        status, out, err = operator.run("recover", "--grace", "0")
        assert (status, err) == (1, "")
        assert f"in doubt     {gid}  waits for shard s2, out of reach" in out
        assert f"in doubt     {sure}" in out  # what could be told of it was
        assert len(operator.servers.rows("s1", "SELECT 1 FROM accounts")) == 1
        # A cluster is found through any shard that is up.
        status, _, err = operator.run("txns", url=operator.local.urls["s2"])
        assert status == 2
        assert err.startswith("shardalchemy: no answer from 127.0.0.1:")
        assert err.count("\n") == 1
        assert operator.run("txns", url=operator.local.urls["s3"])[0] == 0
    finally:
        operator.local.servers["s2"].start()
    status, out, _ = operator.run("recover", "--grace", "0")
    assert (status, out) == (0, f"rolled back  {gid}\n")


def test_a_watch_goes_on_while_servers_come_and_go(operator: Operator) -> None:
    process = subprocess.Popen(
        [*COMMAND, "recover", "--watch", "--grace", "0", "--interval", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SHARDALCHEMY_URL": operator.url},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("Recovering what is older than 0 s")
        first = operator.gid("s1", "s2")
        for shard in ("s1", "s2"):
            operator.prepare(shard, first)
        line = process.stdout.readline()
        # Seen between the two, it was rolled back: nothing else may come of it.
        assert line in (f"committed    {first}\n", f"rolled back  {first}\n")
        operator.local.servers["s2"].stop()
        assert process.stdout.readline().startswith("shard s2 is out of reach: ")
        second = operator.gid("s1", "s2")
        operator.prepare("s1", second)
        assert process.stdout.readline().startswith(f"in doubt     {second}  waits for")
        operator.local.servers["s2"].start()
        rest = {process.stdout.readline(), process.stdout.readline()}
        assert rest == {"shard s2 answers again\n", f"rolled back  {second}\n"}
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        if not operator.local.servers["s2"].running:
            operator.local.servers["s2"].start()
    assert process.returncode == 130
    assert (out, err) == ("", "")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense secret", "the URL is none; write postgresql://"),
        ("mysql://me:secret@there/x", "not one of PostgreSQL"),
        ("postgresql://me:sec@ret@there/x", "write it as %40"),
        ("postgresql://me:secret@127.0.0.1:1/x", "no answer from 127.0.0.1:1/x"),
    ],
)
def test_a_wrong_url_is_one_line(operator: Operator, url: str, says: str) -> None:
    for command in ("txns", "recover"):
        status, out, err = operator.run(command, url=url)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert says in err
        assert "secret" not in err
        assert "ret@" not in err


def test_a_database_without_a_catalog_is_named(operator: Operator) -> None:
    url = make_url(operator.url).set(database="template1")
    given = url.render_as_string(hide_password=False)
    status, _, err = operator.run("txns", url=given)
    assert status == 2
    assert "/template1 has no shardalchemy catalog" in err
    assert operator.run("txns", "--json", url=given + "x")[0] == 2


def test_a_shard_may_be_elsewhere_than_the_catalog_says(operator: Operator) -> None:
    gid = operator.gid("s1", "s2")
    operator.prepare("s2", gid)
    urls = operator.local.urls
    status, out, _ = operator.run("txns", "--shard", f"s2={urls['s2']}")
    assert status == 0
    assert str(gid) in out
    for wrong, says in (
        (f"s2={urls['s3']}", "is not shard s2 of this cluster"),
        (f"s9={urls['s2']}", "no such shard; it has s1, s2, s3"),
        ("s2", "name=URL"),
        ("s2=x", "the URL of --shard s2 is none"),
    ):
        status, out, err = operator.run("recover", "--grace", "0", "--shard", wrong)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert says in err
    assert operator.servers.prepared() != {}


def test_a_session_lists_the_same(operator: Operator) -> None:
    gid = operator.gid("s1", "s3")
    operator.prepare("s3", gid)
    time.sleep(0.1)
    with operator.local.cluster(recover_in_background=False) as cluster:
        (found,) = cluster.prepared_transactions(grace=0)
        assert found.gid == str(gid)
        assert found.age >= 0.1
        assert found.participants == {"s1": "not prepared", "s3": "prepared"}


async def test_and_in_an_event_loop(operator: Operator) -> None:
    async with operator.local.cluster(recover_in_background=False) as cluster:
        assert len(await cluster.prepared_transactions_async()) == 0
