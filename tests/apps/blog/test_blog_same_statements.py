"""Over unannotated models a cluster's session sends what a plain one sends."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from blog_recorder import listening, record, server_log
from blog_scenarios import SCRIPTS, Script
from blog_stage import Installation, run

from shardalchemy.local import LocalCluster

pytestmark = pytest.mark.usefixtures("settled_order")


@pytest.fixture(params=["sharded", "engine"])
def other(request: pytest.FixtureRequest) -> Installation:
    installation: Installation = request.getfixturevalue(f"{request.param}_blog")
    return installation


@pytest.fixture(scope="module")
def on_plain(plain_blog: Installation) -> Callable[[Script, bool], list[Any]]:
    """What a script does on plain SQLAlchemy; it is run once."""

    @cache
    def on_plain(script: Script, fired: bool) -> list[Any]:
        return record(plain_blog, script, fired=fired)

    return on_plain


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_statements_are_sent(
    on_plain: Callable[[Script, bool], list[Any]], other: Installation, script: Script
) -> None:
    expected = on_plain(script, False)
    assert any(entry[0] == "statement" for entry in expected)
    assert record(other, script, fired=False) == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_events_fire_in_the_same_order(
    on_plain: Callable[[Script, bool], list[Any]], other: Installation, script: Script
) -> None:
    expected = on_plain(script, True)
    assert any(entry[0] == "after_begin" for entry in expected)
    assert record(other, script, fired=True) == expected


@pytest.fixture(scope="module")
def logging(plain_blog: Installation, sharded_blog: Installation) -> Iterator[None]:
    """Let the servers log every statement that reaches the blog's databases."""
    installations = [plain_blog, sharded_blog]
    for setting in ("SET log_statement = 'all'", "RESET log_statement"):
        if setting.startswith("RESET"):
            yield
        for installation in installations:
            for url in installation.urls.values():
                run(url, f"ALTER DATABASE blog_{installation.name} {setting}")
            installation.engine.dispose()


@pytest.mark.usefixtures("logging")
@pytest.mark.parametrize(
    "script",
    [s for s in SCRIPTS if s.__name__ in ("reading", "changing", "bulk", "nesting")],
    ids=lambda script: script.__name__,
)
def test_the_servers_see_not_one_statement_more(
    shard_servers: LocalCluster,
    plain_blog: Installation,
    sharded_blog: Installation,
    script: Script,
) -> None:
    logs = {name: server.log for name, server in shard_servers.servers.items()}

    def seen(installation: Installation) -> dict[str, list[str]]:
        installation.empty()
        Session = installation.factory(listeners=False)
        with Session() as session:
            session.connection()  # the driver asks a new connection some things
        starts = {name: log.stat().st_size for name, log in logs.items()}
        with listening([], fired=False):
            assert list(script(Session))
        return {name: server_log(log, starts[name]) for name, log in logs.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = seen(plain_blog), seen(sharded_blog)
    home = next(iter(logs))
    assert len(expected[home]) > 3
    assert found == expected
    assert all(not found[name] for name in logs if name != home)


def test_a_cluster_asks_the_topology_once_and_nothing_afterwards(
    sharded_blog: Installation,
) -> None:
    first = record(sharded_blog, SCRIPTS[0], fired=False)
    assert record(sharded_blog, SCRIPTS[0], fired=False) == first
    assert not any(
        re.search("shardalchemy|pg_current_xact", str(entry)) for entry in first
    )
