"""From a statement to the shards that must run it.

A statement is analysed once per SQLAlchemy cache key and the `Analysis` kept; only the
values of its parameters are read for each execution. In the order a statement travels:

1. `scopes` compiles it once, with a compiler that notes every SELECT as it is rendered:
   the FROM elements, the criteria, the columns, after the ORM has had its say.
2. `pins` finds what restricts each sharded element to slots: ``=`` and ``IN`` on a
   column that pins, and equality with an element that is itself restricted.
3. `layout` says which scopes are local: answered by each shard for its own rows.
   `rowwise` says whether those rows are the result, or something is done to all of them
   together; `functions` whether shards may evaluate what is in it.
4. `written` says whether a write may run shard by shard: what becomes of a row must
   depend on rows of its own shard.
5. `analysis` joins these to an `Analysis`. One shard (*route*), or the rows of several
   as they come (*scatter*), need no more.
6. Otherwise `splitting` takes a SELECT in pieces (`split`): rows that the shards finish
   (`merged`), aggregates in two steps (`partial`), or the rows of tables, of which
   `semijoins` leaves out what no other could meet.
7. `final` compiles what the shards run, and the statement over the pieces' rows, which
   PostgreSQL executes on one of them: to *combine*, or to *gather*.

`unpreparable` says what of a statement keeps its transaction from being prepared.
A `Plan` is what a person is shown of all this.

Plain SQL that names a sharded or reference table goes another way to the same end:
`lexing` and sqlglot cut and parse it, `rawreader` reads the tree by an allow-list, and
`rawpins` finds what restricts its tables (`rawsql` is where to begin reading).

Nothing here opens a connection.
"""

from shardalchemy.planner.analysis import Analyser, Analysis, OwnKeys
from shardalchemy.planner.plan import Plan, PlanKind, PlanPiece
from shardalchemy.planner.unpreparable import obstacle_of

__all__ = [
    "Analyser",
    "Analysis",
    "OwnKeys",
    "Plan",
    "PlanKind",
    "PlanPiece",
    "obstacle_of",
]
