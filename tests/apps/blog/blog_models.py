"""A small blog, written for plain SQLAlchemy: nothing here knows of shards."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Sequence,
    String,
    Table,
    UniqueConstraint,
    func,
    select,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    column_property,
    mapped_column,
    relationship,
    validates,
)


class Base(DeclarativeBase):
    pass


class SoftDeleted:
    """Rows that are marked instead of deleted; sessions hide the marked ones."""

    deleted_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class Person(Base):
    __tablename__ = "person"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str]
    email: Mapped[str] = mapped_column(unique=True)

    @validates("email")
    def _check_email(self, key: str, email: str) -> str:
        if "@" not in email:
            raise ValueError(f"{email!r} is no address")
        return email.lower()


class Author(Person):
    __tablename__ = "author"
    __mapper_args__ = {"polymorphic_identity": "author"}

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    bio: Mapped[str] = mapped_column(default="")

    posts: Mapped[list[Post]] = relationship(
        back_populates="author", order_by="Post.id", cascade="all, delete-orphan"
    )
    all_posts: DynamicMapped[Post] = relationship(
        viewonly=True, order_by="Post.id", lazy="dynamic"
    )


class Moderator(Person):
    __tablename__ = "moderator"
    __mapper_args__ = {"polymorphic_identity": "moderator"}

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    since: Mapped[int]


post_tag = Table(
    "post_tag",
    Base.metadata,
    Column("post_id", ForeignKey("post.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    posts: Mapped[list[Post]] = relationship(secondary=post_tag, back_populates="tags")


receipt_numbers = Sequence("receipt_number", start=1000, metadata=Base.metadata)


class Post(SoftDeleted, Base):
    __tablename__ = "post"
    __table_args__ = (UniqueConstraint("author_id", "slug", name="post_slug"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(
        BigInteger, Sequence("post_number", start=100, metadata=Base.metadata)
    )
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    slug: Mapped[str]
    title: Mapped[str]
    body: Mapped[str] = mapped_column(default="", deferred=True)
    stars: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )
    version: Mapped[int] = mapped_column()

    author: Mapped[Author] = relationship(back_populates="posts")
    tags: Mapped[list[Tag]] = relationship(
        secondary=post_tag, back_populates="posts", order_by=Tag.name
    )
    comments: Mapped[list[Comment]] = relationship(
        back_populates="post", order_by="Comment.id", cascade="all, delete-orphan"
    )
    revisions: WriteOnlyMapped[Revision] = relationship(
        order_by="Revision.id", cascade="all, delete-orphan", passive_deletes=True
    )
    attachments: Mapped[list[Attachment]] = relationship(
        order_by="Attachment.id", cascade="all, delete-orphan"
    )

    __mapper_args__ = {"version_id_col": version}

    @hybrid_property
    def is_popular(self) -> bool:
        return self.stars >= 10

    @is_popular.inplace.expression
    @classmethod
    def _is_popular(cls) -> Any:
        return cls.stars >= 10


class Comment(SoftDeleted, Base):
    __tablename__ = "comment"
    __table_args__ = (CheckConstraint("body <> ''", name="comment_body"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    post_id: Mapped[int] = mapped_column(ForeignKey("post.id"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("comment.id"))
    writer: Mapped[str]
    body: Mapped[str]

    post: Mapped[Post] = relationship(back_populates="comments")
    parent: Mapped[Comment | None] = relationship(
        back_populates="replies", remote_side=[id]
    )
    replies: Mapped[list[Comment]] = relationship(
        back_populates="parent", order_by="Comment.id"
    )


Post.comment_count = column_property(  # type: ignore[attr-defined]
    select(func.count(Comment.id))
    .where(Comment.post_id == Post.id)
    .correlate_except(Comment)
    .scalar_subquery()
)


class Revision(Base):
    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(primary_key=True)
    post_id: Mapped[int] = mapped_column(ForeignKey("post.id", ondelete="CASCADE"))
    body: Mapped[str]


class Attachment(Base):
    """Single-table inheritance."""

    __tablename__ = "attachment"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "file"}

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    post_id: Mapped[int | None] = mapped_column(ForeignKey("post.id"))
    url: Mapped[str]


class Image(Attachment):
    __mapper_args__ = {"polymorphic_identity": "image"}

    width: Mapped[int | None]


class AuditEntry(Base):
    __tablename__ = "audit_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    action: Mapped[str]
    subject: Mapped[str]
