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

Nothing here opens a connection.
"""

from shardalchemy.planner.analysis import Analyser, Analysis
from shardalchemy.planner.plan import Plan, PlanKind

__all__ = ["Analyser", "Analysis", "Plan", "PlanKind"]
