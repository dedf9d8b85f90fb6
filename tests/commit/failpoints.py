"""Points at which a process can be made to die, in code that knows nothing of them.

`install` has the modules on the path of a commit compiled anew as they are imported,
with a call before every statement of every function. What it calls is `reached`, which
counts, and kills its own process where a `Death` says so.

    python -m tests.commit.failpoints      every death there is, in `test_failpoints`
"""

from __future__ import annotations

import ast
import builtins
import os
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

MODULES = frozenset(
    f"shardalchemy.{name}"
    for name in (
        "commit.driver",
        "commit.finisher",
        "commit.housekeeping",
        "commit.protocol",
        "commit.recovery",
        "commit.refusals",
        "engine.broadcast",
        "engine.ended",
        "engine.wire",
        "transaction",
    )
)
_CALL = "__reached__"


@dataclass(frozen=True)
class Death:
    """The *time*-th time (from 1) that a statement is reached: ``driver:123``."""

    point: str
    time: int

    def __str__(self) -> str:
        return f"{self.point}#{self.time}"


class Recorder:
    """Notes what is reached, in one thread or in all, once it is armed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: str | None = None
        self._death: Death | None = None
        self._counts: Counter[str] = Counter()
        self._messages = 0
        self._reached: dict[tuple[str, int], list[Death]] = {}
        self.is_armed = False

    def arm(self, thread: str | None, death: Death | None) -> None:
        """Begin; *thread* is the start of a name, None for every thread."""
        self._thread, self._death = thread, death
        self.is_armed = True

    @property
    def deaths(self) -> list[Death]:
        """What was reached, as the deaths that would have been met there.

        Between two messages that were sent, of each point the first and the last: one
        before the replies, one after.
        """
        found = {d: None for ds in self._reached.values() for d in (ds[0], ds[-1])}
        return list(found)

    def reached(self, point: str, sends: bool) -> None:
        """Note one point; die if it is the one. *sends* if a message is sent next."""
        if not self.is_armed or (
            self._thread is not None
            and not threading.current_thread().name.startswith(self._thread)
        ):
            return
        with self._lock:
            self._counts[point] += 1
            here = Death(point, self._counts[point])
            if here == self._death:
                os.kill(os.getpid(), signal.SIGKILL)
            self._reached.setdefault((point, self._messages), []).append(here)
            self._messages += sends


def install() -> Recorder:
    """Have `MODULES` compiled with points; none of them may be imported already."""
    assert not MODULES & sys.modules.keys()
    recorder = Recorder()
    setattr(builtins, _CALL, recorder.reached)
    sys.meta_path.insert(0, _Finder())
    return recorder


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any, target: object = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile the module with its points, without a look at compiled files."""
        tree = ast.parse(self.get_data(self.path))
        points = _Points(fullname.rpartition(".")[2])
        return compile(ast.fix_missing_locations(points.visit(tree)), self.path, "exec")


class _Points(ast.NodeTransformer):
    """Puts a call before every statement within a function."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._depth = 0

    def _function(self, node: Any) -> Any:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if self._depth and not isinstance(node, ast.ClassDef):
            for name in ("body", "orelse", "finalbody"):
                statements = getattr(node, name, None)
                if isinstance(statements, list):
                    setattr(node, name, self._with_points(statements))
        return node

    def _with_points(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in statements:
            if not isinstance(statement, ast.Global | ast.Nonlocal):
                point = ast.Constant(f"{self._module}:{statement.lineno}")
                sends = ast.Constant(
                    isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Call)
                    and isinstance(statement.value.func, ast.Attribute)
                    and statement.value.func.attr == "send_query"
                )
                call = ast.Call(ast.Name(_CALL, ast.Load()), [point, sends], [])
                found.append(ast.copy_location(ast.Expr(call), statement))
            found.append(statement)
        return found


if __name__ == "__main__":
    import pytest

    os.environ["SHARDALCHEMY_FAILPOINTS"] = "1000000"
    sys.exit(pytest.main(["-rP", "--durations=0", "tests/commit/test_failpoints.py"]))
