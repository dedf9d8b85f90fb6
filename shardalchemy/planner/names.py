"""What a statement names: its tables, and the plain SQL in it that nobody parses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    CTE,
    DDL,
    Alias,
    Delete,
    Insert,
    Table,
    TableClause,
    TextClause,
    Update,
)
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ClauseElement, ColumnClause
from sqlalchemy.sql.selectable import TextualSelect

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Guard", "Named", "named", "whole_text"]

_UNICODE = re.compile(r"\\(?:\+00([0-9a-f]{4})|([0-9a-f]{4}))")
_WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")


@dataclass(slots=True)
class Named:
    """The tables of a statement, its pieces of plain SQL, and all its parts.

    ``nested_write`` is an INSERT, UPDATE or DELETE within another statement.
    """

    tables: dict[Table, None]
    texts: list[str]
    nested_write: bool
    parts: list[Any] = field(default_factory=list)

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of its tables."""
        return {placement_of(table).kind for table in self.tables}

    def of_kind(self, *kinds: Kind) -> str:
        """Return the names of its tables of these kinds, for a message."""
        return ", ".join(
            sorted(str(t) for t in self.tables if placement_of(t).kind in kinds)
        )

    def target(self, statement: Any) -> Table:
        """Return the table that an INSERT, UPDATE or DELETE writes to."""
        table: Any = statement.table
        while isinstance(table, Alias):
            table = table.element
        return plain(table)

    def check_mixture(self) -> None:
        """Refuse sharded and home tables in one statement."""
        if {Kind.SHARDED, Kind.HOME} <= self.kinds:
            home = self.of_kind(Kind.HOME)
            raise UnsupportedQueryError(
                f"{self.of_kind(Kind.SHARDED)} is sharded and {home} lives on the home"
                " shard alone; one statement cannot see both. Load them in two"
                f" statements, or declare {home} with sharded_by(…) or"
                " reference_table()."
            )

    def check_nested_writes(self) -> None:
        """Refuse a write within another statement, unless all is at home."""
        if self.nested_write and self.kinds - {Kind.HOME}:
            raise UnsupportedQueryError(
                "an INSERT, UPDATE or DELETE inside another statement is not supported"
                f" beside {self.of_kind(Kind.SHARDED, Kind.REFERENCE)}. Execute it as a"
                " statement of its own."
            )

    def check_texts(self) -> None:
        """Refuse plain SQL with subqueries beside tables that are not at home."""
        for text in self.texts:
            words = {word.lower() for word in _WORDS.findall(text)}
            if words & {"select", "with", "table", "values"}:
                raise UnsupportedQueryError(
                    "a textual subquery beside sharded or reference tables is not"
                    " parsed. Write it as a select()."
                )


def plain(table: Any) -> Table:
    """Return the table itself of one that the ORM has annotated."""
    bare = table._deannotate() if table._annotations else table
    found: Table = getattr(bare, "_Annotated__element", bare)
    return found


def named(statement: Any) -> Named:
    """Return what *statement* names, in all its parts."""
    found = Named({}, [], False)
    seen: set[int] = set()
    stack = [statement]
    while stack:
        for part in visitors.iterate(stack.pop()):
            if id(part) in seen:
                continue
            seen.add(id(part))
            found.parts.append(part)
            if isinstance(part, Table):
                found.tables.setdefault(plain(part))
            elif isinstance(part, TextClause):
                found.texts.append(part.text)
            elif isinstance(part, ColumnClause):
                if part.is_literal:
                    found.texts.append(part.name)
                if part.table is not None:
                    stack.append(part.table)
            elif isinstance(part, CTE):
                stack.append(part.element)
            elif isinstance(part, Insert | Update | Delete):
                found.nested_write |= part is not statement
                # SQLAlchemy leads neither into rows of values nor, 2.0, ON CONFLICT.
                stack += _elements(getattr(part, "_post_values_clause", None))
                for row in getattr(part, "_multi_values", ()):
                    stack += [
                        value
                        for values in row
                        for value in values.values()
                        if isinstance(value, ClauseElement)
                    ]
            elif isinstance(part, ExecutableDDLElement):
                stack += _elements(part)
                if isinstance(part, DDL):
                    found.texts.append(part.statement)
    return found


def _elements(holder: Any) -> list[Any]:
    """Return the SQL elements among an object's attributes."""
    if holder is None:
        return []
    flat: list[Any] = []
    for value in vars(holder).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            flat += item if isinstance(item, tuple) else (item,)
    return [one for one in flat if isinstance(one, ClauseElement)]


def whole_text(statement: Any) -> TextClause | None:
    """Return the text that *statement* is nothing but, or None."""
    inner = statement.element if isinstance(statement, FromStatement) else statement
    if isinstance(inner, TextualSelect):
        if inner._independent_ctes:
            return None
        inner = inner.element
    return inner if isinstance(inner, TextClause) else None


class Guard:
    """The tables that the servers are known to hold sharded or as copies.

    Views over them are among them. Plain SQL that has one of their names in it, or a
    ``Table`` of such a name without a declaration, is not to run unrouted.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self._names = names
        bare = {name.partition(".")[2].lower() for name in names}
        self._words = {name for name in bare if _WORDS.fullmatch(name)}
        self._odd_names = bare - self._words

    def with_names(self, names: Iterable[str]) -> Guard:
        """Return a guard of these ``schema.name`` as well."""
        return Guard(self._names | frozenset(names))

    @property
    def names(self) -> frozenset[str]:
        """The ``schema.name`` of each of them."""
        return self._names

    def words_in(self, text: str) -> set[str]:
        """Return which of the names, without their schemas, plain SQL has in it."""
        lower = text.lower()
        if 'u&"' in lower:  # a name whose letters are given by their numbers
            lower = _UNICODE.sub(lambda m: chr(int(m[1] or m[2], 16)), lower).lower()
        hits = self._words & set(_WORDS.findall(lower))
        return hits | {name for name in self._odd_names if name in lower}

    def check(self, found: Named) -> None:
        """Raise UnsupportedQueryError where what is named is not to run unrouted."""
        for text in found.texts:
            hits = self.words_in(text)
            if hits:
                raise UnsupportedQueryError(
                    f"textual SQL names {', '.join(sorted(hits))}, whose rows are on"
                    " several shards, and it is not parsed. Write it as a select(), or"
                    " say where it runs: execution_options(shard_key=…) or"
                    " execution_options(shard='…')."
                )
        for part in found.parts:
            if not isinstance(part, TableClause):
                continue
            declared = isinstance(part, Table) and (
                placement_of(plain(part)).kind is not Kind.HOME
            )
            schema = getattr(part, "schema", None) or "public"
            if not declared and f"{schema}.{part.name}" in self._names:
                raise UnsupportedQueryError(
                    f"{part.name} is sharded on the servers, but this"
                    f" {type(part).__name__} object has no info=sharded_by(…); a"
                    " reflected table needs it as well. Use the declared one, or"
                    " execution_options(shard='…')."
                )
