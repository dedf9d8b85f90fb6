"""The README's example is a program that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = tmp_path / "example.py"
    program.write_text(code)
    out = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-1]} == {
        "Ada",
        "Grace",
        "Edsger",
        "Barbara",
    }
    assert all(line.endswith(("[7, 3]", "[3, 7]")) for line in lines[:-1])
    assert lines[-1].startswith("Route to s")
