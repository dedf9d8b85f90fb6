"""The command line before any server is started: versions, options, exit statuses."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from shardalchemy.cli import demo, main
from shardalchemy.cli.processes import WorkerFailed
from shardalchemy.errors import LocalServerError


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the demonstration was called with, instead of playing it."""
    calls: list[Any] = []

    def play(size: Any, **options: Any) -> bool:
        calls.append((size, options))
        return True

    monkeypatch.setattr(demo, "play", play)
    return calls


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out == f"shardalchemy {version('shardalchemy')}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help")])
def test_help_names_what_there_is(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "shardalchemy.cli.app", raising=False)
    assert status("demo") == 2
    assert capsys.readouterr().err == (
        f"shardalchemy: the command line needs {missing}; it comes with"
        " pip install 'shardalchemy[local]'\n"
    )


def test_the_sale_is_as_large_as_asked_for(played: list[Any]) -> None:
    assert (
        status(
            *("demo", "--shards", "2", "--customers", "200", "--products", "30"),
            *("--seconds", "3", "--buyers", "2", "--ack", "prepared", "--seed", "7"),
        )
        == 0
    )
    ((size, options),) = played
    assert (size.customers, size.products, size.seed) == (200, 30, 7)
    assert options == {
        "shards": 2,
        "seconds": 3,
        "buyers": 2,
        "processes": 2,  # of the four by default, none would be without a buyer
        "directory": None,
        "ack": "prepared",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shards", "0"], "--shards"),
        (["--shards", "9"], "--shards"),
        (["--seconds", "soon"], "--seconds"),
        (["--ack", "maybe"], "--ack"),
        (["--buyers", "20", "--customers", "10"], "--customers"),
    ],
)
def test_a_bad_value_is_named(
    played: list[Any],
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status("demo", *arguments) == 2
    assert complaint in capsys.readouterr().err
    assert played == []


def test_a_directory_in_use_is_not_taken_for_a_new_shop(
    played: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster.json").touch()
    assert status("demo", "--keep", str(tmp_path)) == 2
    assert "--keep" in capsys.readouterr().err
    assert played == []


@pytest.mark.parametrize(
    ("raised", "expected", "said"),
    [
        (LocalServerError("no PostgreSQL here"), 2, "no PostgreSQL here"),
        (WorkerFailed("Traceback …"), 1, "Traceback …"),
        (KeyboardInterrupt(), 130, "the servers are stopped"),
    ],
)
def test_what_ends_the_demonstration_shows_in_its_status(
    raised: BaseException,
    expected: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def play(*_: Any, **__: Any) -> bool:
        raise raised

    monkeypatch.setattr(demo, "play", play)
    assert status("demo") == expected
    assert said in capsys.readouterr().err


def test_a_shop_that_is_not_sound_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "play", lambda *_, **__: False)
    assert status("demo") == 1
