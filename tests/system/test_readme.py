"""What the README says is what happens: its settings, its demo, its commands."""

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from smsd import config
from system.harness import ADMIN_TOKEN, Installation

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def between(start: str, end: str) -> str:
    """What stands in the README between two comments."""
    return README.partition(f"<!-- {start} -->")[2].partition(f"<!-- {end} -->")[0].strip()


def settings_table() -> str:
    """The table of settings as it must stand there."""
    rows = ["| variable | default | |", "|---|---|---|"]
    for name, field in config.Settings.model_fields.items():
        default = "" if field.default is None else str(field.default).lower()
        rows.append(f"| `SMSD_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def masked(output: str) -> list[str]:
    """Lines without their figures, tokens and blanks: what stays the same from run to run."""
    without_tokens = re.sub(r"/u/[\w-]+", "/u/…", output)
    without_figures = re.sub(r"\d[\d,.]*", "#", without_tokens)
    return [" ".join(line.split()) for line in without_figures.splitlines() if line.strip()]


def test_the_table_of_settings_is_the_settings() -> None:
    assert between("settings", "end of settings") == settings_table()


async def test_the_demo_prints_what_the_readme_shows(installation: Installation) -> None:
    done = await installation.command("demo", seconds=90)

    assert done.code == 0, done.out + done.err
    shown = masked(between("demo output", "end of demo output").strip("`\n"))
    assert len(shown) > 20
    assert [line for line in shown if line not in masked(done.out)] == []


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")),
    reason="the README's commands need curl and jq",
)
async def test_the_commands_of_the_readme_send_a_campaign(
    installation: Installation, tmp_path: Path
) -> None:
    await installation.migrate()
    daemon = await installation.serve()
    (script,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    environment = {
        **installation.environment(),
        "URL": daemon.url,
        "SMSD_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", script,
        env=environment, cwd=tmp_path, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()

    assert process.returncode == 0, err.decode()
    assert b'"status":"sending"' in out
    assert b"Hi Eleni, 20% off until Sunday." in out
    await installation.mitto.accepted_reached(2)
    assert sorted(m.destination for m in installation.mitto.ledger.messages(0, 10)) == [
        306900000001,
        306900000002,
    ]
