"""From sqlglot's tree of a text to what it says.

Each node that is met must be on a list of `rawwords`, with all its parts; anything
else makes the text `NotUnderstood`.
"""

from __future__ import annotations

from typing import Any

from shardalchemy.planner.lexing import MARK, Lexed, NotUnderstood
from shardalchemy.planner.rawscopes import (
    Criterion,
    Operand,
    Reading,
    Ref,
    Scope,
    Source,
)
from shardalchemy.planner.rawwords import (
    CLAUSES,
    EXPRESSIONS,
    FUNCTIONS,
    SCALAR_FUNCTIONS,
    TYPES,
)

__all__ = ["Reader"]


class Reader:
    """Reads one tree, scope by scope."""

    def __init__(self, tokens: Lexed) -> None:
        self._tokens = tokens
        self._reading = Reading("select", tokens)

    def reading(self, tree: Any) -> Reading:
        found = self._reading
        kind = type(tree).__name__
        if kind in ("Insert", "Update", "Delete"):
            found.verb = kind.lower()
            getattr(self, f"_{found.verb}")(tree)
            return found
        top = self._query(tree, None, {})
        if top is None:
            found.not_rowwise = "a set operation"
        elif len(found.scopes) > 1:
            found.not_rowwise = "a subquery"
        elif len(top.sources) != 1:
            found.not_rowwise = "a join"
        elif found.locks:
            found.not_rowwise = "FOR UPDATE"
        else:
            found.not_rowwise = top.not_rowwise or self._foreign_function(tree)
        return found

    # -- queries ---------------------------------------------------------------------

    def _query(
        self, node: Any, parent: Scope | None, ctes: dict[str, Scope | None]
    ) -> Scope | None:
        """Read a SELECT, which is returned, or a set operation."""
        kind = type(node).__name__
        ctes = self._with(node, parent, ctes)
        if kind == "Select":
            return self._select(node, parent, ctes)
        self._check(node)
        if kind == "Subquery":
            return self._query(node.this, parent, ctes)
        if kind not in ("Union", "Intersect", "Except"):
            raise NotUnderstood(f"{kind.upper()} as a query")
        self._query(node.this, parent, ctes)
        self._query(node.expression, parent, ctes)
        aside = Scope(parent)
        for part in ("order", "limit", "offset"):
            self._value(node.args.get(part), aside, ctes)
        return None

    def _with(
        self, node: Any, parent: Scope | None, ctes: dict[str, Scope | None]
    ) -> dict[str, Scope | None]:
        """Return the CTEs that *node* sees: those around it and its own."""
        clause = node.args.get("with_")
        if clause is None:
            return ctes
        self._check(clause)
        seen = dict(ctes)
        for cte in clause.expressions:
            self._check(cte)
            alias = cte.args["alias"]
            if type(cte.this).__name__ not in (
                "Select",
                "Union",
                "Intersect",
                "Except",
                "Subquery",
            ):
                raise NotUnderstood(f"{type(cte.this).__name__.upper()} in WITH")
            inner = self._query(cte.this, parent, seen)
            seen[_name(alias.this)] = None if alias.columns else inner
        return seen

    def _select(
        self, node: Any, parent: Scope | None, ctes: dict[str, Scope | None]
    ) -> Scope:
        self._check(node)
        scope = Scope(parent)
        self._reading.scopes.append(scope)
        from_ = node.args.get("from_")
        if from_ is not None:
            self._check(from_)
            self._from(scope, [from_.this], node.args.get("joins") or [], ctes)
        self._where(node, scope, ctes)
        for lock in node.args.get("locks") or ():
            self._check(lock)
            self._reading.locks = True
        self._outputs(node, scope)
        for part in ("distinct", "group", "having", "order", "limit", "offset"):
            self._value(node.args.get(part), scope, ctes)
        for part in (*node.expressions, *(node.args.get("windows") or ())):
            self._value(part, scope, ctes)
        scope.not_rowwise = self._why_not_rowwise(node)
        return scope

    def _outputs(self, node: Any, scope: Scope) -> None:
        for column in node.expressions:
            name = _name(column.args["alias"]) if _is(column, "Alias") else ""
            inner = column.this if name else column
            if _is(inner, "Star") and not any(inner.args.values()):
                scope.outputs.append(("*", Ref("*")))
            elif _is(inner, "Column"):
                ref = _ref(inner)
                scope.outputs.append((name or ref.column, ref))
            else:
                scope.outputs.append((name, None))

    def _why_not_rowwise(self, node: Any) -> str | None:
        for part, clause in (
            ("with_", "WITH"),
            ("distinct", "DISTINCT"),
            ("group", "GROUP BY"),
            ("having", "HAVING"),
            ("order", "ORDER BY"),
            ("limit", "LIMIT"),
            ("offset", "OFFSET"),
            ("windows", "WINDOW"),
        ):
            if node.args.get(part):
                return clause
        for column in node.expressions:
            problem = self._foreign_function(column)
            if problem is not None:
                return problem
        return None

    def _foreign_function(self, node: Any) -> str | None:
        """Return what in an expression is not of one row's values alone."""
        for part in node.walk():
            kind: str = type(part).__name__
            if kind == "Window":
                return "a window function"
            if kind == "Anonymous" and _function(part) not in SCALAR_FUNCTIONS:
                return f"the function {_function(part)}()"
            if kind.startswith(("Current", "Local", "Session")):
                return kind
        return None

    # -- FROM and WHERE --------------------------------------------------------------

    def _from(
        self,
        scope: Scope,
        items: list[Any],
        joins: list[Any],
        ctes: dict[str, Scope | None],
    ) -> None:
        """Add the items of a FROM clause; what a comma parts is joined apart."""
        left: list[int] = []
        for item in items:
            left = self._item(scope, item, ctes)
        self._joins(scope, left, joins, ctes)

    def _joins(
        self,
        scope: Scope,
        left: list[int],
        joins: list[Any],
        ctes: dict[str, Scope | None],
    ) -> list[int]:
        every = list(left)
        for join in joins:
            self._check(join)
            right = self._item(scope, join.this, ctes)
            every += right
            side, kind = (join.args.get(k) or "" for k in ("side", "kind"))
            on, using = join.args.get("on"), join.args.get("using")
            if not (side or kind or on or using):  # a comma
                left = right
                continue
            if side not in ("", "LEFT", "RIGHT", "FULL") or kind not in (
                "",
                "INNER",
                "OUTER",
                "CROSS",
            ):
                raise NotUnderstood(f"{side} {kind} JOIN".strip())
            both = [*left, *right]
            filters = {"LEFT": right, "RIGHT": left, "FULL": []}.get(side, both)
            self._criteria(on, scope, frozenset(filters))
            self._value(on, scope, ctes)
            for identifier in using or ():
                self._using(scope, left, right, _name(identifier), side, filters)
            left = both
        return every

    def _using(
        self,
        scope: Scope,
        left: list[int],
        right: list[int],
        column: str,
        side: str,
        filters: list[int],
    ) -> None:
        if len(left) != 1 or len(right) != 1:
            raise NotUnderstood("USING between more than two tables")
        here, there = (Ref(column, source=s) for s in (left[0], right[0]))
        scope.criteria.append(Criterion(here, there, frozenset(filters)))
        if side in ("", "LEFT"):
            scope.merged[column] = left[0]

    def _item(
        self, scope: Scope, node: Any, ctes: dict[str, Scope | None]
    ) -> list[int]:
        """Add one item of FROM, and return the places of its sources."""
        kind = type(node).__name__
        if kind not in ("Table", "Subquery"):
            raise NotUnderstood(f"{kind.upper()} in FROM")
        self._check(node)
        alias = node.args.get("alias")
        if alias is not None:
            self._check(alias)
        if kind == "Subquery" and _is(node.this, "Table"):
            if alias is not None:
                raise NotUnderstood("a name for a join")
            inner = self._item(scope, node.this, ctes)
            return self._joins(scope, inner, node.args.get("joins") or [], ctes)
        name = "" if alias is None else _name(alias.this)
        if kind == "Subquery":
            source = Source(name, scope=self._query(node, scope.parent, ctes))
        else:
            schema, table = _table(node)
            if schema is None and table in ctes:
                source = Source(name or table, scope=ctes[table])
            else:
                source = Source(name or table, (schema, table))
        scope.sources.append(source)
        left = [len(scope.sources) - 1]
        return self._joins(scope, left, node.args.get("joins") or [], ctes)

    def _where(self, node: Any, scope: Scope, ctes: dict[str, Scope | None]) -> None:
        where = node.args.get("where")
        if where is not None:
            self._check(where)
            every = frozenset(range(len(scope.sources)))
            self._criteria(where.this, scope, every)
            self._value(where.this, scope, ctes)

    def _criteria(self, node: Any, scope: Scope, filters: frozenset[int]) -> None:
        """Add the comparisons that *node* joins by AND."""
        kind = type(node).__name__
        if kind == "And":
            self._criteria(node.this, scope, filters)
            self._criteria(node.expression, scope, filters)
        elif kind == "Paren":
            self._criteria(node.this, scope, filters)
        elif kind == "EQ":
            sides = (_bare(node.this), _bare(node.expression))
            for here, there in (sides, sides[::-1]):
                if not _is(here, "Column"):
                    continue
                if _is(there, "Column"):
                    right: Any = _ref(there)
                else:
                    operand = self._operand(there)
                    if operand is None:
                        continue
                    right = (operand,)
                scope.criteria.append(Criterion(_ref(here), right, filters))
                return
        elif kind == "In" and _is(_bare(node.this), "Column"):
            operands = [self._operand(_bare(one)) for one in node.expressions]
            given = tuple(one for one in operands if one is not None)
            if given and len(given) == len(operands):
                ref = _ref(_bare(node.this))
                scope.criteria.append(Criterion(ref, given, filters))

    def _operand(self, node: Any) -> Operand | None:
        """Return the plain value that *node* is, or None."""
        kind = type(node).__name__
        if kind == "Cast":
            inner = self._operand(_bare(node.this))
            to = node.args["to"]
            if inner is None or inner.cast is not None or to.expressions:
                return None
            return Operand(inner.bind, inner.constant, to.this.name)
        if kind == "Parameter":
            return Operand(self._tokens.binds[int(node.this.this) - 1])
        if kind == "Neg":
            inner = self._operand(node.this)
            if inner is None or type(inner.constant) is not int or inner.cast:
                return None
            return Operand(constant=-inner.constant)
        if kind == "Literal":
            if node.is_string:
                value = self._tokens.strings[int(node.this[1:])]
                return None if value is None else Operand(constant=value)
            if node.this.isdecimal():
                return Operand(constant=int(node.this))
        return None

    # -- writes ----------------------------------------------------------------------

    def _insert(self, node: Any) -> None:
        self._check(node)
        ctes = self._with(node, None, {})
        found = self._reading
        schema = node.this
        if not _is(schema, "Schema"):
            raise NotUnderstood("INSERT without a list of its columns")
        self._check(schema)
        table = schema.this
        self._check(table)
        found.target = _table(table)
        scope = Scope(None)
        found.scopes.append(scope)
        for column in schema.expressions:
            if not _is(column, "Identifier"):
                raise NotUnderstood("INSERT of a part of a column")
            found.columns.append(_name(column))
        source = node.args.get("expression")
        if _is(source, "Values"):
            self._check(source)
            found.rows = []
            for row in source.expressions:
                values = row.expressions if _is(row, "Tuple") else [row]
                found.rows.append([self._operand(_bare(v)) for v in values])
                for value in values:
                    self._value(value, scope, ctes)
        elif source is None:
            raise NotUnderstood("INSERT without VALUES")
        else:
            self._query(source, None, ctes)
        conflict = node.args.get("conflict")
        if conflict is not None:
            self._check(conflict)
            for key in conflict.args.get("conflict_keys") or ():
                self._value(key, scope, ctes)
            self._set(conflict.expressions, scope, ctes)
            self._value(conflict.args.get("where"), scope, ctes)
        self._value(node.args.get("returning"), scope, ctes)

    def _update(self, node: Any) -> None:
        scope, ctes = self._written(node)
        from_ = node.args.get("from_")
        if from_ is not None:
            self._check(from_)
            self._from(scope, [from_.this], [], ctes)
        self._where(node, scope, ctes)
        self._set(node.expressions, scope, ctes)
        self._value(node.args.get("returning"), scope, ctes)

    def _delete(self, node: Any) -> None:
        scope, ctes = self._written(node)
        self._from(scope, node.args.get("using") or [], [], ctes)
        self._where(node, scope, ctes)
        self._value(node.args.get("returning"), scope, ctes)

    def _written(self, node: Any) -> tuple[Scope, dict[str, Scope | None]]:
        """Return the scope of an UPDATE or DELETE, with its target as a source."""
        self._check(node)
        ctes = self._with(node, None, {})
        scope = Scope(None)
        self._reading.scopes.append(scope)
        if not _is(node.this, "Table") or node.this.args.get("joins"):
            raise NotUnderstood(f"the target of this {type(node).__name__.upper()}")
        self._item(scope, node.this, {})
        self._reading.target = scope.sources[0].table
        return scope, ctes

    def _set(
        self, assignments: list[Any], scope: Scope, ctes: dict[str, Scope | None]
    ) -> None:
        for assignment in assignments:
            if not (_is(assignment, "EQ") and _is(assignment.this, "Column")):
                raise NotUnderstood("SET of several columns at once")
            target = _ref(assignment.this)
            if target.qualifier:
                raise NotUnderstood("SET of a part of a column")
            self._reading.assigned.append(target.column)
            self._value(assignment.expression, scope, ctes)

    # -- expressions -----------------------------------------------------------------

    def _value(self, node: Any, scope: Scope, ctes: dict[str, Scope | None]) -> None:
        """Check an expression, and read the queries in it."""
        if node is None:
            return
        kind = type(node).__name__
        if kind in ("Select", "Union", "Intersect", "Except", "Subquery"):
            self._query(node, scope, ctes)
            return
        self._check(node, EXPRESSIONS)
        if kind == "Anonymous":
            name = _function(node)
            if name not in FUNCTIONS:
                raise NotUnderstood(f"the function {node.name}()")
        if kind == "DataType" and node.this.name not in TYPES:
            raise NotUnderstood(f"the type {node.this.name}")
        for child in node.iter_expressions():
            self._value(child, scope, ctes)

    def _check(self, node: Any, known: dict[str, frozenset[str]] = CLAUSES) -> None:
        """Raise NotUnderstood for a node, or a part of it, that is on no list."""
        kind = type(node).__name__
        parts = known.get(kind)
        if parts is None:
            raise NotUnderstood(kind.upper())
        for part, value in node.args.items():
            if value and part not in parts:
                raise NotUnderstood(f"{part.strip('_').upper()} of {kind.upper()}")


def _is(node: Any, kind: str) -> bool:
    return type(node).__name__ == kind


def _bare(node: Any) -> Any:
    while _is(node, "Paren"):
        node = node.this
    return node


def _name(identifier: Any) -> str:
    """Return a name as PostgreSQL folds it."""
    if not _is(identifier, "Identifier"):
        raise NotUnderstood(f"{type(identifier).__name__.upper()} as a name")
    name: str = identifier.this
    if identifier.args.get("quoted"):
        return name
    # A table before a list of columns may have the name of a function.
    return name.lower().removeprefix(MARK)


def _function(node: Any) -> str:
    """Return the name of a function that is known, or nothing."""
    name = node.args["this"]
    if not isinstance(name, str) or not name.lower().startswith(MARK):
        return ""
    return name.lower().removeprefix(MARK)


def _table(node: Any) -> tuple[str | None, str]:
    if not _is(node.this, "Identifier"):
        raise NotUnderstood(f"{type(node.this).__name__.upper()} in FROM")
    schema = node.args.get("db")
    return None if schema is None else _name(schema), _name(node.this)


def _ref(column: Any) -> Ref:
    qualifier = tuple(
        _name(column.args[part]) for part in ("db", "table") if column.args.get(part)
    )
    star = _is(column.this, "Star")
    return Ref("*" if star else _name(column.this), qualifier)
