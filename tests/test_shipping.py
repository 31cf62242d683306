"""What leaves the checkout: the wheel, the locks, the systemd unit, the image, and `make` itself."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smsd import config

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "smsd.service"
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without what an outer `make` left in the environment."""
    outer = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=outer | environment
    )


def variables(text: str) -> set[str]:
    """The settings that a text names; `SMSD_X_FILE` counts as `SMSD_X`, prose with an ellipsis not."""
    return {name.removesuffix("_FILE") for name in re.findall(r"\bSMSD_[A-Z_]+[A-Z]\b", text)}


def settings() -> set[str]:
    return {config.PREFIX + name.upper() for name in config.Settings.model_fields}


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(folder.glob("smsd-*.whl")))


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_the_sql_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = {f"smsd/{name}" for name in files_below(ROOT / "smsd")}
    sql = {f"smsd/sql/{name}" for name in files_below(ROOT / "sql")}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == package | sql
    assert {"smsd/py.typed", "smsd/data/contacts.csv"} <= shipped


def test_an_installed_wheel_finds_its_own_sql(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    found = run(
        sys.executable,
        "-Pc",  # not from the folder that we stand in
        "from smsd import database as d; print(d.sql_folder(), *[m.name for m in d.migrations()])",
        PYTHONPATH=str(tmp_path),
    )
    names = sorted(path.stem for path in (ROOT / "sql" / "migrations").glob("*.sql"))
    assert found.stdout.split() == [str(tmp_path / "smsd" / "sql"), *names], found.stderr


def test_the_wheel_carries_its_licence(wheel: zipfile.ZipFile) -> None:
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in wheel.read(metadata).decode()
    assert (
        wheel.read(metadata.replace("METADATA", "licenses/LICENSE"))
        == (ROOT / "LICENSE").read_bytes()
    )


# The locks


def pins(lock: str) -> dict[str, str]:
    """Name → version of a lock, each of whose requirements must be pinned and carry a hash."""
    text = (ROOT / lock).read_text()
    found = dict[str, str]()
    for line in text.replace("\\\n", "").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            bare = re.sub(r"\[.*?\]", "", line)  # extras
            name, version, rest = re.split(r"==| ", bare, maxsplit=2)
            assert "--hash=sha256:" in rest, line
            found[name] = version
    return found


def requirements(*groups: str) -> list[Requirement]:
    """What pyproject.toml asks for: the runtime, the embedded extra and these groups."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = (
        project["project"]["dependencies"] + project["project"]["optional-dependencies"]["embedded"]
    )
    for group in groups:
        asked += [each for each in project["dependency-groups"][group] if isinstance(each, str)]
    return [Requirement(each) for each in asked]


@pytest.mark.parametrize(
    ("lock", "groups"),
    [
        ("requirements.lock", ("build",)),
        ("requirements-dev.lock", ("build", "dev")),
        ("requirements-bench.lock", ("build", "bench")),
    ],
)
def test_a_lock_has_all_that_pyproject_asks_for(lock: str, groups: tuple[str, ...]) -> None:
    pinned = pins(lock)
    unmet = [
        str(each)
        for each in requirements(*groups)
        if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0"))
    ]
    assert unmet == [], "make lock"


def test_what_is_shipped_is_what_was_tested() -> None:
    shipped = pins("requirements.lock").items()
    assert shipped <= pins("requirements-dev.lock").items()
    assert shipped <= pins("requirements-bench.lock").items()


@pytest.mark.parametrize(
    "lock", ["requirements.lock", "requirements-dev.lock", "requirements-bench.lock"]
)
def test_a_lock_names_no_index_and_no_folder(lock: str) -> None:
    assert re.findall(r"\S*/\S*", (ROOT / lock).read_text()) == []


# The systemd unit


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    version = int(run("systemd-analyze", "--version").stdout.split()[1])
    if version < 250:
        pytest.skip(f"systemd {version} cannot judge a unit that is not loaded")
    return run("systemd-analyze", *arguments)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here."""
    program = tmp_path / "smsd"
    program.symlink_to(sys.executable)
    copy = tmp_path / "smsd.service"
    copy.write_text(UNIT.read_text().replace("/opt/smsd/bin/smsd", str(program)))
    return copy


def directive(name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


def test_systemd_finds_no_fault_in_the_unit(unit: Path) -> None:
    verified = systemd_analyze("verify", "--man=no", unit)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_unit_exposes_little(unit: Path) -> None:
    judged = systemd_analyze("security", "--offline=true", "--threshold=20", "--no-pager", unit)
    assert judged.returncode == 0, judged.stdout


def test_systemd_waits_longer_than_the_daemon_takes_to_stop() -> None:
    assert int(directive("TimeoutStopSec")) > config.load({}).shutdown_seconds


@pytest.mark.parametrize(
    "path", ["systemd/smsd.service", "systemd/smsd.env.example", "Dockerfile", "Makefile"]
)
def test_every_setting_that_is_named_exists(path: str) -> None:
    named = variables((ROOT / path).read_text())
    assert named
    assert named <= settings()


def test_the_example_environment_starts_once_its_secrets_are_filled_in() -> None:
    lines = (UNIT.parent / "smsd.env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line.startswith("SMSD_"))
    filled = {name: value or "0123456789abcdef" for name, value in example.items()}
    loaded = config.load(filled)
    assert loaded.public_url == example["SMSD_PUBLIC_URL"]
    assert loaded.admin_token is not None


# The image


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def test_the_image_has_a_pinned_base_and_does_not_run_as_root() -> None:
    assert {each.split()[0] for each in instructions("FROM")} == {"python:3.13-slim-trixie"}
    assert [int(part) > 0 for part in instructions("USER")[-1].split(":")] == [True, True]


def test_the_image_is_built_from_files_that_docker_is_shown() -> None:
    shown = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [
        source
        for each in instructions("COPY")
        if not each.startswith("--from=")
        for source in each.split()[:-1]
    ]
    assert [each for each in sources if f"!{each}" not in shown] == []
    assert {"smsd", "sql", "requirements.lock"} <= set(sources)


class Health(http.server.BaseHTTPRequestHandler):
    """Answers /healthz with the status that the test asks for."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def health() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_asks_the_daemon(
    health: int, monkeypatch: pytest.MonkeyPatch, status: int, healthy: bool
) -> None:
    monkeypatch.setattr(Health, "status", status)
    [check] = instructions("HEALTHCHECK")
    _python, *arguments = json.loads(check.partition(" CMD ")[2])
    proxy = "http://127.0.0.1:9"  # which must not come between
    asked = run(sys.executable, *arguments, SMSD_PORT=str(health), http_proxy=proxy)
    assert (asked.returncode == 0) is healthy, asked.stderr


# make


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space in its name and what `make demo` looks at first."""
    folder = tmp_path / "fresh checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_demo(checkout: Path, python: str | Path, **environment: str) -> str:
    """What `make demo` says when it gives up."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    made = run("make", "-C", checkout, "demo", f"PYTHON={python}", **environment)
    assert made.returncode == 2
    [said] = [line for line in made.stderr.splitlines() if re.match(r"make: [^*]", line)]
    return said


def test_make_says_that_it_found_no_python(checkout: Path) -> None:
    said = make_demo(checkout, "python-that-is-nowhere")
    assert "no Python 3.11 or newer among python-that-is-nowhere" in said
    assert not (checkout / ".venv").exists()


def test_make_says_which_package_a_python_without_ensurepip_lacks(checkout: Path) -> None:
    bare = checkout / "bare"
    bare.write_text(
        f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
    )
    bare.chmod(0o755)
    said = make_demo(checkout, "./bare")
    assert f"apt install python3.{sys.version_info.minor}-venv" in said


def test_make_says_that_nothing_can_be_installed_without_an_index(checkout: Path) -> None:
    pytest.importorskip("ensurepip", reason="this Python cannot make a venv")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    closed = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    said = make_demo(checkout, sys.executable, **nowhere, **closed)
    assert "requirements.lock could not be installed" in said
    assert not (checkout / ".venv" / ".installed").exists()


def test_ci_runs_every_test_from_any_folder_and_passes_the_verdict_on(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "make"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$PWD: make $*"\nexit 3\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (3, f"{ROOT}: make test\n")
