"""What a server's answer to COMMIT PREPARED or ROLLBACK PREPARED means.

Several may tell a participant the same decision: its coordinator, recoverers, a
snapshot. Whoever comes later finds nothing, or finds another at work.
"""

from __future__ import annotations

import psycopg

from shardalchemy.commit.protocol import Reply

__all__ = ["settled"]


def settled(error: Exception) -> Reply:
    """Return DONE where another has done it, LOST where another may be doing it.

    And LOST for all that does not say what has become of it; REFUSED where the server
    says that this role, or this database, will never do it.
    """
    origin = getattr(error, "orig", error)
    if isinstance(origin, psycopg.errors.UndefinedObject):
        return Reply.DONE
    if isinstance(
        origin,
        psycopg.errors.InsufficientPrivilege | psycopg.errors.FeatureNotSupported,
    ):
        return Reply.REFUSED
    return Reply.LOST
