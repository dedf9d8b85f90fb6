"""Committing on several shards as one transaction.

1. On all participants at once: insert a marker row and ``PREPARE TRANSACTION``, in one
   message (`driver`). "All have prepared" is the decision; nothing else is written.
2. On all at once: ``COMMIT PREPARED``. With ``ack="prepared"`` the caller does not wait
   for this step; `finisher` carries it out, repeats what fails, and deletes markers.
3. What a crash or a lost reply leaves behind, `recovery` decides by looking at each
   participant, in any process, with nobody's memory (`protocol` says how).

`gid` is the name a transaction carries on every participant. `snapshot` opens a
snapshot of all shards in which no transaction is torn; `cut` says how that is known,
and `gate` is what it may shut.
"""

from shardalchemy.commit.counters import Counters
from shardalchemy.commit.driver import Ack
from shardalchemy.commit.gid import Gid
from shardalchemy.commit.recovery import RecoveryReport
from shardalchemy.commit.snapshot import Snapshots
from shardalchemy.commit.transactions import Transactions

__all__ = ["Ack", "Counters", "Gid", "RecoveryReport", "Snapshots", "Transactions"]
