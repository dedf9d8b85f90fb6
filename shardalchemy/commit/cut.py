"""Which transactions a cut tears: what is known of them, and what follows; no I/O.

A *cut* is one open snapshot S of each shard. A cross-shard transaction leaves a marker
on each participant, which is committed with it: it is torn if its marker is visible in
the S of one participant and not in another's. Its participants are in its name.

Which transactions may be torn is found by comparing each S with an earlier snapshot B
of the same shard, the *base*. Every B was taken before any S was asked for. Let T be
torn, visible in S of shard i and not in that of j. S sees all that B does, so T is not
visible in B of j.

- The base is *whole*, which is to say that it tears nothing itself: a cut that was
  accepted before. Then T is not visible in B of i either, and so it is among the
  markers that S of i shows and B of i does not, the *fresh* ones of i. More than that:
  a fresh transaction of any shard is visible in no B, and so it is visible in the S of
  a shard exactly if it is fresh there. Nothing has to be asked.
- The base is not whole: any snapshots. If T is visible in S of i and not in B of i, it
  is fresh there. If it is visible in B of i, then all its participants had prepared
  before: it is sent to commit nowhere before that. So j has prepared it before the last
  B was taken, and not committed it as S of j was taken. A look at what is prepared on
  j, after the last B and before S of j, finds it. Of the transactions that are fresh or
  found prepared, what is not known of a shard is asked for in its open S.

A torn transaction is decided, for it is committed somewhere; so it is only to be waited
for, or to be helped. The cut is repaired by opening S anew where it is missing, with
the old S of the shard as base. What the new cut tears, the old one tore or a reopened
shard has as fresh: let T be visible in the new cut's S of i and not in that of j, and
so not in the old S of j. If the old S of i shows it, the old cut tore it. If not, i has
been reopened and T is fresh there. So the candidates only grow, and what was visible
stays so.

Markers are deleted `finisher.RETENTION` seconds after the last participant's commit, or
later. A cut whose base began less than that ago misses none that matters: where one is
gone, its transaction had been committed everywhere before the base was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Base", "Evidence", "Torn"]


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot of each shard, as ``pg_current_snapshot()`` writes it.

    ``began`` is a moment of ``time.monotonic()`` before the first was taken.
    """

    snapshots: Mapping[str, str]
    began: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Torn:
    """A transaction that is ``missing`` on some of its shards, or prepared on all.

    In the latter case it ``is_shown`` by none: that it is decided has to be concluded.
    """

    gid: str
    missing: tuple[str, ...]
    is_shown: bool = True


class Evidence:
    """What is known of the transactions that a cut may tear.

    *shards* are the cut's, by their permanent numbers; what a transaction did on others
    is not looked at. *base_is_whole* is said of what `opened` compared with.
    """

    def __init__(self, shards: Mapping[int, str], *, base_is_whole: bool) -> None:
        self._shards = dict(sorted(shards.items()))
        self._all_known = base_is_whole
        self._candidates: set[str] = set()
        self._visible: dict[str, set[str]] = {s: set() for s in shards.values()}
        self._missing: dict[str, set[str]] = {s: set() for s in shards.values()}
        self._prepared: dict[str, set[str]] = {s: set() for s in shards.values()}
        self._participants_by_bits: dict[str, tuple[str, ...]] = {}

    def opened(
        self, shard: str, fresh: Iterable[str], prepared: Iterable[str] = ()
    ) -> None:
        """Add what *shard* said as its snapshot was opened.

        *fresh* are the transactions that it shows and its base does not; *prepared*
        those that were found prepared between the two.
        """
        visible = self._visible[shard]
        visible.update(fresh)
        self._prepared[shard].update(prepared)
        # It was prepared after the base was taken: visible now only if it is fresh.
        self._missing[shard].update(gid for gid in prepared if gid not in visible)
        self._candidates |= visible | self._missing[shard]

    def reopened(
        self, shard: str, fresh: Iterable[str], prepared: Iterable[str] = ()
    ) -> None:
        """Add what *shard* said as it was opened anew, with its last snapshot as base.

        *prepared* counts for `decided` alone, and is what is prepared now.
        """
        new = set(fresh)
        self._prepared[shard] = set(prepared)
        self._visible[shard] |= new
        self._missing[shard] -= new
        self._candidates |= new

    def told(self, shard: str, asked: Iterable[str], visible: Iterable[str]) -> None:
        """Add which of the transactions *asked* for are visible on *shard*."""
        self._visible[shard].update(visible)
        self._missing[shard].update(set(asked) - self._visible[shard])

    def questions(self) -> dict[str, list[str]]:
        """Return by shard the transactions of which it has to be asked."""
        found: dict[str, list[str]] = {}
        if self._all_known:
            return found
        for gid in self._candidates:
            for shard in self._participants(gid):
                if gid not in self._visible[shard] and gid not in self._missing[shard]:
                    found.setdefault(shard, []).append(gid)
        return found

    def torn(self) -> list[Torn]:
        """Return what the cut tears, once there are no `questions`."""
        found = []
        for gid in self._candidates:
            shards = self._participants(gid)
            missing = tuple(s for s in shards if gid not in self._visible[s])
            if missing and len(missing) < len(shards):
                found.append(Torn(gid, missing))
        return sorted(found, key=lambda torn: torn.gid)

    def decided(self) -> list[Torn]:
        """Return what all participants have prepared, and none shows as committed.

        Its client may have been told so already. What takes part on a shard that is not
        the cut's is left out: nobody knows here whether it has prepared there.
        """
        everywhere: set[str] = set().union(*self._prepared.values())
        found = []
        for gid in everywhere:
            shards = self._participants(gid)
            if len(shards) == _count(gid) and all(
                gid in self._prepared[s] and gid not in self._visible[s] for s in shards
            ):
                found.append(Torn(gid, shards, is_shown=False))
        return sorted(found, key=lambda torn: torn.gid)

    def _participants(self, gid: str) -> tuple[str, ...]:
        """Return the cut's shards that take part in *gid*: ``….:<bits>``, as in `Gid`.

        There may be thousands of them, with few sets of participants.
        """
        bits = gid[gid.rfind(":") + 1 :]
        found = self._participants_by_bits.get(bits)
        if found is None:
            number = int(bits, 16)
            found = tuple(s for n, s in self._shards.items() if number >> n & 1)
            self._participants_by_bits[bits] = found
        return found


def _count(gid: str) -> int:
    return int(gid[gid.rfind(":") + 1 :], 16).bit_count()
