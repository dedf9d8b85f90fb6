"""Statements as a Hypothesis strategy; the weights are how often applications ask."""

from __future__ import annotations

import warnings
from typing import Any

import sqlalchemy as sa
from hypothesis import strategies as st

from tests.differential.choices import Choices, Replay
from tests.differential.data import Rows
from tests.differential.loading import Loading
from tests.differential.twins import Case

__all__ = ["SHAPES", "cases"]

SHAPES = [
    (22, Loading.entities),
    (16, Loading.rows),
    (10, Loading.groups),
    (8, Loading.totals),
    (6, Loading.relationships),
    (5, Loading.pages),
    (5, Loading.scalars),
    (5, Loading.mixtures),
    (4, Loading.counted),
    (4, Loading.windows),
    (4, Loading.sets),
    (4, Loading.ctes),
    (3, Loading.distinct),
    (3, Loading.criteria),
    (3, Loading.polymorphic),
    (3, Loading.laterals),
    (3, Loading.writes),
    (2, Loading.eager),
    (2, Loading.locking),
    (2, Loading.functions),
    (2, Loading.grouping_sets),
    (2, Loading.parts),
    (1, Loading.grouped_windows),
    (1, Loading.recursive),
    (1, Loading.values),
]


def cases(rows: Rows) -> st.SearchStrategy[Case]:
    """Return a strategy of statements, with what is known of their results."""

    @st.composite
    def one(draw: Any) -> Case:
        choices = Choices(draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = choices.weighted(SHAPES)
            try:
                first = len(choices.made)
                case: Case = make(Loading(choices, rows))
                made = choices.made[first:]
                if choices.chance(30):
                    case.again = make(Loading(Replay(made), rows, shift=1))
            except sa.exc.SQLAlchemyError as error:
                return not_made(error)
        return case

    return one()


def not_made(error: Exception) -> Case:
    """Return a case of which SQLAlchemy made no statement; there are few."""

    def work(session: Any) -> Any:
        raise error

    return Case(None, "not made", work=work)
