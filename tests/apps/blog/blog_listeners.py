"""What the blog hangs on its sessions: hidden rows and an audit log."""

from __future__ import annotations

from typing import Any

from blog_models import AuditEntry, Comment, Post, SoftDeleted
from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria


def listen(target: Any) -> None:
    """Install all listeners on a session class or a ``sessionmaker``."""
    event.listen(target, "do_orm_execute", hide_deleted)
    event.listen(target, "before_flush", audit_changes)
    event.listen(target, "after_flush", audit_additions)


def _is_visible(entity: type[SoftDeleted]) -> Any:
    return entity.deleted_at.is_(None)


def hide_deleted(state: ORMExecuteState) -> None:
    if (
        state.is_select
        and not state.is_column_load
        and not state.is_relationship_load
        and not state.execution_options.get("with_deleted", False)
    ):
        state.statement = state.statement.options(
            with_loader_criteria(SoftDeleted, _is_visible, include_aliases=True)
        )


def audit_changes(session: Session, *_: object) -> None:
    """Record changed and deleted posts as objects of the same flush."""
    for state in list(session.dirty):
        if isinstance(state, Post) and session.is_modified(state):
            session.add(AuditEntry(action="change", subject=state.slug))
    for state in list(session.deleted):
        if isinstance(state, Post | Comment):
            subject = state.slug if isinstance(state, Post) else state.writer
            session.add(AuditEntry(action="delete", subject=subject))


def audit_additions(session: Session, *_: object) -> None:
    """Record new posts by a Core statement on the flush's own connection."""
    rows = [
        {"action": "add", "subject": state.slug}
        for state in sorted(
            (s for s in session.new if isinstance(s, Post)), key=lambda p: p.slug
        )
    ]
    if rows:
        session.execute(AuditEntry.__table__.insert(), rows)
