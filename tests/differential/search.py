"""Run many statements: in the suite a few, from the command line as many as wanted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from sqlalchemy.dialects import postgresql

from tests.differential.data import PROFILES
from tests.differential.grammar import cases
from tests.differential.twins import Case, Outcome, Tally, Twins

__all__ = ["CHUNK", "Search", "described"]

CHUNK = 250
"""Statements to one data set."""

_ORDER = ["mixed", "ties", "mixed", "lonely", "mixed", "sparse", "mixed", "empty"]
_MOST_SHRUNK = 12

assert set(_ORDER) == set(PROFILES)


class Wrong(AssertionError):
    pass


@dataclass
class Search:
    """Judges statements chunk by chunk; a chunk ends at its first wrong answer.

    A chunk is one seed: it names the data set and the statements, so that running it
    alone does the same again.
    """

    twins: Twins
    tally: Tally = field(default_factory=Tally)
    failures: list[str] = field(default_factory=list)

    def run(self, count: int, seed: int, chunk: int = CHUNK) -> None:
        """Judge at least *count* statements, in chunks from *seed* on."""
        while self.tally.total < count:
            self.chunk(seed, min(chunk, count - self.tally.total))
            seed += 1

    def chunk(self, seed: int, count: int) -> None:
        profile = _ORDER[seed % len(_ORDER)]
        self.twins.fill(profile, seed)
        self.twins.forget()  # or the chunk alone might not fail again
        seen: dict[str, Any] = {"counting": True}
        shrink = len(self.failures) < _MOST_SHRUNK

        @hypothesis_seed(seed)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(cases(self.twins.rows))
        def all_agree(case: Case) -> None:
            outcome = self._judge(case)
            if seen["counting"]:
                self.tally.count(case.shape, outcome)
            if outcome.word == "WRONG":
                seen["counting"] = False
                seen["last"] = case, outcome
                raise Wrong(outcome.detail)

        try:
            all_agree()
        except Wrong:
            case, outcome = seen["last"]
            self.failures.append(
                f"-- data set {self.twins.dataset}; again: python -m tests.differential"
                f" {count} {seed}\n{described(case)}\n/* {outcome.detail}\n*/"
            )

    def _judge(self, case: Case) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.twins.judge(case)
            except (sa.exc.CompileError, sa.exc.ArgumentError) as error:
                return Outcome("not made", str(error))
            except Exception as error:
                return Outcome("WRONG", f"crash: {type(error).__name__}: {error}")


def described(case: Case) -> str:
    """Return a case's statements as SQL for psql."""
    statements = [s for s in (case.statement, *case.others) if s is not None]
    if case.again is not None and case.again.statement is not None:
        statements.append(case.again.statement)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join([f"-- {case.shape}", *map(_as_sql, statements)])


def _as_sql(statement: Any) -> str:
    dialect = postgresql.dialect()
    try:
        literal = {"literal_binds": True}
        return f"{statement.compile(dialect=dialect, compile_kwargs=literal)};"
    except Exception:  # some types have no literals; their values are listed then
        compiled = statement.compile(dialect=dialect)
        return f"{compiled};\n-- {compiled.params}"
