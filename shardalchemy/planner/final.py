"""The SQL of a split statement: the workers', and the final one over their rows.

Both are compiled by SQLAlchemy, with the statement's own cache key: so a parameter's
value is found for each execution as it always is, and what the ORM needs to know of
the result's columns is there. The final one is the original, compiled by a compiler
that renders a piece's rows in place of what they stand for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Alias,
    BindParameter,
    Integer,
    Text,
    cast,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.sql.functions import Function
from sqlalchemy.types import NullType

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.functions import TRANSACTION_TIMES
from shardalchemy.planner.scopes import Noting, noting, parameter_names
from shardalchemy.planner.split import ColumnType, Rows, TypeNamed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.cache_key import CacheKey

    from shardalchemy.planner.split import Piece, Split

__all__ = [
    "MOST_ROWS",
    "TRANSACTION_TIME",
    "array_name",
    "check_settings",
    "fetch",
    "final",
    "probe",
    "told_types",
]

TRANSACTION_TIME = "shardalchemy_transaction_time"
"""The parameter that tells every shard when the transaction began."""

MOST_ROWS = "shardalchemy_most_rows"
"""The parameter that bounds how many rows a shard sends."""


_SETTINGS_SQL = (
    "concat_ws(' ', split_part(current_setting('DateStyle'), ',', 1),"
    " current_setting('extra_float_digits'), current_setting('array_nulls'))"
)
_EXACT = re.compile(r"ISO [123] on")


def check_settings(told: str) -> None:
    """Raise UnsupportedQueryError where a shard's settings change values as text.

    *told* is what it answers to a `fetch`.
    """
    if not _EXACT.fullmatch(told):
        raise UnsupportedQueryError(
            "a statement over several shards brings values from one to another as text,"
            " which is exact with DateStyle ISO, extra_float_digits at least 1 and"
            f" array_nulls on; this transaction has {told!r}. Set them back before it."
        )


def array_name(piece: Piece, index: int) -> str:
    """Return the parameter for the values of one of a piece's columns."""
    return f"shardalchemy_{piece.name}_{index}"


def probe(piece: Piece, split: Split, dialect: Dialect) -> Any:
    """Return what asks a shard for the types of a piece's columns, compiled.

    One row: each column's type and the collation of its text. No table is read.
    """
    source = piece.select.subquery("probed")
    one = select(literal_column("1").label("one")).subquery("one")
    asked = [
        part
        for c in source.c
        for part in (
            cast(Function("pg_typeof", c), Text),
            Function("pg_collation_for", cast(c, Text), type_=Text()),
        )
    ]
    # PostgreSQL sees that the join finds nothing, and does not run the query.
    statement = select(*asked).select_from(one.outerjoin(source, ~true()))
    return _compiled(statement, split, dialect)


# As types without a length these would cut their values to one character, or bit.
_LENGTHLESS = {"character": "bpchar", "bit": '"bit"'}


def told_types(piece: Piece, row: Sequence[Any]) -> list[ColumnType]:
    """Return the types that the answer to a `probe` tells.

    Raises UnsupportedQueryError for a column whose values cannot be sent back.
    """
    found = []
    for index in range(len(piece.columns)):
        name, collation = row[2 * index : 2 * index + 2]
        base, brackets, _ = name.partition("[]")
        if base in ("record", "cstring", "anyarray", "void", "unknown"):
            raise UnsupportedQueryError(
                f"a {base} in {piece.title} cannot be brought to one shard. Select the"
                " single columns, or cast it to a type of its own."
            )
        found.append(
            ColumnType(
                _LENGTHLESS.get(base, base) + brackets,
                None if collation in (None, '"default"') else collation,
            )
        )
    return found


def fetch(
    piece: Piece,
    types: Mapping[str, Sequence[ColumnType]],
    split: Split,
    dialect: Dialect,
) -> tuple[Any, dict[int, str]]:
    """Return what fetches a piece's rows from one shard, compiled.

    One row: the settings of the server (see `check_settings`), the number of rows, and
    an array literal for each column, NULL for none. The second value has the names, in
    the SQL, of the parameters of the cache key that are rendered once.
    """
    bounded = piece.select
    for need in piece.needs:
        type_ = types[need.source.name][need.index]
        if type_.is_plain:
            values = BindParameter(
                array_name(need.source, need.index), None, NullType()
            )
            some: Any = Function("ANY", cast(values, TypeNamed(f"{type_.name}[]")))
            bounded = bounded._generate()
            bounded._where_criteria += (need.column == some,)
    if bounded._limit_clause is None and bounded._fetch_clause is None:
        bounded = bounded._generate()
        bounded._limit_clause = BindParameter(MOST_ROWS, None, Integer())
    source = bounded.subquery("fetched")
    arrays = [
        cast(
            Function(
                "array_agg", c if type_.is_plain else cast(c, Text), type_=NullType()
            ),
            Text,
        )
        for c, type_ in zip(source.c, types[piece.name], strict=True)
    ]
    settings: Any = literal_column(_SETTINGS_SQL)
    counted = select(settings, func.count(), *arrays).select_from(source)
    compiled = _compiled(counted, split, dialect)
    names = {} if split.key is None else parameter_names(compiled, split.key)
    return compiled, {i: some[0] for i, some in names.items() if len(some) == 1}


def final(
    types: Mapping[str, Sequence[ColumnType]], split: Split, dialect: Dialect
) -> Any:
    """Return the statement over the pieces' rows, compiled."""
    statement, key = split.statement, split.key
    if split.whole is None:
        return _Final.of(dialect, statement, key, split, types)
    whole = _Final.of(dialect, split.whole(types), key, split, types)
    make: Any = dialect.statement_compiler
    original = make(dialect, statement, cache_key=key)
    # The columns of both are the same: the ORM is to find its own.
    whole.compile_state = original.compile_state
    whole.statement = statement
    for name in (
        "_result_columns",
        "_ordered_columns",
        "_textual_ordered_columns",
        "_ad_hoc_textual",
        "_loose_column_name_matching",
    ):
        setattr(whole, name, getattr(original, name))
    return whole


def _compiled(statement: Any, split: Split, dialect: Dialect) -> Any:
    return _Worker.of(dialect, statement, split.key, split.noted.orm_criteria)


class _Worker(Noting):
    """Compiles what a shard runs."""

    @classmethod
    def of(
        cls, dialect: Dialect, statement: Any, key: CacheKey | None, criteria: Any
    ) -> Any:
        make: Any = noting(dialect, cls)
        made = make.__new__(make)
        # What the ORM is to add to the entities in nested SELECTs.
        made.__dict__["_global_attributes"] = criteria
        made.__init__(dialect, statement, cache_key=key)
        return made

    def visit_function(self, func: Any, *args: Any, **kw: Any) -> Any:
        name = getattr(func, "name", None)
        if name and name.lower() in TRANSACTION_TIMES and not len(list(func.clauses)):
            moment = BindParameter(TRANSACTION_TIME, None, NullType())
            text = f"CAST({self.process(moment)} AS TIMESTAMP WITH TIME ZONE)"
            return f"({text}{TRANSACTION_TIMES[name.lower()]})"
        return super().visit_function(func, *args, **kw)


class _Final(_Worker):
    """Compiles the original with pieces in place of tables."""

    _types: Mapping[str, Sequence[ColumnType]]
    _split: Split
    _skipped: int

    @classmethod
    def of(  # type: ignore[override]
        cls,
        dialect: Dialect,
        statement: Any,
        key: CacheKey | None,
        split: Split,
        types: Mapping[str, Sequence[ColumnType]],
    ) -> Any:
        make: Any = noting(dialect, cls)
        made = make.__new__(make)
        made._types = types
        made._split = split
        made._skipped = 0
        made.__init__(dialect, statement, cache_key=key)
        return made

    def _next_index(self) -> int:
        return len(self.scopes) + self._skipped

    def visit_select(self, select_stmt: Any, asfrom: bool = False, **kw: Any) -> Any:  # type: ignore[override]
        replaced = self._split.final.selects.get(self._next_index())
        if replaced is None:
            return super().visit_select(select_stmt, asfrom=asfrom, **kw)
        inside, make = replaced
        text = super().visit_select(make(self._types), asfrom=asfrom, **kw)
        self._skipped += inside
        return text

    def _compose_select_body(
        self,
        text: Any,
        select: Any,
        compile_state: Any,
        inner_columns: Any,
        froms: Any,
        *rest: Any,
    ) -> Any:
        scope = self._around[-1]
        assert scope is not None
        grouped = self._split.final.grouped.get(scope.index)
        piece = self._split.final.froms.get(scope.index)
        if grouped or piece is not None:
            select = select._generate()
        if grouped:
            select._group_by_clauses += tuple(grouped)
        if piece is not None:
            select._where_criteria = ()
            froms = [piece.rows]
            self._skipped += piece.inside
        return super()._compose_select_body(  # type: ignore[no-untyped-call]
            text, select, compile_state, inner_columns, froms, *rest
        )

    def visit_column(self, column: Any, *args: Any, **kw: Any) -> Any:
        text = super().visit_column(column, *args, **kw)
        scope = self._around[-1]
        if scope is None or column.table is None:
            return text
        piece = self._split.final.froms.get(scope.index)
        if piece is not None:
            name = piece.names.get((hash(column.table), column.name))
            if name is not None:
                return f"{piece.rows.name}.{self.preparer.quote(name)}"
        schema = getattr(column.table, "schema", None)
        if schema and self._is_replaced(column.table):
            quote = self.preparer.quote
            prefix = f"{self.preparer.quote_schema(schema)}.{quote(column.table.name)}."
            return f"{self._stand_in(column.table)}.{text.removeprefix(prefix)}"
        return text

    def _stand_in(self, table: Any) -> str:
        """Return the name of what stands for a table: it can be in no schema."""
        name = f"{table.schema}.{table.name}" if table.schema else table.name
        return self.preparer.quote(name)

    def _is_replaced(self, table: Any) -> bool:
        return any(
            hash(scope.elements[place].clause) == hash(table)
            for scope in self.scopes
            for place in range(len(scope.elements))
            if (scope.index, place) in self._split.final.elements
        )

    def visit_table(  # type: ignore[override]
        self, table: Any, asfrom: bool = False, enclosing_alias: Any = None, **kw: Any
    ) -> Any:
        if asfrom and isinstance(table, Rows):
            return f"{self._rows(table.piece)} AS {table.name}"
        alias = enclosing_alias
        if alias is not None and alias.element is not table:
            alias = None  # of something around
        rows = self._rows_for(table, alias) if asfrom else None
        if rows is None:
            return super().visit_table(  # type: ignore[no-untyped-call]
                table, asfrom=asfrom, enclosing_alias=enclosing_alias, **kw
            )
        text = self._rows(rows.piece)
        if alias is not None:
            return text
        name = (kw.get("ambiguous_table_name_map") or {}).get(table.name)
        if name is None or table.schema:
            return f"{text} AS {self._stand_in(table)}"
        return f"{text} AS {self._truncated_identifier('alias', name)}"

    def _rows_for(self, table: Any, alias: Any) -> Rows | None:
        """Return what stands for the FROM element that is being rendered."""
        scope = self._around[-1]
        if scope is None:
            return None
        wanted = hash(table if alias is None else alias)
        for place, element in enumerate(scope.elements):
            rows = self._split.final.elements.get((scope.index, place))
            clause: Any = element.clause
            while rows is not None:
                if hash(clause) == wanted:
                    return rows
                if alias is None or not isinstance(clause, Alias):
                    break
                clause = clause.element
        return None

    def _rows(self, piece: Piece) -> str:
        """Return a FROM item of a piece's rows."""
        types = self._types[piece.name]
        arrays, names, columns = [], [], []
        for index, (name, type_) in enumerate(zip(piece.columns, types, strict=True)):
            values = BindParameter(array_name(piece, index), None, NullType())
            sent_as = type_.name if type_.is_plain else "text"
            arrays.append(f"CAST({self.process(values)} AS {sent_as}[])")
            names.append(f"v{index}")
            value = f"v{index}"
            if not type_.is_plain:
                value = f"CAST({value} AS {type_.name})"
            if type_.collation is not None:
                value = f"{value} COLLATE {type_.collation}"
            columns.append(f"{value} AS {self.preparer.quote(name)}")
        return (
            f"(SELECT {', '.join(columns)}"
            f" FROM unnest({', '.join(arrays)}) AS v ({', '.join(names)}))"
        )
