"""A few authors and posts to read."""

from __future__ import annotations

from typing import Any

from blog_models import Attachment, Author, Comment, Image, Moderator, Post, Tag


def fill(session: Any) -> None:
    """Add two authors, a moderator, three posts with tags, comments, attachments.

    Kind by kind: in one flush SQLAlchemy may write independent tables in any order.
    """
    ada = Author(name="Ada", email="Ada@Example.org", bio="Counts.")
    grace = Author(name="Grace", email="grace@example.org")
    session.add_all([ada, grace, Moderator(name="Max", email="max@x.org", since=1999)])
    session.flush()
    python, sql = Tag(name="python"), Tag(name="sql")
    session.add_all([python, sql])
    session.flush()
    joins = Post(slug="joins", title="On joins", body="Left, right.", stars=12)
    joins.author = ada
    windows = Post(slug="windows", title="On windows", stars=3, author=ada)
    compilers = Post(slug="compilers", title="On compilers", stars=40, author=grace)
    session.add_all([joins, windows, compilers])
    session.flush()
    joins.tags = [python, sql]
    windows.tags = [sql]
    first = Comment(writer="Bea", body="First!")
    joins.comments = [first, Comment(writer="Cal", body="Nice.")]
    joins.comments.append(Comment(writer="Dan", body="Is it?", parent=first))
    session.flush()
    joins.attachments = [Attachment(url="/a.pdf"), Image(url="/b.png", width=640)]
    session.flush()
