"""The command line: for operators, and ``shardalchemy demo`` for a sceptic.

``txns`` lists what is prepared on a cluster's shards and ``recover`` finishes it;
``shards`` finds the cluster from the URL of any shard.

Into the demonstration go a few options; out of it come a picture of the ring, figures
of a flash sale, and whether every invariant held, as the exit status too. In the order
in which it passes through them:

- ``app`` has the commands and their options, ``demo`` the order of the acts;
- ``shop`` finds the example application, ``load`` fills it;
- ``sale`` holds the flash sale, ``buyers`` are its ``processes``, ``tally`` is what
  they saw, and ``participants`` how they know where a transaction wrote;
- ``audit`` asks each server in plain SQL, ``report`` draws what came of it.

Nothing here is imported by the library, and Typer and Rich only when a command runs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_MISSING = (
    "shardalchemy: the command line needs {}; it comes with"
    " pip install 'shardalchemy[local]'"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that *arguments* name, by default those of the process.

    Ends in SystemExit: 0 for success, 1 for a failed invariant, 2 for wrong usage or
    something that is not installed, 130 after Ctrl-C.
    """
    try:
        import rich  # noqa: F401  (the report needs it, while Typer can do without)

        from shardalchemy.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(_MISSING.format(error.name), file=sys.stderr)
        raise SystemExit(2) from None
    app(None if arguments is None else list(arguments), prog_name="shardalchemy")
