"""LocalCluster over real servers: starts, stops, crashes, accounts, directories."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from shardalchemy.errors import LocalServerError
from shardalchemy.local import LocalCluster, PostgresServer, account, ports
from shardalchemy.local.binaries import DEBIAN_FOLDER, find_postgres, find_redis
from shardalchemy.local.watchdog import look_up

ROOT = Path(account.__file__).parents[2]
AS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    try:
        find_postgres()
        find_redis()
    except LocalServerError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[LocalCluster, float]]:
    began = time.monotonic()
    with LocalCluster() as servers:
        yield servers, time.monotonic() - began


@pytest.fixture
def servers(started: tuple[LocalCluster, float]) -> LocalCluster:
    return started[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new folder that the servers' user can reach; pytest's own are closed."""
    with open_folder() as path:
        yield path


@pytest.fixture(scope="module")
def kept() -> Iterator[Path]:
    """A directory with the data of one server, "s1", which does not run."""
    with open_folder() as path:
        with LocalCluster(1, directory=path, with_redis=False):
            pass
        yield path


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def value(url: str, query: str) -> object:
    with connect(url) as connection:
        row = connection.execute(query).fetchone()  # type: ignore[call-overload]
    return row[0] if row else None


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- what runs -----------------------------------------------------------------------


def test_four_shards_and_redis_start_within_ten_seconds(
    started: tuple[LocalCluster, float],
) -> None:
    servers, seconds = started
    print(f"4 shards and Redis started in {seconds:.2f} s")
    assert seconds < 10
    assert list(servers.urls) == ["s1", "s2", "s3", "s4"]
    assert [value(url, "SELECT 1") for url in servers.urls.values()] == [1] * 4
    with redis.Redis.from_url(servers.redis_url) as client:
        assert client.ping()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("max_prepared_transactions", "100"),
        ("max_connections", "200"),
        ("wal_level", "logical"),
        ("server_encoding", "UTF8"),
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
        ("password_encryption", "scram-sha-256"),
    ],
)
def test_settings_are_those_of_a_durable_server(
    servers: LocalCluster, setting: str, expected: str
) -> None:
    for url in servers.urls.values():
        assert value(url, f"SHOW {setting}") == expected


def test_nobody_comes_in_without_the_password(servers: LocalCluster) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication"):
        psycopg.connect(
            host="127.0.0.1",
            port=servers.servers["s1"].port,
            user="postgres",
            password="guessed",
        )


def test_upper_and_lower_case_are_those_of_unicode(servers: LocalCluster) -> None:
    url = servers.urls["s1"]
    if int(str(value(url, "SHOW server_version_num"))) < 170000:
        pytest.skip("the builtin locale provider came with PostgreSQL 17")
    assert value(url, "SELECT upper('é')") == "É"


def test_settings_of_the_caller_win(kept: Path) -> None:
    settings = {"max_connections": "33", "application_name": "it's"}
    with LocalCluster(directory=kept, settings=settings, with_redis=False) as servers:
        assert value(servers.urls["s1"], "SHOW max_connections") == "33"
        assert value(servers.urls["s1"], "SHOW application_name") == "it's"
        with pytest.raises(LocalServerError, match="with_redis=False"):
            _ = servers.redis_url


def test_one_more_server_needs_a_good_name(servers: LocalCluster) -> None:
    with pytest.raises(LocalServerError, match="already"):
        servers.add_server("s1")
    with pytest.raises(LocalServerError, match="cannot name a shard"):
        servers.add_server("../extra")


def test_nothing_can_be_asked_of_servers_that_are_not_started() -> None:
    with pytest.raises(LocalServerError, match="does not run"):
        _ = LocalCluster().urls


@pytest.mark.parametrize("shards", [0, [], ["a", "a"], ["a/b"]])
def test_shards_need_a_number_or_good_names(shards: object) -> None:
    with pytest.raises(LocalServerError):
        LocalCluster(shards)  # type: ignore[arg-type]


# --- faults --------------------------------------------------------------------------


def test_a_prepared_transaction_survives_a_crash(servers: LocalCluster) -> None:
    server = servers.servers["s1"]
    url, pid = server.url, server.pid
    with contextlib.suppress(psycopg.OperationalError), connect(url) as connection:
        connection.execute("CREATE TABLE crash_test (id int)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO crash_test VALUES (1)")
        connection.execute("PREPARE TRANSACTION 'crash'")
        server.kill()
        assert not server.running
        assert server.pid is None
        connection.execute("SELECT 1")
    server.start()
    assert server.url == url
    assert server.pid != pid
    with connect(url) as connection:
        connection.execute("COMMIT PREPARED 'crash'")
    assert value(url, "SELECT count(*) FROM crash_test") == 1
    assert "was not properly shut down" in server.logs_tail(50)


def test_a_killed_server_leaves_no_backend_behind(servers: LocalCluster) -> None:
    server = servers.servers["s1"]
    with connect(server.url) as connection:
        backend = connection.info.backend_pid
        server.kill()
        assert look_up(backend) is None
    server.start()


def test_a_paused_server_is_silent_until_it_is_resumed(servers: LocalCluster) -> None:
    server = servers.servers["s2"]
    answers: list[object] = []
    with connect(server.url) as connection:
        server.pause()
        asking = threading.Thread(
            target=lambda: answers.extend(connection.execute("SELECT 1").fetchone())  # type: ignore[arg-type]
        )
        asking.start()
        asking.join(0.5)
        assert asking.is_alive()
        assert server.running
        server.resume()
        asking.join(10)
    assert answers == [1]


def test_a_paused_redis_is_silent_until_it_is_resumed(servers: LocalCluster) -> None:
    with redis.Redis.from_url(servers.redis_url, socket_timeout=0.3) as client:
        servers.redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        servers.redis.resume()
        assert client.ping()


def test_redis_comes_back_on_its_port(servers: LocalCluster) -> None:
    url = servers.redis_url
    servers.redis.kill()
    servers.redis.start()
    servers.redis.restart()
    assert servers.redis_url == url
    with redis.Redis.from_url(url) as client:
        assert client.ping()


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_a_server_stops_in_each_mode_and_restarts(
    servers: LocalCluster, mode: str
) -> None:
    server = servers.servers["s3"]
    url = server.url
    server.stop(mode)  # type: ignore[arg-type]
    assert not server.running
    server.stop()
    server.restart()
    assert value(url, "SELECT 1") == 1


def test_a_paused_server_can_be_stopped(servers: LocalCluster) -> None:
    server = servers.servers["s4"]
    server.pause()
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 10
    server.start()
    server.pause()
    server.kill()
    server.start()
    assert value(server.url, "SELECT 1") == 1


def test_a_pid_file_whose_pid_was_given_to_another_server_is_seen_through(
    servers: LocalCluster,
) -> None:
    crashed, other = servers.servers["s1"], servers.servers["s2"]
    crashed.kill()
    pid_file = crashed.data_directory / "postmaster.pid"
    _, *lines = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(other.pid), *lines, ""]))
    crashed.start()
    assert value(crashed.url, "SELECT 1") == 1
    assert other.running


def test_a_port_taken_between_choice_and_use_is_replaced(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        taken = occupant.getsockname()[1]
        choices = [taken, taken]
        free_port = ports.free_port
        monkeypatch.setattr(
            ports, "free_port", lambda: choices.pop() if choices else free_port()
        )
        with LocalCluster(directory=kept) as servers:
            assert not choices
            assert servers.servers["s1"].port != taken
            assert servers.redis.port != taken
            assert value(servers.urls["s1"], "SELECT 1") == 1


def test_a_server_that_does_not_start_is_explained_by_its_log(kept: Path) -> None:
    servers = LocalCluster(directory=kept, settings={"shared_buffers": "nonsense"})
    with pytest.raises(LocalServerError, match="invalid value for parameter"):
        servers.start()
    with LocalCluster(directory=kept) as servers:
        assert value(servers.urls["s1"], "SELECT 1") == 1


def test_a_start_that_fails_leaves_no_directory(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    programs = folder / "programs"
    programs.mkdir()
    for name, status in (("postgres", 0), ("initdb", 7)):
        (programs / name).write_text(
            f"#!/bin/sh\necho 'fake (PostgreSQL) 18.0'\n"
            f'test "$1" = --version || exit {status}\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(LocalServerError, match=r"initdb failed:\nfake"):
        LocalCluster(2, postgres=programs).start()
    assert list(folder.iterdir()) == [programs]


# --- directories ---------------------------------------------------------------------


def shared_memory_of(server: PostgresServer) -> Path:
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    (name,) = set(re.findall(r"/dev/shm/PostgreSQL\.\d+", maps))
    return Path(name)


def test_a_temporary_directory_is_gone_after_stop_and_a_crashs_shared_memory() -> None:
    servers = LocalCluster(1).start()
    pids = [server.pid for server in (*servers.servers.values(), servers.redis)]
    directory = servers.directory
    assert directory.is_dir()
    held = shared_memory_of(servers.servers["s1"])
    assert held.exists()
    servers.servers["s1"].kill()
    servers.stop()
    servers.stop()
    assert not directory.exists()
    assert not held.exists()
    assert [look_up(pid) for pid in pids if pid] == [None] * 2


def test_a_directory_keeps_data_names_added_servers_and_password(folder: Path) -> None:
    directory = folder / "deep" / "kept"
    with LocalCluster(["left"], directory=directory) as servers:
        url = servers.add_server("middle")
        assert servers.urls["middle"] == url
        with connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        passwords = {url.split("@")[0] for url in servers.urls.values()}
    record = directory / "cluster.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    with LocalCluster(directory=directory, with_redis=False) as servers:
        assert list(servers.urls) == ["left", "middle"]
        assert {url.split("@")[0] for url in servers.urls.values()} == passwords
        assert value(servers.urls["middle"], "SELECT answer FROM kept") == 42
    with (
        pytest.raises(LocalServerError, match="but not up"),
        LocalCluster(["left", "up"], directory=directory),
    ):
        pass


def test_a_directory_in_use_is_refused(kept: Path) -> None:
    with LocalCluster(directory=kept, with_redis=False) as servers:
        with pytest.raises(LocalServerError, match=f"in use by .* {os.getpid()}"):
            LocalCluster(directory=kept).start()
        assert value(servers.urls["s1"], "SELECT 1") == 1
    with LocalCluster(directory=kept, with_redis=False):
        pass


def test_a_directory_with_other_things_in_it_is_refused(folder: Path) -> None:
    (folder / "thesis.tex").touch()
    with pytest.raises(LocalServerError, match="not made by a LocalCluster"):
        LocalCluster(1, directory=folder).start()
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_data_that_was_left_unfinished_is_made_again(kept: Path) -> None:
    data = kept / "servers" / "s1" / "data"
    data.rename(data.with_name("data.unfinished.1"))
    with LocalCluster(directory=kept, with_redis=False) as servers:
        assert value(servers.urls["s1"], "SELECT 1") == 1
        assert not data.with_name("data.unfinished.1").exists()


def test_a_server_that_outlived_its_cluster_is_not_started_twice(kept: Path) -> None:
    binaries = find_postgres()
    user = account.server_account(kept.joinpath("servers").stat().st_uid)
    data = (kept / "servers" / "s1" / "data").resolve()
    command = [binaries.postgres, "-D", data, "-p", str(ports.free_port())]
    with user.spawn(command, output=subprocess.DEVNULL) as orphan:
        assert wait_until((data / "postmaster.pid").exists)
        with pytest.raises(LocalServerError, match=f"kill -INT {orphan.pid}'"):
            LocalCluster(directory=kept).start()
        assert orphan.poll() is None
        orphan.send_signal(signal.SIGINT)


@pytest.mark.skipif(not AS_ROOT, reason="only root's servers run as another user")
def test_a_directory_closed_to_the_servers_user_is_explained(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    # Twice, because what the first try left must not be taken for a stranger's.
    for _ in range(2):
        with pytest.raises(LocalServerError, match=f"chmod o\\+x {closed}'"):
            LocalCluster(1, directory=closed / "servers").start()


# --- the end of the owner ------------------------------------------------------------

REPORT = """
import json, os, signal, sys, time
from shardalchemy.local import LocalCluster

def report(servers):
    pids = [server.pid for server in (*servers.servers.values(), servers.redis)]
    print(json.dumps([pids, str(servers.directory), servers.urls]), flush=True)
"""


def environment(*path: str) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [*(path or [str(ROOT)]), inherited])
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@contextlib.contextmanager
def script(
    code: str,
    *arguments: str,
    user: str | None = None,
    python: str = sys.executable,
    path: tuple[str, ...] = (),
) -> Iterator[subprocess.Popen[str]]:
    entry = pwd.getpwnam(user) if user else None
    with subprocess.Popen(
        [python, "-W", "error", "-c", REPORT + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(*path),
        cwd="/",
        start_new_session=True,
        user=entry.pw_uid if entry else None,
        group=entry.pw_gid if entry else None,
        extra_groups=[] if entry else None,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def reported(process: subprocess.Popen[str]) -> tuple[list[int], Path, dict[str, str]]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the script ended without a report"
    pids, directory, urls = json.loads(line)
    return pids, Path(directory), urls


def gone(pids: list[int]) -> bool:
    return not any(look_up(pid) for pid in pids)


def test_servers_do_not_outlive_a_killed_owner() -> None:
    code = """
with LocalCluster(1) as servers:
    servers.add_server("extra")
    servers.servers["s1"].pause()
    report(servers)
    time.sleep(60)
"""
    with script(code) as process:
        pids, directory, _ = reported(process)
        assert len(pids) == 3
        assert directory.is_dir()
        assert not gone(pids)
        process.kill()
        assert wait_until(lambda: gone(pids) and not directory.exists())


def test_nothing_is_left_of_an_owner_killed_while_it_starts(folder: Path) -> None:
    code = """
import tempfile
tempfile.tempdir = sys.argv[1]
LocalCluster(2).start()
"""
    with script(code, str(folder)) as process:
        assert wait_until(lambda: any(folder.glob("*/servers/s1/data.*/PG_VERSION")))
        process.kill()
        assert wait_until(lambda: not any(folder.iterdir()))
        assert wait_until(
            lambda: not any(map(mentions(str(folder)), os.listdir("/proc")))
        )


def mentions(text: str) -> Callable[[str], bool]:
    def does(pid: str) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        return text.encode() in command

    return does


def test_servers_do_not_outlive_a_killed_owner_whose_child_lives_on(
    kept: Path,
) -> None:
    code = """
with LocalCluster(directory=sys.argv[1]) as servers:
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    report(servers)
    time.sleep(60)
"""
    with script(code, str(kept)) as process:
        pids, _, _ = reported(process)
        process.kill()
        assert wait_until(lambda: gone(pids))
        # The child has the directory's lock, too, but must not keep it.
        with LocalCluster(directory=kept):
            pass


def test_a_directory_can_be_used_as_soon_as_its_owner_was_killed(kept: Path) -> None:
    code = """
servers = LocalCluster(directory=sys.argv[1]).start()
report(servers)
time.sleep(60)
"""
    with script(code, str(kept)) as process:
        pids, directory, urls = reported(process)
        with connect(urls["s1"]) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            process.kill()
            process.wait()
            with LocalCluster(directory=directory) as servers:
                assert gone(pids)
                assert value(servers.urls["s1"], "SELECT answer FROM kept") == 42


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_terminals_whole_group_ends_cleanly(
    end: signal.Signals, kept: Path
) -> None:
    code = """
with LocalCluster(directory=sys.argv[1]) as servers:
    try:
        report(servers)
        time.sleep(60)
    except KeyboardInterrupt:
        print(all(server.running for server in servers.servers.values()), flush=True)
"""
    with script(code, str(kept)) as process:
        pids, _, _ = reported(process)
        os.killpg(process.pid, end)
        output, _ = process.communicate(timeout=20)
        if end == signal.SIGINT:
            assert output.strip() == "True"
            assert process.returncode == 0
        assert wait_until(lambda: gone(pids))


def test_servers_stop_at_exit_without_being_told(kept: Path) -> None:
    code = "report(LocalCluster(directory=sys.argv[1]).start())"
    with script(code, str(kept)) as process:
        pids, _, _ = reported(process)
        assert process.wait(20) == 0
        assert gone(pids)


def test_a_forked_child_leaves_the_servers_alone(kept: Path) -> None:
    code = """
servers = LocalCluster(directory=sys.argv[1]).start()
with servers:
    child = os.fork()
    if child == 0:
        servers.stop()
        sys.exit()
    os.waitpid(child, 0)
    assert servers.servers["s1"].running
    report(servers)
    sys.stdin.readline()
"""
    with script(code, str(kept)) as process:
        pids, _, urls = reported(process)
        assert not gone(pids)
        assert value(urls["s1"], "SELECT 1") == 1
        process.communicate("\n")
        assert process.returncode == 0
        assert gone(pids)


# --- accounts and programs -----------------------------------------------------------


@pytest.mark.skipif(not AS_ROOT, reason="the other tests run as no root already")
def test_no_root_is_needed(folder: Path) -> None:
    nobody = account.server_account(pwd.getpwnam("nobody").pw_uid)
    source = folder / "source"
    shutil.copytree(ROOT / "shardalchemy", source / "shardalchemy")
    packages = Path(psycopg.__file__).parents[1]
    path = (str(source), str(packages))
    # A virtual environment may stand on a Python in root's home; then the system's.
    version = "python{}.{}".format(*sys.version_info)
    pythons = [sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin")]
    for python in filter(None, pythons):
        with contextlib.suppress(LocalServerError):
            check = f"import sys; sys.path[:0] = {[str(packages)]}; import psycopg"
            if nobody.run([python, "-c", check]).returncode == 0:
                break
    else:
        pytest.skip("no Python and packages that the user nobody can read")
    code = """
with LocalCluster(1) as servers:
    report(servers)
    sys.stdin.readline()
"""
    with script(code, user="nobody", python=python, path=path) as process:
        pids, directory, urls = reported(process)
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {nobody.uid}
        assert value(urls["s1"], "SELECT 1") == 1
        process.communicate("\n", timeout=20)
        assert process.returncode == 0
        assert not directory.exists()


@pytest.mark.skipif(not AS_ROOT, reason="only root's servers run as another user")
def test_programs_closed_to_the_servers_user_are_copied(folder: Path) -> None:
    postgres = find_postgres().directory
    package = postgres.parent.parent
    home = folder / "home"
    home.mkdir(mode=0o700)
    for path in (package, package.with_name(f"{package.name}.libs")):
        if path.exists():
            (home / path.name).symlink_to(path)
    server = shutil.copy(find_redis().path, home / "valkey-server")
    closed = home / postgres.relative_to(package.parent)
    with LocalCluster(1, postgres=closed, redis=server) as servers:
        assert value(servers.urls["s1"], "SELECT 1") == 1
        for running in (servers.servers["s1"], servers.redis):
            program = Path(f"/proc/{running.pid}/exe").resolve()
            assert program.is_relative_to(servers.directory)


INSTALLED = sorted(DEBIAN_FOLDER.glob("*/bin"))


@pytest.mark.parametrize(
    "folder_of_programs",
    [pytest.param(path, id=f"PostgreSQL {path.parent.name}") for path in INSTALLED],
)
def test_each_installed_version_serves(folder: Path, folder_of_programs: Path) -> None:
    with LocalCluster(2, postgres=folder_of_programs, directory=folder) as servers:
        version = value(servers.urls["s2"], "SHOW server_version")
        assert str(version).split(".")[0] == folder_of_programs.parent.name
        assert value(servers.urls["s2"], "SHOW server_encoding") == "UTF8"
    if find_postgres().directory != folder_of_programs:
        with pytest.raises(LocalServerError, match="holds data of PostgreSQL"):
            LocalCluster(directory=folder).start()


# --- pytest --------------------------------------------------------------------------


def run_pytest(folder: Path, test: str, *options: str) -> str:
    (folder / "test_plugin.py").write_text(test)
    plugin = "shardalchemy.local.pytest_plugin"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", plugin, *options],
        cwd=folder,
        # The installed package's entry point would name the plugin a second time.
        env={**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_the_plugin_gives_a_test_its_servers_and_a_cluster(folder: Path) -> None:
    test = """
from shardalchemy.cluster import Cluster

def test_servers(shard_servers, pytestconfig):
    assert list(shard_servers.urls) == ["s1"]
    assert shard_servers.redis_url

def test_cluster(shard_cluster):
    assert isinstance(shard_cluster, Cluster)
"""
    (folder / "pytest.ini").write_text("[pytest]\nshard_count = 7\n")
    assert "2 passed" in run_pytest(folder, test, "--shard-count=1")


def test_the_plugin_skips_without_servers_except_in_ci(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = "def test_servers(shard_servers): pass"
    (folder / "pytest.ini").write_text("[pytest]\nshard_redis_server = /nowhere\n")
    monkeypatch.delenv("CI", raising=False)
    assert "1 skipped" in run_pytest(folder, test)
    monkeypatch.setenv("CI", "true")
    assert "1 error" in run_pytest(folder, test)


def test_the_plugin_costs_nothing_until_it_is_used() -> None:
    code = """
import shardalchemy.local.pytest_plugin
print("shardalchemy.local.cluster" in sys.modules)
"""
    code = "import sys\n" + code
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == "False"
