"""``shardalchemy txns``: what is prepared, for a person or for a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.text import Text

from shardalchemy.commit.listing import Here, State

if TYPE_CHECKING:
    from rich.console import Console

    from shardalchemy.commit import Listing, PreparedTransaction

__all__ = ["as_json", "printable", "show", "show_unreachable"]

_STYLES = {
    State.PREPARED: "yellow",
    State.DECIDED: "green",
    State.IN_DOUBT: "bold red",
    State.FOREIGN: "dim",
    Here.PREPARED: "yellow",
    Here.COMMITTED: "green",
    Here.ROLLED_BACK: "green",
    Here.NOT_PREPARED: "dim",
    Here.UNREACHABLE: "bold red",
}


def show(console: Console, listing: Listing) -> None:
    """Print every transaction, a line for it and one for each participant."""
    if not listing:
        asked = " on the shards that answer" if listing.unreachable else ""
        console.print(f"No prepared transactions{asked}.")
    for transaction in listing:
        console.print(_described(transaction))
    show_unreachable(console, listing)


def show_unreachable(console: Console, listing: Listing) -> None:
    """Print which shards could not be asked, and why."""
    for shard, reason in listing.unreachable.items():
        line = f"Shard {shard} is out of reach: {printable(reason)}"
        console.print(Text(line, _STYLES[Here.UNREACHABLE]))


def _described(transaction: PreparedTransaction) -> Text:
    decision = "" if transaction.outcome is None else f": {transaction.outcome}"
    described = Text.assemble(
        (printable(transaction.gid), "bold"),
        "  ",
        (f"{transaction.state}{decision}", _STYLES[transaction.state]),
        f"  {_age(transaction.age)} old",
    )
    for shard, here in transaction.participants.items():
        described.append(f"\n    {shard}: ").append(str(here), _STYLES[here])
    return described.append(f"\n    waits for {transaction.waits_for}")


def printable(text: str) -> str:
    """Return *text* with what a terminal would obey written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _age(seconds: float) -> str:
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def as_json(listing: Listing, cluster: str) -> str:
    """Return the listing as a JSON object."""
    document = {
        "cluster": cluster,
        "transactions": [
            {
                "gid": transaction.gid,
                "age": round(transaction.age, 3),
                "state": transaction.state.value,
                "outcome": transaction.outcome,
                "participants": {
                    shard: here.value
                    for shard, here in transaction.participants.items()
                },
                "unreachable": list(transaction.unreachable),
                "grace_left": round(transaction.grace_left, 3),
                "waits_for": transaction.waits_for,
            }
            for transaction in listing
        ],
        "unreachable": dict(listing.unreachable),
    }
    return json.dumps(document, indent=2)
