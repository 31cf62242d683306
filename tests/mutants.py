"""`make mutants`: takes one guard of an invariant out at a time, and shows that a test notices.

Each row is run in a copy of this checkout with its one replacement, which must match exactly once. A test that still
passes is a hole: exit 1. Of a SQL function only the newest definition counts.
"""

import asyncio
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import structlog
from system.chaos import DOCUMENT, write

from smsd import embedded

ROOT = Path(__file__).parents[1]
INVARIANTS = (
    "once", "nothing lost", "totals are true", "money adds up", "limits hold", "nobody starves",
    "receipts are kept", "tenants are walls",
)  # fmt: skip
_DEFINED = re.compile(r"^create (?:or replace )?function (\w+)", re.MULTILINE)


class Mutant(NamedTuple):
    """One guard, taken out."""

    invariant: str
    path: str
    old: str
    new: str
    test: str


def guards() -> tuple[Mutant, ...]:
    """Every row of guards.toml."""
    with (ROOT / "tests" / "guards.toml").open("rb") as file:
        return tuple(Mutant(**row) for row in tomllib.load(file)["guard"])


def copy_checkout(folder: Path) -> Path:
    """What the tests need of this checkout; .venv stays where it is."""
    for name in ("smsd", "sql", "tests", "docs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def look_up(mutant: Mutant, folder: Path) -> str:
    """The text of the guard's file; ValueError unless the guard stands there exactly once, and counts."""
    path = folder / mutant.path
    text = path.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.path} has {mutant.old!r} {found} times, not once")
    before = [one for one in _DEFINED.finditer(text) if one.start() <= text.index(mutant.old)]
    if path.suffix == ".sql" and before:
        for later in sorted(path.parent.glob("*.sql")):
            if later > path and before[-1][1] in _DEFINED.findall(later.read_text()):
                raise ValueError(f"{before[-1][1]} of {mutant.path} is another in {later.name}")
    return text


def apply(mutant: Mutant, folder: Path) -> None:
    """Takes the guard out; ValueError where `look_up` does not find it."""
    (folder / mutant.path).write_text(look_up(mutant, folder).replace(mutant.old, mutant.new))


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of this checkout's .venv in the copy: the working folder comes before whatever is installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def is_noticed(mutant: Mutant, dsn: str) -> str:
    """'' if the test fails without its guard, else what is wrong."""
    with tempfile.TemporaryDirectory(prefix="smsd-mutant-") as name:
        folder = copy_checkout(Path(name))
        where = run(
            folder, "-c", "import smsd, smsd.database as d; print(smsd.__file__, d.sql_folder())"
        )
        if where.stdout.count(str(folder)) != 2:
            return f"the copy is not what is tested: {where.stdout or where.stderr}"
        try:
            apply(mutant, folder)
        except ValueError as error:
            return str(error)
        pytest = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.test)
        done = run(folder, *pytest, SMSD_TEST_DATABASE_URL=dsn)
        if done.returncode == 1 and " failed" in done.stdout:
            return ""
        return "the test passes all the same" if done.returncode == 0 else done.stdout[-800:]


async def check(mutants: list[Mutant]) -> dict[Mutant, str]:
    """What is wrong with each, on one Postgres for all."""
    wrong = {}
    free = asyncio.Semaphore(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="smsd-mutants-") as folder:
        settings = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        async with embedded.Postgres(Path(folder), settings=settings) as server:

            async def look(mutant: Mutant) -> None:
                async with free:
                    wrong[mutant] = await asyncio.to_thread(is_noticed, mutant, server.dsn)
                done = f"{len(wrong)}/{len(mutants)} {mutant.invariant}: {mutant.path}"
                sys.stdout.write(f"{done}: {wrong[mutant] or 'noticed'}\n")
                sys.stdout.flush()

            await asyncio.gather(*map(look, mutants))
    return wrong


def table(wrong: dict[Mutant, str]) -> str:
    """Every guard and the test that notices, as Markdown."""
    today = datetime.datetime.now(datetime.UTC).date()
    missed = sum(map(bool, wrong.values()))
    lines = [f"`make mutants`, {today}: {len(wrong)} guards taken out, {missed} not noticed.", ""]
    lines += ["| invariant | taken out of | guard | noticed by |", "|---|---|---|---|"]
    for mutant, problem in sorted(
        wrong.items(), key=lambda item: INVARIANTS.index(item[0].invariant)
    ):
        old = " ".join(mutant.old.split()).replace("|", "\\|")
        test = mutant.test.partition("::")[2] if not problem else f"**not noticed**: {mutant.test}"
        lines.append(f"| {mutant.invariant} | `{mutant.path}` | `{old}` | {test} |")
    return "\n".join(lines)


def main() -> int:
    """Arguments: parts of paths, tests or invariants to run alone; then nothing is written."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    wanted = sys.argv[1:]
    chosen = [
        one for one in guards() if not wanted or any(word in "|".join(one) for word in wanted)
    ]
    wrong = asyncio.run(check(chosen))
    if not wanted:
        write(DOCUMENT, "mutants", table(wrong))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
