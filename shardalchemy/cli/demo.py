"""The demonstration: the order of its acts, and what is seen while they play."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from shardalchemy.cli import report
from shardalchemy.cli.audit import audit
from shardalchemy.cli.load import fill
from shardalchemy.cli.sale import Sale, hold
from shardalchemy.cli.shop import models
from shardalchemy.local import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from shardalchemy.cli.shop import ShopSize
    from shardalchemy.cli.tally import Tally
    from shardalchemy.cluster import Cluster
    from shardalchemy.commit import Ack

__all__ = ["play"]


def play(
    size: ShopSize,
    *,
    shards: int,
    seconds: int,
    buyers: int,
    processes: int,
    directory: Path | None,
    ack: Ack,
    console: Console | None = None,
) -> bool:
    """Start servers, fill the shop, hold the sale, audit it; say if it is sound.

    Sound means that every invariant holds and no buyer met an unexpected error. The
    servers' data is kept in *directory*, if one is given.

    Raises LocalServerError where the servers cannot be started.
    """
    console = console or Console(highlight=False)
    servers = LocalCluster(shards, directory=directory)
    with _act(console, f"Starting {shards} PostgreSQL servers and a Valkey"):
        servers.start()
    try:
        with servers.cluster(ack=ack) as cluster:
            cluster.create_all(models.Base.metadata)
            _fill(console, cluster, servers.urls, size)
            sale = Sale(
                urls=servers.urls,
                redis=servers.redis_url,
                size=size,
                seconds=seconds,
                buyers=buyers,
                processes=processes,
                ack=ack,
            )
            tally = _hold(console, sale)
            with _act(console, "Asking each server in plain SQL"):
                found = audit(servers.urls, cluster.topology, tally)
            topology = cluster.topology
    finally:
        with _act(console, "Stopping the servers"):
            servers.stop()
    console.print()
    report.show(console, topology, tally, found)
    if directory is not None:
        console.print(
            f"The data is in {directory}. LocalCluster(directory=...) of"
            " shardalchemy.local starts its servers again."
        )
    return found.sound and not tally.errors


@contextmanager
def _act(console: Console, name: str) -> Iterator[None]:
    """Show that something is going on, and how long it took."""
    start = time.monotonic()
    with console.status(f"{name} ..."):
        yield
    console.print(f"{name}: [bold]{time.monotonic() - start:.1f} s[/bold]")


def _fill(
    console: Console, cluster: Cluster, urls: Mapping[str, str], size: ShopSize
) -> None:
    total = size.customers + size.products
    with _progress(console) as progress:
        task = progress.add_task("Filling the shop", total=total, note="")
        stored = 0
        for step in fill(cluster, urls, size):
            stored += step
            progress.update(
                task,
                completed=stored,
                note=f"{stored:,} of {total:,} customers and products",
            )


def _hold(console: Console, sale: Sale) -> Tally:
    name = f"Flash sale: {sale.buyers} buyers in {sale.processes} processes"
    with _progress(console) as progress:
        task = progress.add_task(name, total=sale.seconds, start=False, note="arriving")
        orders = refusals = 0

        def sold(more_orders: int, more_refusals: int) -> None:
            nonlocal orders, refusals
            orders += more_orders
            refusals += more_refusals
            progress.start_task(task)  # only its first call has an effect
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(
                task,
                completed=min(elapsed, sale.seconds),
                note=f"{orders:,} orders, {refusals:,} refused",
            )

        tally = hold(sale, sold)
        progress.update(task, completed=sale.seconds)
    return tally


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
