"""The report says in words what is wrong, on a terminal without colours as well."""

from __future__ import annotations

import io

from rich.console import Console

from shardalchemy.catalog import ShardAddress, Topology
from shardalchemy.cli import report
from shardalchemy.cli.audit import Audit, Check
from shardalchemy.cli.tally import Tally
from shardalchemy.ring import allocate

SHARDS = ("s1", "s2")
TOPOLOGY = Topology(
    epoch=1,
    cluster="a cluster",
    home="s1",
    addresses={
        name: ShardAddress(n, "localhost", 5432, name) for n, name in enumerate(SHARDS)
    },
    ring=allocate(SHARDS),
)
ROWS = {"customers": {"s1": 700, "s2": 300}, "orders": {"s1": 1500, "s2": 500}}


def shown(tally: Tally, *checks: Check) -> str:
    console = Console(file=io.StringIO(), width=80)
    audit = Audit(ROWS, hot=10, sold_out=4, checks=checks)
    report.show(console, TOPOLOGY, tally, audit)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def sold() -> Tally:
    tally = Tally(seconds=2.0, orders=["a", "b", "c"])
    tally.latencies["place order", 1] += [0.010]
    tally.latencies["place order", 3] += [0.020, 0.040]
    tally.latencies["fill cart", 1] += [0.005] * 4
    tally.refusals["sold out"] += 6
    return tally


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_sound_sale_is_reported_with_its_figures() -> None:
    text = shown(sold(), Check("Nothing is lost", True, "3 orders"))
    lines = lines_of(text)
    assert ["all", "tables", "2,200", "800", "3,000"] in lines
    assert ["share", "of", "the", "rows", "73.3%", "26.7%", "100%"] in lines
    assert ["share", "of", "the", "ring", "50.0%", "50.0%", "100%"] in lines
    assert ["place", "order", "3", "1.5", "20.0", "40.0", "40.0"] in lines
    assert ["3", "2", "2", "66.7%", "20.0", "40.0", "40.0", "#" * 13] in lines
    assert "ok    Nothing is lost: 3 orders\n" in text
    assert "1.5 orders a second over 2.0 s. Refused: 6 sold out." in text
    assert "4 of 10 hot products are sold out" in text
    assert "NOT SOUND" not in text


def test_the_ring_shows_each_arc_by_its_shards_number() -> None:
    assert "1" * 32 + "2" * 32 in shown(sold())
    assert "s2: slots 2048-4095" in shown(sold())


def test_a_failed_invariant_is_named_with_what_breaks_it() -> None:
    text = shown(sold(), Check("Nothing is lost", False, "1 lost, such as 42"))
    assert "FAIL  Nothing is lost: 1 lost, such as 42\n" in text
    assert "NOT SOUND" in text


def test_unexpected_errors_are_shown_and_make_it_unsound() -> None:
    tally = sold()
    tally.errors["ValueError: [not markup]"] += 3
    text = shown(tally)
    assert "3 x error: ValueError: [not markup]" in text
    assert "NOT SOUND" in text


def test_warnings_are_shown_and_leave_it_sound() -> None:
    tally = sold()
    tally.warnings["the turn of %s was lost"] += 1
    text = shown(tally)
    assert "1 x warning: the turn of %s was lost" in text
    assert "NOT SOUND" not in text


def test_a_sale_at_which_nobody_bought_anything_is_reported_as_well() -> None:
    assert "0.0 orders a second" in shown(Tally())
