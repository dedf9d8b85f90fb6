"""What PostgreSQL says of its functions, and of an application's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["function_volatilities"]

# A function that is neither PostgreSQL's own nor an extension's may read tables by
# itself, unless it was declared immutable.
_FUNCTIONS = """
SELECT proname::text,
       CASE WHEN bool_or(prokind = 'a') THEN 'aggregate'
            WHEN bool_or(prokind = 'w') THEN 'window'
            WHEN bool_or(own AND provolatile <> 'i') THEN 'unknown'
            WHEN bool_or(provolatile = 'v') THEN 'volatile'
            WHEN bool_or(provolatile = 's') THEN 'stable'
            ELSE 'immutable' END
  FROM (SELECT proname, prokind, provolatile,
               pronamespace <> 'pg_catalog'::regnamespace
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                                WHERE d.classid = 'pg_catalog.pg_proc'::regclass
                                  AND d.objid = p.oid AND d.deptype = 'e') AS own
          FROM pg_catalog.pg_proc p
         WHERE prokind <> 'p') AS functions
 GROUP BY proname
"""


def function_volatilities(connection: Connection) -> dict[str, str]:
    """Return what each function's name stands for: the worst of its overloads.

    One of ``immutable``, ``stable``, ``volatile``, ``aggregate``, ``window``, or
    ``unknown`` for an application's own function that is not immutable.
    """
    rows = connection.exec_driver_sql(_FUNCTIONS)
    return dict(tuple(row) for row in rows)
