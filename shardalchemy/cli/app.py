"""The commands and their options."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path  # noqa: TC003  (Typer reads annotations at run time)
from typing import Annotated

import typer

from shardalchemy.errors import LocalServerError

app = typer.Typer(
    name="shardalchemy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class Ack(StrEnum):
    """When a cross-shard commit returns."""

    committed = "committed"
    prepared = "prepared"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardalchemy {version('shardalchemy')}")
        raise typer.Exit


@app.callback()
def shardalchemy(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """A drop-in SQLAlchemy session over many PostgreSQL servers."""


@app.command()
def demo(
    shards: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=8, help="PostgreSQL servers to start."),
    ] = 4,
    customers: Annotated[
        int,
        typer.Option(metavar="N", min=10, max=1_000_000, help="Customers of the shop."),
    ] = 10_000,
    products: Annotated[
        int,
        typer.Option(metavar="N", min=10, max=100_000, help="Products of the shop."),
    ] = 1_000,
    seconds: Annotated[
        int, typer.Option(metavar="N", min=1, max=3600, help="Length of the sale.")
    ] = 15,
    buyers: Annotated[
        int, typer.Option(metavar="N", min=1, max=128, help="Buyers at the same time.")
    ] = 32,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=16,
            help="Processes that share the buyers; no more than there are buyers.",
        ),
    ] = 4,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            file_okay=False,
            help="Keep the servers' data in a new directory; LocalCluster starts it"
            " again.",
        ),
    ] = None,
    ack: Annotated[
        Ack,
        typer.Option(
            help="When a commit over several shards returns: committed on all, or"
            " decided, because all have prepared."
        ),
    ] = Ack.committed,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Another seed makes another shop, and other buyers."
        ),
    ] = 1,
) -> None:
    """Hold a flash sale on local servers, then check it with plain SQL.

    Starts PostgreSQL servers and a Valkey on loopback, fills a shop, lets concurrent
    buyers in several processes fight for a few products, and prints where the rows
    are, what it cost, and whether the shop is still sound. Nothing is left behind,
    unless with `--keep`.

    Exit status: 0 if every invariant held, 1 if one did not or an unexpected error
    occurred, 2 if it could not start, 130 after Ctrl-C.
    """
    if customers < buyers:
        raise typer.BadParameter(
            f"{buyers} buyers need at least as many customers, not {customers}.",
            param_hint="--customers",
        )
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise typer.BadParameter(
            f"{keep} is not empty; name a new directory.", param_hint="--keep"
        )
    # Only here: the other commands need neither the shop nor any server.
    from shardalchemy.cli.demo import play
    from shardalchemy.cli.processes import WorkerFailed
    from shardalchemy.cli.shop import ShopSize

    try:
        sound = play(
            ShopSize.for_sale_of(
                seconds, customers=customers, products=products, seed=seed
            ),
            shards=shards,
            seconds=seconds,
            buyers=buyers,
            processes=min(processes, buyers),
            directory=keep,
            ack=ack.value,
        )
    except LocalServerError as error:
        typer.echo(f"shardalchemy: {error}", err=True)
        raise typer.Exit(2) from None
    except WorkerFailed as error:
        typer.echo(f"shardalchemy: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("\nInterrupted; the servers are stopped.", err=True)
        raise typer.Exit(130) from None
    if not sound:
        raise typer.Exit(1)
