"""A small model for commits: accounts sharded by their number, and a ledger at home."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardalchemy import Cluster, sharded_by


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= 0"), {"info": sharded_by("number")})
    number: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False
    )
    balance: Mapped[int]


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def number_on(cluster: Cluster, shard: str, start: int = 1) -> int:
    """Return the first account number from *start* that lives on *shard*."""
    return next(
        n
        for n in range(start, start + 10_000)
        if cluster.shard_for(Account, n) == shard
    )
