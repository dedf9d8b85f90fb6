"""The bank's tables: accounts with the transfers that moved their money, and lists."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardalchemy import reference_table, sharded_by

__all__ = [
    "ACCOUNTS",
    "BOARD",
    "GENERATION",
    "KEYS",
    "OPENING",
    "Account",
    "Base",
    "List",
    "Notice",
    "Transfer",
    "keys_of",
]

ACCOUNTS = range(1, 161)
OPENING = 200
"""What each account has at first."""

GENERATION = 8.0
"""Seconds for which a set of lists is appended to, so that none becomes long."""
KEYS = 10
"""Lists in a generation."""


BOARD = -1
"""The one notice's key, which is a list as well."""


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= 0"), {"info": sharded_by("number")})
    number: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False
    )
    balance: Mapped[int]


class Transfer(Base):
    """One account's part in a transfer, on the account's own shard."""

    __tablename__ = "transfers"
    __table_args__ = {"info": sharded_by("account")}
    account: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False
    )
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    amount: Mapped[int]


class List(Base):
    __tablename__ = "lists"
    __table_args__ = {"info": sharded_by("key")}
    key: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    items: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))


class Notice(Base):
    """A list with a copy on every shard."""

    __tablename__ = "notices"
    __table_args__ = {"info": reference_table()}
    key: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    items: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))


def keys_of(generation: int) -> range:
    return range(generation * KEYS, (generation + 1) * KEYS)
