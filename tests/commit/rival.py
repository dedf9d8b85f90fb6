"""A process that has one row, wants another, and says what became of it.

``python -m tests.commit.rival URLS FIRST SECOND``: takes the first account, prints
"ready", waits for a line, and takes the second.
"""

from __future__ import annotations

import json
import sys

from shardalchemy import Cluster
from tests.commit.accounts import Account


def main() -> None:
    urls, first, second = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with Cluster(urls) as cluster, cluster.sessionmaker()() as session:
        session.get(Account, first, with_for_update=True)
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            session.get(Account, second, with_for_update=True)
            session.commit()
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print("committed")


if __name__ == "__main__":
    main()
