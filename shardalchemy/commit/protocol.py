"""The decisions of the commit protocol, without I/O.

A transaction is committed exactly if all its participants have prepared. The session
that runs it hears of each participant that it prepared, that it refused, or nothing.
A recoverer, who was not there, looks at each participant instead. Both decide here.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Decision", "Reply", "Seen", "decide", "verdict"]


class Reply(Enum):
    """What the session heard of one participant's PREPARE."""

    PREPARED = "prepared"
    REFUSED = "refused"
    """The server said no, or was not asked: this participant can never prepare."""
    LOST = "lost"
    """The request may have arrived; the reply did not."""


class Decision(Enum):
    """What is to be done with a transaction."""

    COMMIT = "commit"
    ABORT = "abort"
    RECOVER = "recover"
    """Nobody may decide from memory; the participants must be looked at."""


class Seen(Enum):
    """What a recoverer found at one participant."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"
    """A tombstone stands there: this participant can never prepare."""
    UNREACHABLE = "unreachable"


def decide(replies: Collection[Reply]) -> Decision:
    """Return what the session does after PREPARE.

    A refusal settles it even if another reply is lost: without the refuser nobody can
    find all participants prepared. A lost reply alone is never taken for a failure.
    """
    if Reply.REFUSED in replies:
        return Decision.ABORT
    if Reply.LOST in replies:
        return Decision.RECOVER
    return Decision.COMMIT


def verdict(seen: Collection[Seen]) -> Decision:
    """Return what a recoverer does after looking at every participant."""
    if Seen.ABORTED in seen:
        return Decision.ABORT
    if Seen.UNREACHABLE in seen:
        return Decision.RECOVER
    return Decision.COMMIT
