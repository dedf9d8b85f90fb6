"""What the blog reads."""

from __future__ import annotations

from typing import Any

import pytest
from blog_data import fill
from blog_models import (
    Attachment,
    Author,
    Comment,
    Image,
    Moderator,
    Person,
    Post,
    Tag,
    post_tag,
)
from sqlalchemy import Integer as SqlInteger
from sqlalchemy import (
    and_,
    bindparam,
    case,
    column,
    exists,
    func,
    lambda_stmt,
    literal,
    or_,
    select,
    text,
    tuple_,
    union_all,
    values,
)
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import (
    Bundle,
    aliased,
    contains_eager,
    defer,
    immediateload,
    joinedload,
    lazyload,
    load_only,
    raiseload,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    undefer,
    with_parent,
    with_polymorphic,
)


@pytest.fixture(autouse=True)
def _filled(Session: Any) -> None:
    with Session.begin() as session:
        fill(session)


def test_a_post_is_found_by_its_slug_with_its_author(session: Any) -> None:
    post = session.scalars(select(Post).where(Post.slug == "joins")).one()
    assert (post.title, post.author.name, post.author.email) == (
        "On joins",
        "Ada",
        "ada@example.org",
    )
    assert post.author.posts[0] is post


@pytest.mark.parametrize(
    "load", [lazyload, joinedload, selectinload, subqueryload, immediateload]
)
def test_every_loading_strategy_brings_the_same_children(
    session: Any, load: Any
) -> None:
    posts = (
        session.scalars(
            select(Post)
            .options(load(Post.comments), load(Post.tags), load(Post.attachments))
            .order_by(Post.id)
        )
        .unique()
        .all()
    )
    assert [
        (
            post.slug,
            [c.writer for c in post.comments],
            [t.name for t in post.tags],
            [type(a).__name__ for a in post.attachments],
        )
        for post in posts
    ] == [
        ("joins", ["Bea", "Cal", "Dan"], ["python", "sql"], ["Attachment", "Image"]),
        ("windows", [], ["sql"], []),
        ("compilers", [], [], []),
    ]


def test_raiseload_refuses_to_load_lazily(session: Any) -> None:
    post = session.scalars(select(Post).options(raiseload(Post.tags)).limit(1)).one()
    with pytest.raises(sa_exc.InvalidRequestError, match=r"Post\.tags"):
        _ = post.tags


def test_a_paged_list_with_joined_children_counts_posts_not_rows(session: Any) -> None:
    page = (
        session.scalars(
            select(Post)
            .options(joinedload(Post.comments), joinedload(Post.author))
            .order_by(Post.stars.desc())
            .limit(2)
            .offset(1)
        )
        .unique()
        .all()
    )
    assert [post.slug for post in page] == ["joins", "windows"]


def test_comments_make_a_thread(session: Any) -> None:
    top = session.scalars(
        select(Comment)
        .where(Comment.parent_id.is_(None))
        .order_by(Comment.id)
        .options(selectinload(Comment.replies, recursion_depth=2))
    ).all()
    assert [(c.writer, [r.writer for r in c.replies]) for c in top] == [
        ("Bea", ["Dan"]),
        ("Cal", []),
    ]


def test_a_recursive_cte_walks_the_thread(session: Any) -> None:
    tree = (
        select(Comment.id, Comment.writer, literal(0).label("depth"))
        .where(Comment.parent_id.is_(None))
        .cte("tree", recursive=True)
    )
    child = aliased(Comment)
    tree = tree.union_all(
        select(child.id, child.writer, tree.c.depth + 1).join(
            tree, child.parent_id == tree.c.id
        )
    )
    rows = session.execute(select(tree.c.writer, tree.c.depth).order_by(tree.c.id))
    assert [tuple(row) for row in rows] == [("Bea", 0), ("Cal", 0), ("Dan", 1)]


def test_aggregates_group_and_filter(session: Any) -> None:
    rows = session.execute(
        select(
            Author.name,
            func.count(Post.id.distinct()),
            func.sum(Post.stars).filter(Post.is_popular),
        )
        .join(Author.posts)
        .group_by(Author.name)
        .having(func.count(Post.id) > 0)
        .order_by(Author.name)
    ).all()
    assert [tuple(row) for row in rows] == [("Ada", 2, 12), ("Grace", 1, 40)]


def test_window_functions_rank_posts_of_an_author(session: Any) -> None:
    rank = func.rank().over(partition_by=Post.author_id, order_by=Post.stars.desc())
    rows = session.execute(select(Post.slug, rank.label("rank")).order_by(Post.slug))
    assert [tuple(row) for row in rows] == [
        ("compilers", 1),
        ("joins", 1),
        ("windows", 2),
    ]


def test_hybrid_and_column_property_agree_with_python(session: Any) -> None:
    posts = session.scalars(select(Post).where(Post.is_popular)).all()
    assert {p.slug for p in posts} == {"joins", "compilers"}
    assert all(p.is_popular for p in posts)
    assert {p.slug: p.comment_count for p in posts} == {"joins": 3, "compilers": 0}


def test_a_deferred_column_is_loaded_when_asked_for(session: Any) -> None:
    post = session.scalars(select(Post).where(Post.slug == "joins")).one()
    assert "body" not in post.__dict__
    assert post.body == "Left, right."
    session.expunge_all()
    eager = session.scalars(
        select(Post).where(Post.slug == "joins").options(undefer(Post.body))
    ).one()
    assert eager.__dict__["body"] == "Left, right."


def test_load_only_and_defer_leave_the_rest_for_later(session: Any) -> None:
    post = session.scalars(
        select(Post).options(load_only(Post.slug), defer(Post.comment_count)).limit(1)
    ).one()
    assert "title" not in post.__dict__
    assert post.title.startswith("On ")


def test_people_come_back_as_what_they_are(session: Any) -> None:
    people = session.scalars(select(Person).order_by(Person.id)).all()
    assert sorted(type(p).__name__ for p in people) == ["Author", "Author", "Moderator"]
    moderator = session.scalars(select(Person).where(Person.name == "Max")).one()
    assert moderator.since == 1999  # from the child's table, in a statement of its own


def test_with_polymorphic_and_selectin_polymorphic_load_children(session: Any) -> None:
    everyone = with_polymorphic(Person, [Author, Moderator])
    found = session.scalars(
        select(everyone)
        .where(or_(everyone.Author.bio == "Counts.", everyone.Moderator.since > 1990))
        .order_by(everyone.name)
    ).all()
    assert [p.name for p in found] == ["Ada", "Max"]
    session.expunge_all()
    people = session.scalars(
        select(Person)
        .options(selectin_polymorphic(Person, [Author, Moderator]))
        .order_by(Person.name)
    ).all()
    assert [p.__dict__.get("bio") for p in people] == ["Counts.", "", None]


def test_single_table_inheritance_filters_by_kind(session: Any) -> None:
    assert [a.url for a in session.scalars(select(Image))] == ["/b.png"]
    assert session.scalar(select(func.count()).select_from(Attachment)) == 2
    both = session.scalars(select(Attachment).order_by(Attachment.url)).all()
    assert [type(a) for a in both] == [Attachment, Image]
    assert both[1].width == 640


def test_legacy_query_counts_slices_and_pages(session: Any) -> None:
    query = session.query(Post).order_by(Post.slug)
    assert query.count() == 3
    assert [p.slug for p in query[1:3]] == ["joins", "windows"]
    assert query.first().slug == "compilers"
    assert query.filter_by(slug="joins").one().stars == 12
    assert query.filter(Post.slug == "nothing").one_or_none() is None
    assert session.query(query.exists()).scalar() is True
    names = session.query(Author.name, Post.slug).join(Post).order_by(Post.id)
    assert names.all()[0] == ("Ada", "joins")
    assert session.query(Post).filter(Post.tags.any(Tag.name == "python")).count() == 1


def posts_id(session: Any) -> int:
    found: int = session.scalar(select(Post.id).where(Post.slug == "joins"))
    return found


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.LegacyAPIWarning")
def test_legacy_get_answers_from_the_identity_map(session: Any) -> None:
    ident = posts_id(session)
    assert session.query(Post).get(ident) is session.get(Post, ident)


def test_core_statements_see_what_the_orm_wrote(session: Any) -> None:
    rows = session.execute(
        select(Post.__table__.c.slug, Tag.__table__.c.name)
        .select_from(Post.__table__.join(post_tag).join(Tag.__table__))
        .order_by(Post.__table__.c.slug, Tag.__table__.c.name)
    ).all()
    assert [tuple(row) for row in rows] == [
        ("joins", "python"),
        ("joins", "sql"),
        ("windows", "sql"),
    ]


def test_textual_sql_is_sent_as_it_is(session: Any) -> None:
    count = session.scalar(
        text("SELECT count(*) FROM post WHERE stars > :stars"), {"stars": 5}
    )
    assert count == 2
    statement = text("SELECT id, slug, title FROM post ORDER BY id").columns(
        Post.id, Post.slug, Post.title
    )
    posts = session.scalars(
        select(Post).from_statement(
            text("SELECT * FROM post WHERE slug = :slug").bindparams(slug="joins")
        )
    ).all()
    assert [p.slug for p in posts] == ["joins"]
    assert [row.slug for row in session.execute(statement)] == [
        "joins",
        "windows",
        "compilers",
    ]
    assert session.execute(text("SHOW search_path")).scalar()


def test_set_operations_and_values(session: Any) -> None:
    both = union_all(
        select(Post.slug.label("word")), select(Tag.name.label("word"))
    ).order_by("word")
    assert session.scalars(both).all() == [
        "compilers",
        "joins",
        "python",
        "sql",
        "windows",
    ]
    given = values(column("stars", SqlInteger), name="given").data([(3,), (40,), (7,)])
    found = session.scalars(
        select(Post.slug).join(given, given.c.stars == Post.stars).order_by(Post.slug)
    )
    assert found.all() == ["compilers", "windows"]


def test_subqueries_exists_and_case(session: Any) -> None:
    commented = exists().where(Comment.post_id == Post.id)
    label = case((commented, "talked about"), else_="quiet")
    rows = session.execute(select(Post.slug, label).order_by(Post.slug)).all()
    assert [tuple(row) for row in rows] == [
        ("compilers", "quiet"),
        ("joins", "talked about"),
        ("windows", "quiet"),
    ]
    best = select(func.max(Post.stars)).scalar_subquery()
    assert session.scalar(select(Post.slug).where(Post.stars == best)) == "compilers"
    latest = select(Comment).where(Comment.post_id == Post.id).limit(1).lateral()
    assert session.execute(
        select(Post.slug, latest.c.writer).join(latest, text("true"))
    )


def test_contains_eager_keeps_the_filtered_children(session: Any) -> None:
    posts = (
        session.scalars(
            select(Post)
            .join(Post.comments)
            .where(Comment.writer == "Cal")
            .options(contains_eager(Post.comments))
        )
        .unique()
        .all()
    )
    assert [[c.writer for c in p.comments] for p in posts] == [["Cal"]]


def test_bundles_tuples_and_row_mappings(session: Any) -> None:
    bundle = Bundle("card", Post.slug, Post.stars)
    row = session.execute(select(bundle).where(Post.slug == "joins")).one()
    assert (row.card.slug, row.card.stars) == ("joins", 12)
    pair = session.execute(
        select(Post.slug, Post.stars).where(
            tuple_(Post.slug, Post.stars).in_([("joins", 12), ("windows", 4)])
        )
    )
    assert pair.mappings().all() == [{"slug": "joins", "stars": 12}]


def test_parameters_given_beside_the_statement(session: Any) -> None:
    statement = select(Post.slug).where(
        and_(Post.stars > bindparam("low"), Post.stars < bindparam("high"))
    )
    for low, high, slugs in [(0, 10, ["windows"]), (10, 20, ["joins"])]:
        found = session.scalars(statement, {"low": low, "high": high}).all()
        assert found == slugs


@pytest.mark.parametrize("stars", [5, 20])
def test_a_lambda_statement_reads_its_closure_each_time(
    session: Any, stars: int
) -> None:
    statement = lambda_stmt(lambda: select(Post.slug))
    statement += lambda s: s.where(Post.stars > stars).order_by(Post.slug)
    expected = {5: ["compilers", "joins"], 20: ["compilers"]}[stars]
    assert session.scalars(statement).all() == expected


def test_yield_per_streams_in_partitions(session: Any) -> None:
    session.execute(
        text("INSERT INTO tag (name) SELECT 'tag ' || n FROM generate_series(1, 95) n")
    )
    result = session.scalars(
        select(Tag).order_by(Tag.id).execution_options(yield_per=10)
    )
    sizes = [len(part) for part in result.partitions()]
    assert sizes == [10] * 9 + [7]
    streamed = session.execute(
        select(Tag.name).execution_options(stream_results=True, max_row_buffer=5)
    )
    assert sum(1 for _ in streamed) == 97
    assert sum(1 for _ in session.query(Tag).yield_per(20)) == 97


def test_dynamic_and_write_only_relationships_are_queried(session: Any) -> None:
    ada = session.scalars(select(Author).where(Author.name == "Ada")).one()
    assert ada.all_posts.filter(Post.stars > 5).count() == 1
    assert [p.slug for p in ada.all_posts] == ["joins", "windows"]
    assert [
        p.slug
        for p in session.scalars(
            select(Post).where(with_parent(ada, Author.posts)).order_by(Post.id)
        )
    ] == ["joins", "windows"]
    post = ada.posts[0]
    assert session.scalars(post.revisions.select()).all() == []


def test_deleted_posts_are_hidden_and_can_be_asked_for(session: Any) -> None:
    post = session.scalars(select(Post).where(Post.slug == "windows")).one()
    post.deleted_at = func.now()
    session.commit()
    slugs = select(Post.slug).order_by(Post.slug)
    assert session.scalars(slugs).all() == ["compilers", "joins"]
    session.expunge_all()
    every = session.scalars(
        select(Post).order_by(Post.slug), execution_options={"with_deleted": True}
    )
    assert [p.slug for p in every] == ["compilers", "joins", "windows"]


def test_the_identity_map_gives_one_object_per_row(session: Any) -> None:
    post = session.scalars(select(Post).where(Post.slug == "joins")).one()
    assert session.get(Post, post.id) is post
    assert session.get_one(Post, {"id": post.id}) is post
    assert post.comments[0].post is post
    assert session.query(Post).filter_by(id=post.id).one() is post
    assert post in session
    with pytest.raises(sa_exc.NoResultFound):
        session.get_one(Post, 999_999)
    assert session.get(Post, 999_999) is None
