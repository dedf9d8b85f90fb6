"""From a statement to the shards that must run it.

A statement is analysed once per SQLAlchemy cache key and the `Analysis` kept; only the
values of its parameters are read for each execution. In the order a statement travels:

1. `scopes` compiles it once, with a compiler that notes every SELECT as it is rendered:
   the FROM elements, the criteria, the columns, after the ORM has had its say.
2. `pins` finds what restricts each sharded element to slots: ``=`` and ``IN`` on a
   column that pins, and equality with an element that is itself restricted.
3. `rowwise` says whether a SELECT is a plain one, whose rows may be concatenated.
4. `written` says whether a write may run shard by shard: what becomes of a row must
   depend on rows of its own shard.
5. `analysis` joins these to an `Analysis`; `plan` resolves one, with parameter values
   and a topology, to a `Plan`.

Plain SQL that names a sharded or reference table goes another way to the same end:
`lexing` and sqlglot cut and parse it, `rawreader` reads the tree by an allow-list, and
`rawpins` finds what restricts its tables (`rawsql` is where to begin reading).

Nothing here opens a connection.
"""

from shardalchemy.planner.analysis import Analyser, Analysis, OwnKeys
from shardalchemy.planner.plan import Plan, PlanKind, PlanPiece

__all__ = ["Analyser", "Analysis", "OwnKeys", "Plan", "PlanKind", "PlanPiece"]
