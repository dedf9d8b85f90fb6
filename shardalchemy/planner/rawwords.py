"""What is understood of plain SQL: nodes of sqlglot's tree, functions, types.

All of these are allow-lists. What is missing here is refused, never misread.
"""

from __future__ import annotations

__all__ = [
    "CLAUSES",
    "EXPRESSIONS",
    "FUNCTIONS",
    "NOISE",
    "OWN_SYNTAX",
    "SCALAR_FUNCTIONS",
    "TYPES",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _parts(text: str) -> dict[str, frozenset[str]]:
    lines = (line.split() for line in text.strip().splitlines())
    return {kind: frozenset(parts) for kind, *parts in lines}


CLAUSES = _parts(
    """
    Select expressions from_ joins where group having order limit offset distinct windows with_ locks
    Union this expression distinct order limit offset with_
    Intersect this expression distinct order limit offset with_
    Except this expression distinct order limit offset with_
    Subquery this alias joins with_
    With expressions
    CTE this alias materialized
    TableAlias this
    From this
    Where this
    Table this db alias joins only
    Join this side kind on using
    Lock expressions update wait key
    Insert this expression conflict returning with_
    Schema this expressions
    Values expressions
    OnConflict expressions action conflict_keys constraint where
    Update this expressions from_ where returning with_
    Delete this using where returning with_
    """  # noqa: E501
)
"""The clauses of a statement by sqlglot's names, and the parts each may have."""

_BINARY = """
    And Or EQ NEQ GT GTE LT LTE Add Sub Mul Div Mod DPipe Is Like ILike SimilarTo Escape
    NullSafeEQ NullSafeNEQ Collate BitwiseAnd BitwiseOr RegexpLike RegexpILike
    ArrayContainsAll ArrayContainedBy ArrayOverlaps JSONBExtract JSONBExtractScalar
"""
EXPRESSIONS = _parts(
    """
    Alias this alias
    All this
    Anonymous this expressions
    Any this
    Array expressions
    AtTimeZone this zone
    Between this low high symmetric
    Boolean this
    Bracket this expressions offset safe
    Case this ifs default
    Cast this to
    Column this table db
    CurrentDate
    CurrentTimestamp this
    CurrentTime this
    CurrentUser
    DataType this expressions nested
    DataTypeParam this
    Distinct expressions on
    Exists this
    Extract this expression
    Filter this expression
    Group expressions
    Having this
    Identifier this quoted
    If this true
    In this expressions query
    Interval this unit
    JSONExtract this expression only_json_types
    JSONExtractScalar this expression only_json_types
    JSONPath expressions
    JSONPathKey this
    JSONPathRoot
    JSONPathSubscript this
    Limit expression
    Literal this is_string
    Localtime this
    Localtimestamp this
    Neg this
    Not this
    Null
    Offset expression
    Order this expressions
    Ordered this desc nulls_first
    Parameter this
    Paren this
    Returning expressions
    Star
    Substring this start length
    Trim this expression position
    Tuple expressions
    Var this
    Where this
    Window this partition_by order spec alias over
    WindowSpec kind start start_side end end_side exclude
    WithinGroup this expression
    """
) | {kind: _words("this expression") for kind in _BINARY.split()}
EXPRESSIONS["DPipe"] |= {"safe"}
EXPRESSIONS["Is"] |= {"negate"}
"""The same of expressions."""

SCALAR_FUNCTIONS = _words(
    """
    abs age ascii btrim ceil ceiling char_length coalesce concat concat_ws date_bin
    date_part date_trunc floor format greatest initcap jsonb_build_object
    json_build_object jsonb_extract_path jsonb_extract_path_text least left length lower
    lpad ltrim make_date md5 mod nullif power replace reverse right round rpad
    rtrim sign split_part sqrt strpos substr substring to_char to_date to_number
    to_timestamp translate trim trunc upper
    """
)
"""Functions of one row's values."""

FUNCTIONS = SCALAR_FUNCTIONS | _words(
    """
    array_agg array_append array_cat array_length array_position array_prepend
    array_remove array_to_string avg bit_and bit_or bool_and bool_or cardinality
    clock_timestamp corr count cume_dist decode dense_rank encode every exp
    first_value gen_random_uuid grouping isfinite json_agg json_build_array
    json_object_agg jsonb_agg jsonb_array_length jsonb_build_array jsonb_object_agg
    jsonb_set jsonb_typeof justify_days justify_hours justify_interval lag last_value
    lead ln log make_interval make_timestamp make_timestamptz max min mode now
    nth_value ntile octet_length percent_rank percentile_cont percentile_disc
    quote_ident quote_literal random rank regexp_replace repeat row_number row_to_json
    statement_timestamp stddev stddev_pop stddev_samp string_agg string_to_array sum
    to_json to_jsonb transaction_timestamp var_pop var_samp variance width_bucket
    """
)
"""Functions that read no tables, and change nothing."""

OWN_SYNTAX = _words("substring trim")
"""Those of them whose arguments may have words between them."""

TYPES = _words(
    """
    BIGINT INT SMALLINT TEXT VARCHAR UUID VARBINARY DATE BOOLEAN DECIMAL DOUBLE FLOAT
    TIMESTAMP TIMESTAMPTZ TIME TIMETZ INTERVAL JSON JSONB ARRAY
    """
)
"""Types that a value may be cast to, as sqlglot calls them."""

NOISE = _words(
    """
    as asc inner outer cast bigint int int2 int4 int8 integer smallint text varchar
    character varying uuid bytea date bool boolean decimal numeric double precision
    float float4 float8 real timestamp timestamptz time timetz with without zone
    interval json jsonb
    """
)
"""Words that say nothing, or that sqlglot writes in another way."""
