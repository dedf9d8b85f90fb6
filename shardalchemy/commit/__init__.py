"""Committing on several shards as one transaction.

1. On all participants at once: insert a marker row and ``PREPARE TRANSACTION``, in one
   message (`driver`). "All have prepared" is the decision; nothing else is written.
2. On all at once: ``COMMIT PREPARED``. With ``ack="prepared"`` the caller does not wait
   for this step; `finisher` carries it out, repeats what fails, and deletes markers.
3. What a crash or a lost reply leaves behind, `recovery` decides by looking at each
   participant, in any process, with nobody's memory; `patrol` does so in the
   background. `housekeeping` removes the markers of processes that are gone.

What is asked of whom, and what follows from each answer, is in `protocol`, without I/O:
`driver` and `recovery` only carry it out. A transaction that has written on one shard
alone leaves a marker too, in the message of its COMMIT, so that the loss of the reply
can be resolved in the same way.

`waits` watches sessions that wait for locks: `waitgraph` finds the deadlocks that no
server sees, by what `blocking` asks the servers, and `indoubt` resolves what is waited
for and left prepared.

`gid` is the name a transaction carries on every participant; `listing` says what is
prepared, and what recovery waits for. `snapshot` opens a snapshot of all shards in
which no transaction is torn; `cut` says how that is known, and `gate` is what it may
shut.
"""

from shardalchemy.commit.counters import Counters
from shardalchemy.commit.driver import Ack, Commit
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.listing import Listing, PreparedTransaction
from shardalchemy.commit.recovery import RecoveryReport
from shardalchemy.commit.snapshot import Snapshots
from shardalchemy.commit.transactions import Transactions

__all__ = [
    "Ack",
    "Commit",
    "Counters",
    "Gid",
    "Listing",
    "PreparedTransaction",
    "RecoveryReport",
    "Snapshots",
    "Transactions",
]
