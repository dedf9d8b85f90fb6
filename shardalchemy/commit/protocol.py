"""The commit protocol as state machines, without I/O.

A transaction is committed exactly if all its participants have prepared. The
`Coordinator`, in the session that runs it, asks them to and hears of each that it has,
that it refused, or nothing. A `Recoverer`, who was not there, looks at each participant
instead. Each is a value: ``requests`` says what to send to whom, all of it at once and
in any order, and ``after(replies)`` is the state once some of the replies are there.

    Coordinator   PREPARE ── all prepared ──────── COMMIT
                          └─ one refused ───────── ROLLBACK where it is prepared
                          └─ else, a reply lost ── a Recoverer decides

    Recoverer     LOOK ── prepared ─────────────────────────────────────────┐
                       └─ absent ─── FENCE ── committed, aborted: that is it │
                                           └─ busy: LOOK again               │
                  one committed, or all prepared: COMMIT; one aborted: ROLLBACK

Any number of recoverers, and the coordinator, may be at work on one transaction. Who
loses a reply, asks again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Coordinator", "Decision", "Recoverer", "Reply", "Request"]


class Request(Enum):
    """What a participant is asked for."""

    PREPARE = "prepare"
    """Insert the marker, which fails where a tombstone stands, and prepare."""
    COMMIT = "commit"
    ROLLBACK = "roll back"
    LOOK = "look"
    """Is it prepared here?"""
    FENCE = "fence"
    """Insert a tombstone if nothing is there, and read what stands there then."""


class Reply(Enum):
    """What was heard of a participant."""

    LOST = "lost"
    """The request may have arrived; the reply did not."""
    PREPARED = "prepared"
    REFUSED = "refused"
    """To PREPARE: this participant can never prepare."""
    DONE = "done"
    """To COMMIT and ROLLBACK: by this request or by another's."""
    ABSENT = "absent"
    """To LOOK: it is not prepared; it may have been, or come to be."""
    BUSY = "busy"
    """To FENCE: the marker is there, and neither prepared nor ended yet."""
    COMMITTED = "committed"
    """To FENCE: the marker is there, so every participant had prepared."""
    ABORTED = "aborted"
    """To FENCE: a tombstone stands there, so this participant can never prepare."""
    UNREACHABLE = "unreachable"
    """To a recoverer: it has been asked for long enough."""


class Decision(Enum):
    """What becomes of a transaction."""

    COMMIT = "commit"
    ABORT = "abort"
    RECOVER = "recover"
    """Whoever knows so little may not decide: in doubt."""


_SETTLES = {Decision.COMMIT: Request.COMMIT, Decision.ABORT: Request.ROLLBACK}


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The session that runs the transaction; ``heard`` has one reply a participant."""

    participants: tuple[str, ...]
    heard: tuple[Reply | None, ...]

    @classmethod
    def of(cls, participants: Iterable[str]) -> Coordinator:
        """Return the coordinator of a transaction that has not been prepared yet."""
        names = tuple(participants)
        return cls(names, (None,) * len(names))

    @property
    def decision(self) -> Decision | None:
        """What is decided, once every participant has been heard or given up.

        A refusal settles it even if another reply is lost: without the refuser nobody
        can find all participants prepared. A lost reply alone is never a failure.
        """
        if None in self.heard:
            return None
        if Reply.REFUSED in self.heard:
            return Decision.ABORT
        if Reply.LOST in self.heard:
            return Decision.RECOVER
        return Decision.COMMIT

    @property
    def requests(self) -> dict[str, Request]:
        """What to send now, by participant; nothing when there is nothing left to do.

        What is prepared stays so until it is told the decision.
        """
        decision = self.decision
        if decision is None:
            return {
                name: Request.PREPARE
                for name, heard in zip(self.participants, self.heard, strict=True)
                if heard is None
            }
        request = _SETTLES.get(decision)
        if request is None:
            return {}
        return {
            name: request
            for name, heard in zip(self.participants, self.heard, strict=True)
            if heard is Reply.PREPARED
        }

    def after(self, replies: Mapping[str, Reply]) -> Coordinator:
        """Return the state once these replies are there.

        A lost reply to COMMIT or ROLLBACK leaves the participant to be told again.
        """
        decided = self.decision is not None
        heard = tuple(
            before
            if (reply := replies.get(name)) is None or (decided and reply is Reply.LOST)
            else reply
            for name, before in zip(self.participants, self.heard, strict=True)
        )
        return replace(self, heard=heard)


_FINAL = frozenset(
    {Reply.PREPARED, Reply.COMMITTED, Reply.ABORTED, Reply.UNREACHABLE, Reply.DONE}
)


@dataclass(frozen=True, slots=True)
class Recoverer:
    """One that was not there; ``seen`` has what it last saw of each participant.

    ``decided`` keeps what it has concluded, which later replies do not change.
    """

    participants: tuple[str, ...]
    seen: tuple[Reply | None, ...]
    decided: Decision | None = None

    @classmethod
    def of(cls, participants: Iterable[str]) -> Recoverer:
        """Return a recoverer that has seen nothing yet."""
        names = tuple(participants)
        return cls(names, (None,) * len(names))

    @property
    def decision(self) -> Decision | None:
        """What it has concluded; RECOVER where a participant is out of reach."""
        if self.decided is None and all(seen in _FINAL for seen in self.seen):
            return Decision.RECOVER
        return self.decided

    @property
    def is_finished(self) -> bool:
        """Whether no participant is left that has not been told."""
        return self.decided is not None and Reply.UNREACHABLE not in self.seen

    @property
    def requests(self) -> dict[str, Request]:
        """What to send now, by participant; nothing when there is no more to do."""
        settle = None if self.decided is None else _SETTLES[self.decided]
        wanted: dict[str, Request] = {}
        for name, seen in zip(self.participants, self.seen, strict=True):
            if seen is None or seen is Reply.BUSY:
                wanted[name] = Request.LOOK
            elif seen is Reply.ABSENT and settle is None:
                wanted[name] = Request.FENCE
            elif seen is Reply.PREPARED and settle is not None:
                wanted[name] = settle
        return wanted

    def after(self, replies: Mapping[str, Reply]) -> Recoverer:
        """Return the state once these replies are there; who loses one looks again."""
        seen = tuple(
            before
            if (reply := replies.get(name)) is None
            else None
            if reply is Reply.LOST
            else reply
            for name, before in zip(self.participants, self.seen, strict=True)
        )
        return replace(self, seen=seen, decided=self.decided or _concluded(seen))


def _concluded(seen: tuple[Reply | None, ...]) -> Decision | None:
    if Reply.COMMITTED in seen:
        return Decision.COMMIT
    if Reply.ABORTED in seen:
        return Decision.ABORT
    if all(reply is Reply.PREPARED for reply in seen):
        return Decision.COMMIT
    return None
