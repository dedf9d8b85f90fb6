"""``python -m tests.differential COUNT [SEED] [--collation …] [--write FILE]``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from shardalchemy.local import LocalCluster
from tests.differential.search import CHUNK, Search
from tests.differential.twins import Mirror, Twins


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential")
    parser.add_argument("count", type=int, help="how many statements")
    parser.add_argument("seed", type=int, nargs="?", default=1000)
    parser.add_argument(
        "--collation",
        default="",
        help='what CREATE DATABASE is to say, as "LOCALE_PROVIDER icu ICU_LOCALE'
        " 'en-US'\"",
    )
    parser.add_argument(
        "--chunk", type=int, default=CHUNK, help="statements a data set"
    )
    parser.add_argument("--write", type=Path, help="a file for what went wrong")
    parser.add_argument(
        "--mirror",
        action="store_true",
        help="compare with a plain database of rows in another order: this judges the"
        " grammar, which must not ask for what is not determined",
    )
    options = parser.parse_args()
    start = time.monotonic()
    print(f"seeds from {options.seed}", flush=True)
    with (
        LocalCluster(4) as servers,
        (Mirror if options.mirror else Twins)(
            servers, collation=options.collation
        ) as twins,
    ):
        search = Search(twins, report=lambda text: print(f"\n{text}\n", flush=True))
        after = search.run(options.count, options.seed, options.chunk)
    print(search.tally.report())
    print(f"{time.monotonic() - start:.0f} s, seeds {options.seed} to {after - 1}")
    if options.write:
        options.write.write_text("\n\n".join(search.failures))
    return 1 if search.failures else 0


if __name__ == "__main__":
    sys.exit(main())
