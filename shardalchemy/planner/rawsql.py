"""What plain SQL says: its tables, in which SELECT each is, and what it is held to.

`lexing` cuts the text, sqlglot parses what is left, and `rawreader` reads the tree by
an allow-list: a statement, a clause, an expression or a function that is not on it
makes the text `Unread`, as does anything that sqlglot did not keep. So what is read is
all there is. Nothing here knows of declarations; `rawpins` compares with them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import sqlglot

from shardalchemy.planner.lexing import MARK, Lexed, NotUnderstood, lexed
from shardalchemy.planner.rawreader import Reader
from shardalchemy.planner.rawwords import NOISE

if TYPE_CHECKING:
    from shardalchemy.planner.rawscopes import Reading

__all__ = ["Unread", "read"]

_MARK = re.compile(MARK, re.IGNORECASE)
_PARAMETER = re.compile(r"\$(\d+)")


@dataclass(frozen=True, slots=True)
class Unread:
    """A text that is not understood, and why.

    ``raw`` is the text without its comments, or None where even that is in doubt.
    """

    problem: str
    raw: str | None = None


@lru_cache(512)
def read(compiled: str) -> Reading | Unread:
    """Return what a text says, as SQLAlchemy has compiled it."""
    raw = None
    try:
        tokens = lexed(compiled)
        raw = tokens.raw
        return Reader(tokens).reading(_parsed(tokens))
    except NotUnderstood as problem:
        return Unread(str(problem), raw)
    except Exception as error:  # a tree of a shape that is not known here
        return Unread(f"{type(error).__name__} ({error}) in reading it", raw)


def _parsed(tokens: Lexed) -> Any:
    """Return sqlglot's tree, if it has all that the text has."""
    if tokens.first not in ("select", "insert", "update", "delete", "with", "("):
        raise NotUnderstood(tokens.first.upper() or "no statement")
    try:
        trees = sqlglot.parse(tokens.sql, dialect="postgres")
        if len(trees) != 1 or trees[0] is None:
            raise NotUnderstood("several statements")
        tree: Any = trees[0]
        written = tree.sql(
            dialect="postgres", unsupported_level=sqlglot.ErrorLevel.RAISE
        )
    except NotUnderstood:
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0].partition(". Line ")[0]
        raise NotUnderstood(f"what sqlglot does not parse: {first_line}") from error
    written = _MARK.sub("", written.replace("%", "%%"))
    again = lexed(_PARAMETER.sub(r"%(\1)s", written))
    for kept, had in (
        (_telling(again.words), _telling(tokens.words)),
        (again.names, tokens.names),
        (Counter(again.binds), Counter(str(n + 1) for n in range(len(tokens.binds)))),
    ):
        lost = (had - kept) + (kept - had)
        if lost:
            raise NotUnderstood(f"{next(iter(lost)).upper()} where it stands")
    return tree


def _telling(words: Counter[str]) -> Counter[str]:
    return Counter({w: n for w, n in words.items() if w not in NOISE})
