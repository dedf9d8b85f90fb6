"""The same on databases of a linguistic collation, where text sorts unlike its bytes.

What Python or a shard compares, and not PostgreSQL under the database's collation,
comes out wrong here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import create_engine, select, text

from shardalchemy.local import LocalCluster
from tests.differential.data import WORDS
from tests.differential.models import Account, Region, Specimen
from tests.differential.search import Search
from tests.differential.test_catalogue import demand_words, demanding
from tests.differential.twins import Twins

ICU = "ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'"
WITH_ICU_ONLY = "ICU is not supported in this build"

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")


@pytest.fixture(scope="module")
def twins(shard_servers: LocalCluster) -> Iterator[Twins]:
    try:
        made = Twins(shard_servers, collation=ICU)
    except sa.exc.DBAPIError as error:
        # PostgreSQL's own wheel has no ICU; a distribution's must not come here.
        if WITH_ICU_ONLY not in str(error) or not is_of_the_wheel(shard_servers):
            raise
        pytest.skip(f"{WITH_ICU_ONLY} of PostgreSQL")
    with made:
        yield made


def is_of_the_wheel(servers: LocalCluster) -> bool:
    engine = create_engine(next(iter(servers.urls.values())))
    with engine.connect() as connection:
        version = connection.scalar(text("SELECT version()")) or ""
    engine.dispose()
    return "Debian" not in version and "Ubuntu" not in version


def test_the_databases_sort_words_as_people_do(twins: Twins) -> None:
    with twins.engine.connect() as connection:
        assert connection.scalar(select(sa.literal("a") < "B"))
        assert connection.scalar(select(sa.literal("a").collate("C") > "B"))


def test_words_are_told_apart(twins: Twins) -> None:
    accounts = [
        {"id": 100 + n, "name": word, "v": n % 3} for n, word in enumerate(WORDS * 2)
    ]
    twins.load({Account.__table__: accounts})
    demand_words(demanding(twins))


def test_words_of_other_columns(twins: Twins) -> None:
    words = [w for w in WORDS if len(w) < 7]
    specimens = [
        {"id": n, "t_text": w, "t_varchar": w, "t_char": w, "t_c": w}
        for n, w in enumerate(words)
    ]
    regions = [{"code": w, "name": w} for w in words]
    twins.load({Specimen.__table__: specimens, Region.__table__: regions})
    exact = demanding(twins)
    for column in ("t_text", "t_varchar", "t_char", "t_c"):
        x = getattr(Specimen, column)
        exact(select(x, Specimen.id).order_by(x, Specimen.id), order="total")
        exact(select(sa.func.min(x), sa.func.max(x)))
        exact(select(x).distinct().order_by(x.desc()).limit(5), order="total")
        exact(select(x, sa.func.count()).group_by(x).order_by(x), order="total")
    on = Specimen.t_text == Region.name
    joined = select(Region.code, Specimen.id).outerjoin(Specimen, on)
    exact(joined.order_by(Region.code.desc(), Specimen.id), order="total")


def test_no_answer_is_wrong(twins: Twins) -> None:
    search = Search(twins)
    search.run(120, 20, 30)
    print(f"\n{search.tally.report(8)}")
    assert not search.failures, "\n\n".join(search.failures)
