"""What the functions and operators of a statement may do, when shards evaluate them.

An expression may be evaluated on each shard for its own rows if it depends on those
rows alone. It may not if it is volatile, if it tells the time of the statement, if it
tells one server from another, or if nobody knows what it does. The time at which the
transaction began is known to all shards alike: it is asked of one of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import BinaryExpression, TextClause, UnaryExpression
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import TableSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["AGGREGATES", "SCALARS", "TRANSACTION_TIMES", "Functions", "is_custom"]

TRANSACTION_TIMES: Mapping[str, str] = {
    "now": "",
    "transaction_timestamp": "",
    "current_timestamp": "",
    "current_date": "::date",
    "current_time": "::timetz",
    "localtime": "::time",
    "localtimestamp": "::timestamp",
}
"""Functions of the moment at which the transaction began, and the cast to each."""

# Functions of one row's values, which need not be asked for: so that an application
# with none but these never does.
SCALARS = frozenset(
    """
    abs all any array_append array_cat array_length array_position array_remove
    array_to_string ascii btrim cardinality ceil ceiling char_length coalesce concat
    concat_ws date_bin date_part date_trunc extract floor format greatest grouping
    initcap json_build_array json_build_object jsonb_build_array jsonb_build_object
    jsonb_extract_path jsonb_extract_path_text jsonb_typeof least left length lower
    lpad ltrim make_date make_interval md5 mod normalize nullif overlay pg_sleep
    plainto_tsquery position power replace reverse right round row row_to_json rpad
    rtrim sign some split_part sqrt strpos substr substring to_char to_date to_json
    to_jsonb to_number to_timestamp to_tsquery to_tsvector translate trim trunc
    ts_rank unnest upper websearch_to_tsquery
    """.split()  # noqa: SIM905
)
AGGREGATES = frozenset(
    """
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count
    covar_pop covar_samp every json_agg json_object_agg jsonb_agg jsonb_object_agg max
    min mode percentile_cont percentile_disc range_agg regr_slope stddev stddev_pop
    stddev_samp string_agg sum var_pop var_samp variance xmlagg
    aggregate_strings
    """.split()  # noqa: SIM905
)
_WINDOW = frozenset(
    """
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank
    rank row_number
    """.split()  # noqa: SIM905
)
_GROUPING = frozenset({"rollup", "cube", "grouping_sets"})
_STATEMENT_TIMES = frozenset({"clock_timestamp", "statement_timestamp", "timeofday"})
# What differs between servers, or reads tables without naming them in the statement.
_OF_ONE_SERVER = re.compile(
    r"(pg_|txid_|inet_|lo_|query_to_|table_to_|schema_to_|database_to_|cursor_to_|"
    r"currval$|lastval$|nextval$|setval$|ts_stat$|current_setting$|set_config$|"
    r"dblink|version$)"
)
_HARMLESS = frozenset({"pg_typeof", "pg_column_size", "pg_size_pretty"})
_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_$]*)\s*\(")
_ODD_CALL = re.compile(r'"\s*\(')
# The signs of PostgreSQL's own operators, all of which depend on their operands alone.
_OPERATORS = frozenset(
    """
    + - * / % ^ = <> != < <= > >= || | & # ~ << >> <<= >>= ~* !~ !~* ~~ ~~* !~~ !~~*
    ^@ @ @@ @@@ -> ->> #> #>> #- @> <@ ? ?| ?& @? && &< &> &<| |&> <<| |>> -|- <-> ##
    ?# ?- ?-| ?|| <^ >^ ~= |/ ||/ <% %> <<% %>> <<-> <->> LIKE ILIKE COLLATE
    """.split()  # noqa: SIM905
)
_TIME_WORD = re.compile(
    r"\b(now|current_\w+|localtime\w*|transaction_timestamp)\b", re.IGNORECASE
)
_NO_CALLS = frozenset(
    """
    all and any array as between bit by cast char character decimal distinct else end
    exists filter float from in interval is like ilike not numeric on or order over
    partition precision similar some then time timestamp using values varchar when
    where within
    """.split()  # noqa: SIM905
)


class Functions:
    """What is known of functions by name; the servers are asked when first needed."""

    def __init__(self, ask: Callable[[], Mapping[str, str]]) -> None:
        self._ask = ask
        self._told: Mapping[str, str] | None = None

    def of(self, name: str) -> str:
        """Return what the function is: see ``catalog.function_volatilities``."""
        name = name.lower()
        if self._told is None:
            self._told = self._ask()
        if self._told.get(name) == "unknown":
            return "unknown"  # one of its overloads is an application's own
        if name in SCALARS or name in TRANSACTION_TIMES or name in _GROUPING:
            return "stable"
        if name in AGGREGATES:
            return "aggregate"
        if name in _WINDOW:
            return "window"
        if name in _STATEMENT_TIMES:
            return "volatile"
        if name not in _HARMLESS and _OF_ONE_SERVER.match(name):
            return "server"
        return self._told.get(name, "unknown")

    def of_element(self, element: FunctionElement[Any]) -> str:
        """Return what a function of a statement is."""
        packages = getattr(element, "packagenames", ())
        if packages and packages != ("pg_catalog",):
            return "unknown"
        name = getattr(element, "name", None)
        if name and name.lower() in TRANSACTION_TIMES and len(list(element.clauses)):
            return "volatile"  # with a precision: to be evaluated as it is written
        return self.of(name) if name else "unknown"

    def why_not_by_shard(self, parts: Iterable[Any]) -> str | None:
        """Return what keeps each shard from evaluating *parts* for its own rows.

        None if nothing does. Aggregates and windows are not looked at here.
        """
        for part in _all_of(parts):
            reason = self._why_not(part, ("volatile", "server", "unknown"))
            if reason is None and isinstance(part, TextClause | ColumnClause):
                text = _text_of(part)
                if text and _TIME_WORD.search(text):
                    reason = f"the time in the plain SQL {text!r}"
            if reason is not None:
                return reason
        return None

    def why_not_once(self, parts: Iterable[Any]) -> str | None:
        """Return what might read rows on the one server that evaluates *parts*."""
        for part in _all_of(parts):
            if isinstance(part, TableSample):
                return "TABLESAMPLE"
            reason = self._why_not(part, ("server", "unknown"))
            if reason is not None:
                return reason
        return None

    def _why_not(self, part: Any, bad: tuple[str, ...]) -> str | None:
        if isinstance(part, FunctionElement):
            name = getattr(part, "name", "") or type(part).__name__
            if is_custom(part) or self.of_element(part) in bad:
                return f"the function {name}()"
        elif is_custom(part):
            return f"the construct {type(part).__name__}"
        if isinstance(part, BinaryExpression | UnaryExpression):
            sign = getattr(part.operator, "opstring", None)
            if sign is not None and sign.strip().upper() not in _OPERATORS:
                return f"the operator {sign}"
        text = _text_of(part)
        if text and _ODD_CALL.search(text):
            return "a function of a quoted name in plain SQL"
        for name in _CALL.findall(text or ""):
            if name.lower() not in _NO_CALLS and self.of(name) in bad:
                return f"the function {name}() in plain SQL"
        return None


def _all_of(parts: Iterable[Any]) -> Iterable[Any]:
    for part in parts:
        yield from visitors.iterate(part)


def _text_of(part: Any) -> str | None:
    if isinstance(part, TextClause):
        return part.text
    if isinstance(part, ColumnClause) and part.is_literal:
        return str(part.name)
    return None


def is_custom(part: Any) -> bool:
    """Return whether an application has its own way to render this class."""
    return any(
        not base.__module__.startswith(("sqlalchemy.", "builtins", "typing"))
        for base in type(part).__mro__
    )
