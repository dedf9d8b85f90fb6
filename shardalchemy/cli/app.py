"""The commands and their options."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path  # noqa: TC003  (Typer reads annotations at run time)
from typing import TYPE_CHECKING, Annotated

import typer

from shardalchemy.errors import LocalServerError

if TYPE_CHECKING:
    from rich.console import Console

    from shardalchemy.cli.shards import Shards

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


Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        envvar="SHARDALCHEMY_URL",
        help="URL of any shard, such as postgresql://user@host/database. The others are"
        " found through the catalog there, with the same user, password and options.",
    ),
]
ShardUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--shard",
        metavar="NAME=URL",
        help="Where a shard is, if not where the catalog says. May be repeated.",
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="For how long a prepared transaction is left to its own session.",
    ),
]


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


@app.command()
def txns(
    url: Url,
    shard: ShardUrls = None,
    grace: Grace = 3.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs.")
    ] = False,
) -> None:
    """List what is prepared on the shards of a cluster, and what it waits for.

    Nothing is changed. A transaction is *decided* once all participants have prepared
    or one has ended, and *in doubt* while one that would say is out of reach; *foreign*
    is what something else has prepared.

    Exit status: 0 also if there is nothing, 2 if there is no cluster or no answer.
    """
    from shardalchemy.cli.txns import as_json as json_of
    from shardalchemy.cli.txns import show
    from shardalchemy.commit.listing import prepared_transactions

    shards = _reached(url, shard)
    listing = prepared_transactions(shards.connect, shards.topology, grace)
    if as_json:
        typer.echo(json_of(listing, shards.topology.cluster))
    else:
        show(_console(), listing)


@app.command()
def recover(
    url: Url,
    shard: ShardUrls = None,
    grace: Grace = 3.0,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            help="Between two looks with `--watch`, on average.",
        ),
    ] = 10.0,
) -> None:
    """Commit or roll back what crashed processes have left prepared.

    What all participants have prepared is committed; the rest is rolled back. What has
    a participant that cannot be reached stays in doubt until it can. Any number of
    processes may do this at the same time, while applications run.

    Exit status: 0 if nothing stays in doubt, 1 if something does or a shard could not
    be asked, 2 if there is no cluster or no answer, 130 after Ctrl-C.
    """
    from shardalchemy.cli import recover as recovering

    try:
        shards = _reached(url, shard)
        if watch:
            recovering.watch(_console(), shards, grace, interval)
        sure = recovering.recover_once(_console(), shards, grace)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not sure:
        raise typer.Exit(1)


def _reached(url: str, overrides: list[str] | None) -> Shards:
    import logging

    from shardalchemy.cli.shards import NoCluster, reached

    # What the library logs of servers that are away is printed here in its own words.
    logging.getLogger("shardalchemy").addHandler(logging.NullHandler())
    try:
        return reached(url, overrides or ())
    except NoCluster as error:
        typer.echo(f"shardalchemy: {error}", err=True)
        raise typer.Exit(2) from None


def _console() -> Console:
    from rich.console import Console

    # Lines are kept whole, to be found with grep and copied as they are.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
