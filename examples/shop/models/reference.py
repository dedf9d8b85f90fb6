"""Small tables that are read everywhere and rarely change: a copy on every server."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from shardalchemy import reference_table
from shop.models.base import Base


class Currency(Base):
    __tablename__ = "currencies"
    __table_args__ = ({"info": reference_table()},)

    code: Mapped[str] = mapped_column(String(3), primary_key=True)
    name: Mapped[str]
    exponent: Mapped[int]


class Category(Base):
    __tablename__ = "categories"
    __table_args__ = ({"info": reference_table()},)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
