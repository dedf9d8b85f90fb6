"""PostgreSQL's lexical rules, so that nobody else has to guess at them.

A text is cut into tokens as PostgreSQL cuts it: nested comments, dollar quoting,
``E''`` strings, operators by their longest match. What is left without doubt is
written again in the plainest form, with every string replaced by a number, which a
parser of another make then cannot misread. What is in doubt is `NotUnderstood`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from shardalchemy.planner.rawwords import FUNCTIONS, OWN_SYNTAX

__all__ = ["MARK", "Lexed", "NotUnderstood", "lexed"]

MARK = "shardalchemy_"
"""What is put before the name of a function, so that no parser knows better."""


class NotUnderstood(Exception):
    """What is in a text that is not certain to mean what it seems to."""


# As SQLAlchemy renders them: `%(name)s`, and an expanding one until it is executed.
_BIND = re.compile(r"%%|%\((\w+)\)s|__\[POSTCOMPILE_([^\s\]~]+)(?:~~.*?~~)?\]")
_TOKEN = re.compile(
    r"""
      (?P<space>[ \t\r\n\f]+ | --[^\r\n]*)
    | (?P<comment>/\*)
    | (?P<bind>\x01\d+\x02)
    | (?P<quoted>"(?:[^"]|"")+")
    | (?P<escaped>[eE]'(?:[^'\\]|''|\\.)*')
    | (?P<string>'(?:[^']|'')*')
    | (?P<dollar>\$(?P<tag>(?:[A-Za-z_][A-Za-z0-9_]*)?)\$(?P<body>.*?)\$(?P=tag)\$)
    | (?P<word>[A-Za-z_][A-Za-z0-9_$]*)
    | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<cast>::)
    | (?P<mark>[(),.;\[\]])
    | (?P<operator>[-+*/<>=~!@\#%^&|`?]+)
    """,
    re.VERBOSE | re.DOTALL,
)
_IN_WORDS = re.compile(r"[\w$]")
_PREFIXED = re.compile(r"[bxn]'|u&['\"]", re.IGNORECASE)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_OPERATORS = frozenset(
    """
    = <> != < > <= >= + - * / % || ~ ~* !~ !~* -> ->> #> #>> @> <@ && & |
    """.split()  # noqa: SIM905
)
_NAME_LIMIT = 63  # bytes; PostgreSQL cuts off what is longer


@dataclass(slots=True)
class Lexed:
    """A text in its plainest form.

    In ``sql`` the string ``'s3'`` stands for ``strings[3]``, None where its value is in
    doubt, and ``$3`` for the parameter ``binds[2]``. ``words`` counts the unquoted
    words, in small letters, and ``names`` the quoted ones as they are. ``raw`` is the
    text without its comments.
    """

    sql: str
    raw: str = ""
    words: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    strings: list[str | None] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)
    first: str = ""


def lexed(compiled: str) -> Lexed:
    """Return the tokens of a text as SQLAlchemy has compiled it.

    Raises NotUnderstood where they are in doubt.
    """
    if "\x00" in compiled or "\x01" in compiled or "\x02" in compiled:
        raise NotUnderstood("a control character")
    found = Lexed("")

    def marked(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        found.binds.append(match[1] or match[2])
        return f"\x01{len(found.binds)}\x02"

    sql = _BIND.sub(marked, compiled)
    plain: list[str] = []
    raw: list[str] = []
    before = ""
    at = 0
    while at < len(sql):
        match = _TOKEN.match(sql, at)
        if match is None or match.end() == at:
            raise NotUnderstood(f"{sql[at : at + 12]!r}")
        kind, token, at = match.lastgroup or "", match[0], match.end()
        if kind == "space":
            continue
        if kind == "comment":
            at = _end_of_comment(sql, at)
            continue
        if kind == "operator":
            token = _one_operator(token)
            at = match.start() + len(token)
            if token not in _OPERATORS:
                raise NotUnderstood(f"the operator {token}")
        if kind == "number" and _IN_WORDS.match(sql, at):
            raise NotUnderstood(f"the number {token}{sql[at]}")
        if kind != "bind" and "\x01" in token:
            raise NotUnderstood("a parameter within quotes")
        if before == ";":
            raise NotUnderstood("several statements")
        text = _plain(kind, token, match, found)
        if text.startswith("'") and before.startswith("'"):
            raise NotUnderstood("a string in two parts")
        if kind == "word" and _PREFIXED.match(sql, match.start()):
            raise NotUnderstood(f"a string or name that begins with {token}")
        found.first = found.first or token.lower()
        if token == "(" and _is_function(before):
            plain[-1] = MARK + before
            found.words[before.lower()] -= 1
            found.words[plain[-1].lower()] += 1
        before = text
        raw.append(token)
        if text != ";":
            plain.append(text)
    found.sql = " ".join(plain)
    found.raw = " ".join(raw)
    return found


def _is_function(word: str) -> bool:
    return word.lower() in FUNCTIONS - OWN_SYNTAX


def _end_of_comment(sql: str, at: int) -> int:
    """Return where the comment that begins before *at* ends; they may be nested."""
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(sql, at)
        if edge is None:
            raise NotUnderstood("an open comment")
        depth += 1 if edge[0] == "/*" else -1
        at = edge.end()
    return at


def _one_operator(run: str) -> str:
    """Return the operator that a run of operator characters begins with.

    It ends before a comment, and does not end in a sign unless it has a character that
    no standard operator has. See "Operators" in PostgreSQL's chapter "Lexical
    Structure".
    """
    for comment in ("--", "/*"):
        if comment in run[1:]:
            run = run[: run.index(comment, 1)]
    while len(run) > 1 and run[-1] in "+-" and not set(run) & set("~!@#%^&|`?"):
        run = run[:-1]
    return run


def _plain(kind: str, token: str, match: re.Match[str], found: Lexed) -> str:
    """Return *token* in its plainest form, and note it in *found*."""
    if kind == "bind":
        return f"${token[1:-1]}"
    if kind == "word":
        _check_length(token)
        if token.lower().startswith(MARK):
            raise NotUnderstood(f"the name {token}")
        found.words[token.lower()] += 1
        return token
    if kind == "quoted":
        name = token[1:-1].replace('""', '"')
        _check_length(name)
        found.names[name] += 1
        return token
    if kind in ("string", "escaped", "dollar"):
        value: str | None = None
        if kind == "dollar":
            value = match["body"]
        elif "\\'" in token and kind == "string":
            # Where it ends depends on standard_conforming_strings.
            raise NotUnderstood("a backslash before a quote")
        elif "\\" not in token:
            value = token[token.index("'") + 1 : -1].replace("''", "'")
        found.strings.append(value)
        return f"'s{len(found.strings) - 1}'"
    return token


def _check_length(name: str) -> None:
    if len(name.encode()) > _NAME_LIMIT:
        raise NotUnderstood(f"the long name {name}")
