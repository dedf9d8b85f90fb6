"""From a statement that no shard can answer alone to its pieces.

From the outermost scope inwards, the largest that the shards can do by themselves:

1. a local scope whose rows are finished on the shards, only merged here (`merged`);
2. one with aggregates that can be had in two steps (`partial`);
3. the rows of a local scope's FROM and WHERE, with the columns that are used above;
4. else each sharded table alone, with the conditions that are on it alone.

Where the outermost scope is done by 1 or 2 the plan is to **combine**, else to
**gather**.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BindParameter, Text, cast, literal_column
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause, _textual_label_reference
from sqlalchemy.sql.selectable import TableSample

from shardalchemy.errors import UnsupportedQueryError
from shardalchemy.planner.clauses import has_extension
from shardalchemy.planner.layout import expressions_of, upper_clauses
from shardalchemy.planner.merged import merged
from shardalchemy.planner.partial import combined, functional_keys, is_dedupable
from shardalchemy.planner.plan import PlanKind
from shardalchemy.planner.replaced import columns_in, sub_selects, without_orm
from shardalchemy.planner.rowwise import is_limited
from shardalchemy.planner.semijoins import (
    LIMITED,
    NARROWED,
    PINNED,
    WHOLE,
    Fetched,
    add_needs,
)
from shardalchemy.planner.split import FromPiece, Piece, Rows, Split, worker
from shardalchemy.schema import Kind, placement_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardalchemy.planner.layout import Layout
    from shardalchemy.planner.names import Named
    from shardalchemy.planner.scopes import Element, Scope

__all__ = ["split"]


def split(statement: Any, layout: Layout, found: Named, problem: str) -> Split:
    """Return the pieces of *statement*, which for *problem* no shard can answer alone.

    Raises UnsupportedQueryError where the pieces could not give the exact answer.
    """
    return _Splitting(statement, layout, found, problem).split()


class _Splitting:
    def __init__(
        self, statement: Any, layout: Layout, found: Named, problem: str
    ) -> None:
        self._statement = statement
        self._layout = layout
        self._functions = layout.functions
        self._found = found
        self._problem = problem
        key = statement._generate_cache_key()
        self._split = Split(PlanKind.GATHER, statement, key, layout.noted)
        self._has_text = any(text != "*" for text in found.texts) or any(
            isinstance(part, ColumnClause) and part.table is None and part.name != "*"
            for part in found.parts
        )
        self._fetched: list[Fetched] = []
        self._used: dict[int, set[str]] = {}
        for scope in layout.noted.scopes:
            for source, name in scope.used:
                self._used.setdefault(source, set()).add(name)

    def split(self) -> Split:
        made = self._split
        roots = self._layout.roots
        is_select = len(roots) == 1 and not roots[0].compound
        if any(
            isinstance(part, BindParameter)
            and str(part.key).startswith("shardalchemy_")
            for part in self._found.parts
        ):
            self._refuse("parameters of names with shardalchemy_ are reserved")
        locks = getattr(self._statement, "_for_update_arg", None) is not None
        made.tells_time = self._layout.tells_time is not None
        if is_select and self._whole(roots[0]):
            made.kind = PlanKind.COMBINE
            return made
        if locks or any(
            getattr(s.select, "_for_update_arg", None) is not None
            for s in self._layout.noted.scopes
        ):
            self._refuse("FOR UPDATE would lock other rows than are returned")
        for scope in self._layout.noted.scopes:
            select = scope.select
            if (
                select._prefixes
                or select._suffixes
                or select._hints
                or select._statement_hints
                or has_extension(select)
            ):
                self._refuse("a prefix, suffix or hint may be any SQL")
            shown = scope.parent is None or scope.as_from
            if shown and any(map(_is_star, scope.columns)):
                self._refuse("its * may be any columns; name those that are wanted")
            if any(
                part.__visit_name__ == "table_valued_column"
                for clause in expressions_of(scope)
                for part in visitors.iterate(clause)
            ):
                self._refuse("a whole row has to come from its own table")
        reason = self._functions.why_not_once(
            [
                *self._found.parts,
                *(c for s in self._layout.noted.scopes for c in expressions_of(s)),
            ]
        )
        if reason is not None:
            self._refuse(f"{reason} may read tables by itself")
        for root in roots:
            self._gather(root)
        add_needs(self._fetched)
        made.steps = f"{self._problem} over the rows of all shards"
        made.at_home = any(
            e.table is not None and placement_of(e.table).kind is Kind.HOME
            for scope in self._layout.noted.scopes
            for e in scope.elements
        )
        return made

    def _refuse(self, reason: str) -> None:
        raise UnsupportedQueryError(
            f"{self._problem} over several shards cannot be answered: {reason}. Pin"
            " every sharded table to one key (… == value on its shard key or a"
            " locator), or send the statement to one shard with"
            " execution_options(shard_key=…) or execution_options(shard='…')."
        )

    def _name(self) -> str:
        return f"rows_{len(self._split.pieces) + 1}"

    def _whole(self, root: Scope) -> bool:
        """Let the shards do the outermost scope, if they can; return whether so."""
        made = self._finished(root, [None] * len(root.columns))
        if made is None:
            return False
        piece, self._split.whole = made
        self._split.steps = _steps(root.select, piece.title)
        self._split.pieces.append(piece)
        return True

    def _finished(self, scope: Scope, names: Sequence[str | None]) -> Any:
        """Return a piece and what makes the SELECT over it, for a whole scope."""
        if scope.is_loose or self._layout.why_not_local(scope) is not None:
            return None
        if self._functions.why_not_by_shard(upper_clauses(scope)) is not None:
            return None
        if any(column.type._has_column_expression for column in scope.columns):
            return None  # what is sorted by its name is not what the shard has
        slots = self._layout.slots(scope)
        if self._layout.why_not_rows(scope) is None:
            locked = scope.select._for_update_arg is not None
            if locked and self._layout.why_not_whole(scope) is not None:
                return None
            return merged(scope, self._name(), slots, names)
        return combined(scope, self._name(), slots, names, self._functions)

    def _gather(self, scope: Scope) -> None:
        """Replace what is sharded in *scope* by pieces."""
        layout = self._layout
        if not layout.sharded_in(scope):
            return
        if not layout.is_correlated(scope) and not scope.is_loose:
            names = self._names(scope)
            if scope.parent is not None and names is not None:
                made = self._finished(scope, names)
                if made is not None:
                    piece, select = made
                    self._split.pieces.append(piece)
                    inside = len(layout.subtree(scope)) - 1
                    self._split.final.selects[scope.index] = (inside, select)
                    self._note_nested(piece, scope, names)
                    return
            if self._from(scope):
                return
        for place, element in enumerate(scope.elements):
            table = element.table
            if table is not None and placement_of(table).kind is Kind.SHARDED:
                rows = Rows(self._element(scope, element))
                self._split.final.elements[scope.index, place] = rows
        self._note_grouped(scope)
        for child in layout.children(scope):
            self._gather(child)

    def _note_grouped(self, scope: Scope) -> None:
        """Note the columns that a GROUP BY lacks once its table has no primary key."""
        by = [without_orm(c) for c in getattr(scope.select, "_group_by_clauses", ())]
        grouped = functional_keys(scope, by)
        if grouped:
            self._split.final.grouped[scope.index] = grouped

    def _note_nested(
        self, piece: Piece, scope: Scope, names: Sequence[str | None]
    ) -> None:
        """Note what stands for a subquery in the FROM of the scope around it."""
        holder = self._layout.holder(scope)
        if holder is None or scope.parent is None or piece.title != "finished rows":
            return
        size = LIMITED if is_limited(scope.select) else WHOLE
        places = {str(name): index for index, name in enumerate(names)}
        self._fetched.append(Fetched(piece, scope.parent, holder, places, size, False))

    def _names(self, scope: Scope) -> Sequence[str | None] | None:
        """Return the names by which a nested scope's columns are known outside."""
        if scope.compound:
            return (
                None
                if scope.parent is None or scope.as_from
                else ([None] * len(scope.columns))
            )
        if not scope.as_from:
            return [None] * len(scope.columns)
        holder = self._layout.holder(scope)
        if holder is None:
            return None
        names = [c.name for c in holder.clause.c]
        apart = len(set(names)) == len(scope.columns)
        return names if apart and len(names) == len(scope.columns) else None

    def _from(self, scope: Scope) -> bool:
        """Fetch the rows of a local FROM and WHERE, if it is one; return whether so."""
        layout = self._layout
        upper = upper_clauses(scope)
        if layout.why_not_local(scope) is not None or sub_selects(upper):
            return False
        if self._has_text or any(
            isinstance(part, _textual_label_reference)
            for clause in upper
            for part in visitors.iterate(clause)
        ):
            return False  # it may name any column
        names: dict[tuple[int, str], str] = {}
        columns: list[Any] = []
        for used in columns_in(map(without_orm, upper)):
            key = (hash(used.table), used.name)
            if key not in names:
                # The name of a column may be that of the result's, in a set operation.
                name, number = used.name, 0
                while name in names.values():
                    number += 1
                    name = f"{used.name}_{number}"
                names[key] = name
                columns.append(used.label(names[key]))
        if not columns:
            columns.append(literal_column("1").label("c0"))
        dedupable = is_dedupable(scope, self._functions)
        piece = Piece(
            self._name(),
            worker(
                columns,
                scope.froms,
                scope.select._where_criteria,
                # As they are written: 1.0 and 1.00 are equal, but not the same.
                **(
                    {
                        "_distinct": True,
                        "_distinct_on": tuple(cast(c.element, Text) for c in columns),
                    }
                    if dedupable
                    else {}
                ),
            ),
            tuple(c.name for c in columns),
            layout.slots(scope),
            "rows of " + _tables_in(scope),
        )
        self._split.pieces.append(piece)
        inside = len(layout.subtree(scope)) - 1
        self._split.final.froms[scope.index] = FromPiece(Rows(piece), names, inside)
        self._note_grouped(scope)
        return True

    def _element(self, scope: Scope, element: Element) -> Piece:
        """Return the piece that fetches one sharded table's rows."""
        if isinstance(element.clause, TableSample):
            self._refuse("TABLESAMPLE samples each shard alone")
        source = element.clause
        used = self._used.get(hash(source), set())
        columns = [c for c in source.c if c.name in used or self._has_text] or list(
            source.c
        )[:1]
        where = self._own_conditions(scope, element)
        restricted = next(r for r in self._layout.found if r.element is element)
        piece = Piece(
            self._name(),
            worker([c.label(c.name) for c in columns], [source], where),
            tuple(c.name for c in columns),
            restricted.slots,
            f"rows of {element.table}",
        )
        self._split.pieces.append(piece)
        size = PINNED if piece.slots is not None else NARROWED if where else WHOLE
        places = {name: index for index, name in enumerate(piece.columns)}
        self._fetched.append(Fetched(piece, scope, element, places, size, True))
        return piece

    def _own_conditions(self, scope: Scope, element: Element) -> list[Any]:
        """Return the conditions on this element alone that come before any join."""
        own = hash(element.clause)
        found = []
        for criterion in scope.criteria:
            if id(element) not in criterion.before:
                continue
            clause = without_orm(criterion.clause)
            if (
                not sub_selects([clause])
                and all(hash(c.table) == own for c in columns_in([clause]))
                and any(True for _ in columns_in([clause]))
                and self._functions.why_not_by_shard([clause]) is None
            ):
                found.append(clause)
        return found


def _is_star(column: Any) -> bool:
    """Return whether a column of a result is a ``*`` in plain SQL."""
    text = getattr(column, "text", None)
    if text is None and getattr(column, "is_literal", False):
        text = column.name
    return isinstance(text, str) and text.rstrip().endswith("*")


def _tables_in(scope: Scope) -> str:
    return ", ".join(
        dict.fromkeys(str(e.table) for e in scope.elements if e.table is not None)
    )


def _steps(select: Any, title: str) -> str:
    """Return what is done with a piece's rows to make the result of *select*."""
    done = [
        what
        for what, present in (
            ("aggregates combined", title == "partial aggregates"),
            ("groups combined", title == "groups"),
            ("HAVING", title != "finished rows" and bool(select._having_criteria)),
            ("DISTINCT", bool(select._distinct)),
            ("ORDER BY", bool(select._order_by_clauses)),
            ("LIMIT", select._limit_clause is not None),
            ("FETCH", select._fetch_clause is not None),
            ("OFFSET", select._offset_clause is not None),
        )
        if present
    ]
    return ", ".join(done) or "rows concatenated"
