"""The report, as a terminal shows it; legible without colours, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from shardalchemy.cli.tally import quantile
from shardalchemy.ring import SLOTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType

    from shardalchemy.catalog import Topology
    from shardalchemy.cli.audit import Audit
    from shardalchemy.cli.tally import Tally

__all__ = ["show"]

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white", "bright_cyan")
# Cells of the ring's bar; each stands for as many slots.
_CELLS = 64
_ERRORS_SHOWN = 5


def show(console: Console, topology: Topology, tally: Tally, audit: Audit) -> None:
    """Print everything that a sceptic wants to see, the verdict last."""
    sections: dict[str, Sequence[RenderableType]] = {
        "The ring": (_ring(topology), _rows(topology, audit.rows)),
        "The sale": (_use_cases(tally), _outcome(tally, audit)),
        "By participants: the shards a transaction wrote on": (_participants(tally),),
        "Invariants, in plain SQL on each server": (_checks(audit),),
    }
    for title, renderables in sections.items():
        console.rule(title, style="dim", align="left")
        console.print(*renderables, "", sep="\n")
    if tally.errors or tally.warnings:
        console.print(_trouble(tally))
    sound = audit.sound and not tally.errors
    console.print(
        Text("Sound: every invariant holds.", "bold green")
        if sound
        else Text("NOT SOUND: see FAIL and errors above.", "bold red")
    )


def _colours(topology: Topology) -> dict[str, str]:
    return dict(zip(topology.shards, _COLOURS, strict=False))


def _ring(topology: Topology) -> Text:
    """Draw the hash space as a bar, each arc in its shard's colour and number."""
    colours = _colours(topology)
    numbers = {shard: str(n) for n, shard in enumerate(topology.shards, start=1)}
    bar = Text("-2^63 ", "dim")
    for cell in range(_CELLS):
        owner = topology.owner(cell * SLOTS // _CELLS)
        bar.append(numbers[owner], f"black on {colours[owner]}")
    bar.append(" 2^63", "dim")
    for shard in topology.shards:
        arcs = ", ".join(f"{first}-{last}" for first, last in topology.arcs(shard))
        bar.append("\n      ")
        bar.append(numbers[shard], f"black on {colours[shard]}")
        bar.append(f" {shard}: slots {arcs}")
    return bar


def _rows(topology: Topology, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Tabulate rows by table and shard, and their share beside the ring's."""
    table = _table("rows in")
    for shard, colour in _colours(topology).items():
        table.add_column(shard, justify="right", header_style=f"bold {colour}")
    table.add_column("all", justify="right")
    totals = dict.fromkeys(topology.shards, 0)
    for name, counts in rows.items():
        for shard, count in counts.items():
            totals[shard] += count
        _add_counts(table, name, counts)
    table.add_section()
    _add_counts(table, "all tables", totals)
    owned = topology.ring.counts()
    for name, shares in (("share of the rows", totals), ("share of the ring", owned)):
        whole = sum(shares.values())
        table.add_row(
            name,
            *(f"{shares.get(shard, 0) / whole:.1%}" for shard in topology.shards),
            "100%",
            style="bold",
        )
    return table


def _add_counts(table: Table, name: str, counts: Mapping[str, int]) -> None:
    numbers = [*counts.values(), sum(counts.values())]
    table.add_row(name, *(f"{number:,}" for number in numbers))


def _use_cases(tally: Tally) -> Table:
    table = _table("transactions", "number", "a second", *_LATENCIES)
    for use_case in tally.use_cases:
        latencies = tally.of(use_case)
        rate = len(latencies) / tally.seconds
        table.add_row(
            use_case, f"{len(latencies):,}", f"{rate:.1f}", *_latencies(latencies)
        )
    return table


def _participants(tally: Tally) -> Table:
    table = _table("shards", "all", "orders", "share", *_LATENCIES)
    table.add_column("")
    orders = tally.by_participants("place order")
    every = tally.by_participants()
    for number in every:
        latencies = orders.get(number, [])
        share = len(latencies) / max(1, len(tally.orders))
        table.add_row(
            str(number),
            f"{len(every[number]):,}",
            f"{len(latencies):,}",
            f"{share:.1%}",
            *_latencies(latencies),
            Text("#" * round(20 * share), "cyan"),
        )
    return table


_LATENCIES = ("p50 ms", "p95 ms", "p99 ms")


def _latencies(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return ["-"] * len(_LATENCIES)
    return [f"{quantile(seconds, share) * 1000:.1f}" for share in (0.5, 0.95, 0.99)]


def _outcome(tally: Tally, audit: Audit) -> Text:
    # No buyer came to an end if there are no seconds, and the errors say so.
    rate = len(tally.orders) / tally.seconds if tally.seconds else 0.0
    refused = ", ".join(f"{n:,} {why}" for why, n in tally.refusals.most_common())
    return Text.assemble(
        (f"{rate:.1f} orders a second", "bold"),
        f" over {tally.seconds:.1f} s. Refused: {refused or 'nobody'}.\n"
        f"{audit.sold_out} of {audit.hot} hot products are sold out.",
    )


def _checks(audit: Audit) -> Text:
    lines = []
    for check in audit.checks:
        line = Text()
        line.append(*(("ok    ", "green") if check.ok else ("FAIL  ", "bold red")))
        line.append(check.name)
        if check.detail:
            # What breaks an invariant is long, and wanted in full.
            line.append(f": {check.detail}", "dim" if check.ok else "red")
        lines.append(line)
    return Text("\n").join(lines)


def _trouble(tally: Tally) -> Text:
    lines = Text()
    for word, style, counts in (
        ("error", "bold red", tally.errors),
        ("warning", "yellow", tally.warnings),
    ):
        for message, number in counts.most_common(_ERRORS_SHOWN):
            lines.append(f"{number:,} x {word}: ", style)
            lines.append(f"{message}\n")
        if len(counts) > _ERRORS_SHOWN:
            lines.append(f"and {len(counts) - _ERRORS_SHOWN} other {word}s\n", style)
    return lines


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
