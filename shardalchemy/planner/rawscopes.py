"""What plain SQL says, as values: its SELECTs, their tables and their criteria."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardalchemy.planner.lexing import Lexed

__all__ = ["Criterion", "Operand", "Reading", "Ref", "Scope", "Source"]


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that a column is compared with: a parameter, or a constant.

    ``cast`` is the type that it is cast to, as `TYPES` calls it, or None.
    """

    bind: str | None = None
    constant: int | str | None = None
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """A column as written; ``source`` is its place in the scope where that is known."""

    column: str
    qualifier: tuple[str, ...] = ()
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Criterion:
    """``left`` equals ``right``, or one of its operands.

    ``filters`` are the sources whose rows are left out where that is not true.
    """

    left: Ref
    right: Ref | tuple[Operand, ...]
    filters: frozenset[int]


@dataclass(slots=True, eq=False)
class Source:
    """One item of a FROM clause.

    ``table`` is a schema, or None, and a name; it is None for a subquery or CTE, and
    ``scope`` is then the SELECT it reads, or None for a set operation.
    """

    alias: str
    table: tuple[str | None, str] | None = None
    scope: Scope | None = None


@dataclass(slots=True, eq=False)
class Scope:
    """One SELECT, UPDATE or DELETE.

    ``outputs`` are its columns: a name with the column that it passes on, or None for
    an expression; the name ``*`` stands for all. ``parent`` is the scope whose columns
    it can also name. ``merged`` are the columns that USING has made one of, with the
    source whose value they have.
    """

    parent: Scope | None
    sources: list[Source] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=list)
    outputs: list[tuple[str, Ref | None]] = field(default_factory=list)
    merged: dict[str, int] = field(default_factory=dict)
    not_rowwise: str | None = None


@dataclass(slots=True, eq=False)
class Reading:
    """What a text says.

    ``target`` is the table that it writes to, ``assigned`` the columns that it sets.
    ``rows`` are those of an INSERT … VALUES, with None for what is no plain value; it
    is None for an INSERT of other kinds. ``not_rowwise`` says what keeps it from being
    a SELECT of one table whose rows can be concatenated.
    """

    verb: str
    lexed: Lexed
    scopes: list[Scope] = field(default_factory=list)
    target: tuple[str | None, str] | None = None
    assigned: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[Operand | None]] | None = None
    locks: bool = False
    not_rowwise: str | None = None

    @property
    def tables(self) -> list[tuple[str | None, str]]:
        """The tables that it names, each once."""
        read = [s.table for scope in self.scopes for s in scope.sources if s.table]
        return list(dict.fromkeys([self.target, *read] if self.target else read))
