"""A statement in pieces: what each shard runs, and what is made of all their rows.

A `Piece` is a SELECT that every shard runs for its own rows. The rows of all shards
come back as arrays, one for each column, and the **final** statement reads them where
the original read its tables. `Split` holds both; `splitting` decides on the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, TableClause, column
from sqlalchemy.types import NullType, UserDefinedType
from sqlalchemy.util import EMPTY_DICT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.planner.plan import PlanKind
    from shardalchemy.planner.scopes import Noted
    from shardalchemy.planner.slots import SlotSet

__all__ = [
    "ColumnType",
    "Final",
    "FromPiece",
    "Need",
    "Piece",
    "Rows",
    "Split",
    "TypeNamed",
    "worker",
]


_PLAIN = frozenset(
    [
        "bigint",
        "boolean",
        "bpchar",
        "bytea",
        "character varying",
        "date",
        "double precision",
        "integer",
        "numeric",
        "real",
        "smallint",
        "text",
        "timestamp with time zone",
        "timestamp without time zone",
        "uuid",
    ]
)


class Rows(TableClause):
    """The rows of a piece, as the final statement reads them."""

    inherit_cache = False

    def __init__(self, piece: Piece, types: Sequence[Any] = ()) -> None:
        columns: list[Any] = [
            column(name, type_)
            for name, type_ in zip(
                piece.columns, types or [None] * len(piece.columns), strict=True
            )
        ]
        super().__init__(piece.name, *columns)
        self.piece = piece


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A column's type as PostgreSQL names it, and its collation if it has its own."""

    name: str
    collation: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether an array of it is a list of its values, whatever they are.

        An array of arrays is not, ``unnest`` takes composites apart, and some types
        have separators of their own: those are sent as text.
        """
        return self.name in _PLAIN


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """``column`` must be among the values of the ``index``-th column of ``source``."""

    column: Any
    source: Piece
    index: int


class TypeNamed(UserDefinedType[Any]):
    """A type as PostgreSQL names it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """Return its name."""
        return self.name


@dataclass(slots=True, eq=False)
class Piece:
    """One SELECT for the shards that own any of ``slots``; None stands for all.

    ``columns`` are the names of what it selects, ``title`` says what that is. Of its
    rows only those are fetched that ``needs`` allow, after the pieces they come from:
    ``level`` counts the fetches before.
    """

    name: str
    select: Select[Any]
    columns: tuple[str, ...]
    slots: SlotSet | None
    title: str
    needs: list[Need] = field(default_factory=list)
    level: int = 0

    @property
    def sql(self) -> str:
        """What a shard runs, with names for the parameters."""
        from sqlalchemy.dialects import postgresql

        return str(self.select.compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]


@dataclass(slots=True, eq=False)
class FromPiece:
    """A piece that stands for the FROM and WHERE of a scope.

    ``names`` maps the hash of a FROM element and a column's name to the piece's column.
    """

    rows: Rows
    names: Mapping[tuple[int, str], str]
    inside: int  # the number of scopes within, which are not rendered any more


@dataclass(slots=True, eq=False)
class Final:
    """How the original is changed to read pieces instead of tables.

    ``elements`` are single FROM elements, by the index of their scope and their place
    in it; ``froms`` whole FROM clauses; ``selects`` whole SELECTs, with the number of
    scopes within. ``grouped`` are columns that a GROUP BY needs once their table is no
    table with a primary key any more.
    """

    elements: dict[tuple[int, int], Rows] = field(default_factory=dict)
    froms: dict[int, FromPiece] = field(default_factory=dict)
    selects: dict[int, tuple[int, Callable[[Any], Any]]] = field(default_factory=dict)
    grouped: dict[int, list[Any]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Split:
    """The pieces of a statement, and the final one over them.

    It is made from one ``statement``, with the cache ``key`` by which others equal to
    it find their own parameters in what is compiled here.

    ``whole`` makes the final SELECT of a statement that is replaced as a whole, from
    the types of the pieces' columns. ``at_home`` says that the final one reads tables
    of the home shard, ``tells_time`` that the time of the transaction is asked for.
    ``types`` are what a shard has told of the pieces' columns, ``steps`` is what the
    final one does.
    """

    kind: PlanKind
    statement: Any
    key: CacheKey | None
    noted: Noted
    pieces: list[Piece] = field(default_factory=list)
    final: Final = field(default_factory=Final)
    whole: Callable[[Mapping[str, Sequence[ColumnType]]], Select[Any]] | None = None
    at_home: bool = False
    steps: str = ""
    tells_time: bool = False
    types: Mapping[str, Sequence[ColumnType]] | None = None
    _compiled: dict[Any, Any] = field(default_factory=dict)

    def for_one_execution(self) -> Split:
        """Return what one execution may use, and the next one as well if it can.

        A parameter without a type of its own has that of its value: what columns made
        of it are is asked each time.
        """
        parameters = () if self.key is None else self.key.bindparams
        if self.key is not None and not any(
            isinstance(parameter.type, NullType) for parameter in parameters
        ):
            return self
        return replace(self, types=None, _compiled={})

    def compiled(self, dialect: Any, name: str, make: Callable[[Any], Any]) -> Any:
        """Return what ``make(dialect)`` has compiled, remembered under *name*."""
        found = self._compiled.get((dialect, name))
        if found is None:
            found = self._compiled[dialect, name] = make(dialect)
        return found


def worker(
    columns: Sequence[Any], froms: Sequence[Any], where: Sequence[Any], **clauses: Any
) -> Select[Any]:
    """Return a SELECT of *columns*, which are all labelled.

    It is made as the ORM makes its own: clauses that were compiled once are not to be
    interpreted again.
    """
    made: Select[Any] = Select._create_raw_select(
        _raw_columns=list(columns),
        _from_obj=tuple(froms),
        _where_criteria=tuple(where),
        _propagate_attrs=EMPTY_DICT,
        **clauses,
    )
    return made
