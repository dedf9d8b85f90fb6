"""Writes down all that a script sends, fires, warns of and observes, in order."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from blog_scenarios import Script
from blog_stage import Installation
from sqlalchemy import Engine, event
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.pool import Pool

ENGINE_EVENTS = [
    "begin",
    "commit",
    "rollback",
    "savepoint",
    "rollback_savepoint",
    "release_savepoint",
    "begin_twophase",
    "prepare_twophase",
    "commit_twophase",
    "rollback_twophase",
]
SESSION_EVENTS = [
    "after_transaction_create",
    "after_transaction_end",
    "after_begin",
    "before_commit",
    "after_commit",
    "after_rollback",
    "after_soft_rollback",
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_attach",
    "after_attach",
    "after_bulk_update",
    "after_bulk_delete",
    "transient_to_pending",
    "pending_to_persistent",
    "pending_to_transient",
    "persistent_to_deleted",
    "persistent_to_detached",
    "persistent_to_transient",
    "deleted_to_detached",
    "deleted_to_persistent",
    "detached_to_persistent",
    "loaded_as_persistent",
]
MAPPER_EVENTS = [
    "before_insert",
    "after_insert",
    "before_update",
    "after_update",
    "before_delete",
    "after_delete",
]


@contextmanager
def listening(record: list[Any], *, fired: bool) -> Iterator[None]:
    """Note every statement of every engine; if *fired*, the ORM's events as well."""
    listeners: list[tuple[Any, str, Any]] = []
    thread = threading.get_ident()  # other tests' clusters have threads of their own

    def listen(target: Any, name: str, listener: Any) -> None:
        event.listen(target, name, listener)
        listeners.append((target, name, listener))

    def note(name: str) -> Any:
        def listener(*arguments: Any, **_: Any) -> None:
            objects = [
                type(a).__name__
                for a in arguments
                if type(a).__module__ == "blog_models"
            ]
            if threading.get_ident() == thread:
                record.append((name, *objects))

        return listener

    def statement(*arguments: Any) -> None:
        _, _, sent, parameters, _, many = arguments
        if threading.get_ident() == thread:
            record.append(("statement", sent, _plain(parameters), many))

    def orm_statement(state: Any) -> None:
        record.append(
            (
                "do_orm_execute",
                type(state.statement).__name__,
                state.is_relationship_load,
                state.is_column_load,
                state.is_orm_statement,
                sorted(state.bind_arguments),
                sorted(map(str, state.local_execution_options)),
            )
        )

    # The identity map is weak: what is still in it must not depend on the collector.
    kept: list[object] = []
    for name in ("loaded_as_persistent", "before_attach"):
        listen(Session, name, lambda _, instance: kept.append(instance))
    listen(Engine, "before_cursor_execute", statement)
    for name in ENGINE_EVENTS:
        listen(Engine, name, note(f"engine {name}"))
    listen(Pool, "checkout", note("checkout"))
    listen(Pool, "checkin", note("checkin"))
    if fired:
        for name in SESSION_EVENTS:
            listen(Session, name, note(name))
        listen(Session, "do_orm_execute", orm_statement)
        for name in MAPPER_EVENTS:
            listen(Mapper, name, note(name))
    try:
        yield
    finally:
        for target, name, listener in listeners:
            event.remove(target, name, listener)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if type(value).__module__ == "builtins" else repr(value)


def record(installation: Installation, script: Script, *, fired: bool) -> list[Any]:
    """Run *script* on an emptied installation and return what happened."""
    installation.empty()
    installation.engine.clear_compiled_cache()  # some warnings come with compiling
    Session = installation.factory(listeners=fired)
    happened: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with listening(happened, fired=fired):
            happened.extend(
                ("observed", _without_addresses(value)) for value in script(Session)
            )
    happened = list(settled(happened))
    happened += [
        ("warned", w.category, _without_names(_without_addresses(str(w.message))))
        for w in caught
    ]
    return happened


def settled(happened: list[Any]) -> Iterator[Any]:
    """Put in order what SQLAlchemy takes from sets, where no order is promised."""
    for name, run in groupby(happened, lambda entry: entry[0]):
        entries = list(run)
        if "_to_" in name:
            entries.sort()
        for entry in entries:
            if name == "statement" and "INTO post_tag" in entry[1] and entry[3]:
                rows = sorted(entry[2], key=lambda row: sorted(row.items()))
                yield (*entry[:2], rows, entry[3])
            else:
                yield entry


def _without_names(message: str) -> str:
    """Hide which of two tables a warning of a cartesian product names first."""
    return re.sub(r'"\w+"', '"…"', message) if "cartesian" in message else message


def _without_addresses(value: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x…", repr(value))


_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d [^\[\n]+\[\d+\] ", re.MULTILINE)
_NAME = re.compile(r"_pg3_\d+|\bc_[0-9a-f]+_[0-9a-f]+\b")


def server_log(log: Path, start: int) -> list[str]:
    """Return the statements that a server has logged since byte *start*."""
    text = log.read_bytes()[start:].decode()
    entries = [_NAME.sub("…", entry) for entry in _ENTRY.split(text)]
    return [e for e in entries if e.startswith(("LOG:  statement", "LOG:  execute"))]
