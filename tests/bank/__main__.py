"""``python -m tests.bank SECONDS [SEED] [--keep DIRECTORY]``."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from tests.bank.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bank")
    parser.add_argument("seconds", type=float, help="how long the faults go on")
    parser.add_argument("seed", type=int, nargs="?", help="of faults and transactions")
    parser.add_argument("--keep", type=Path, help="a directory for journals and logs")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    report = run(
        options.seconds,
        seed,
        lambda line: print(time.strftime("%H:%M:%S"), line, flush=True),
        options.keep,
    )
    if report.evidence:
        print(report.evidence)
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
