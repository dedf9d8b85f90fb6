"""From where a statement goes to a `Plan` that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardalchemy.schema import Kind

if TYPE_CHECKING:
    from shardalchemy.planner import Plan
    from shardalchemy.planner.split import Piece
    from shardalchemy.routing import Destination
    from shardalchemy.session import ShardedSession

__all__ = ["explained"]


def explained(session: ShardedSession, where: Destination) -> Plan:
    """Return the plan of a statement that goes *where*."""
    from shardalchemy.planner import Plan, PlanKind, PlanPiece

    topology = session._topology()
    names = tuple(topology.home if s is None else s for s in where.shards)
    if where.split is not None:
        pieces = tuple(
            PlanPiece(
                piece.name,
                piece.title,
                piece.sql,
                tuple(where.pieces[piece.name]),
                _why_there(piece),
            )
            for piece in where.split.pieces
        )
        return Plan(where.split.kind, names, {}, pieces, where.split.steps)
    kind = PlanKind.ROUTE if len(names) == 1 else PlanKind.SCATTER
    why = _why(where, single=len(names) == 1)
    return Plan(kind, names, dict.fromkeys(names, why))


def _why_there(piece: Piece) -> str:
    """Return which rows of a piece are fetched, and why not fewer."""
    if piece.needs:
        among = [
            (n.column.name, n.source.name, n.source.columns[n.index])
            for n in piece.needs
        ]
        return "; ".join(f"{name} in {rows}.{column}" for name, rows, column in among)
    return "nothing pins the shard key" if piece.slots is None else ""


def _why(where: Destination, *, single: bool) -> str:
    analysis = where.analysis
    if analysis is None:
        return "named by an execution option"
    if analysis.kind is Kind.HOME:
        return "its tables live on the home shard"
    if analysis.kind is Kind.REFERENCE:
        return "every shard has a copy of its reference tables"
    if single:
        return "owns every key that the statement pins"
    if not where.pinned:
        return "nothing pins the shard key"
    return "owns some of the keys that the statement pins"
