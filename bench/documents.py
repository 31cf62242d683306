"""Puts what was measured into the documents: between `<!-- bench: NAME -->` and `<!-- end of bench -->` stands the chart,
the table and where they come from, as NAME.json and NAME.svg have them."""

import json
import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(<!-- bench: ([\w-]+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def write(document: Path, folder: Path) -> list[str]:
    """Fills the blocks of a document from the files in `folder`; those without a file stay. The names it filled."""
    filled: list[str] = []

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        file = folder / f"{name}.json"
        if not file.exists():
            return found[0]
        filled.append(name)
        link = (folder / f"{name}.svg").relative_to(document.parent)
        return f"{found[1]}{block(json.loads(file.read_text()), link.as_posix())}{found[3]}"

    document.write_text(BLOCK.sub(fill, document.read_text()))
    return filled


def block(content: dict[str, Any], chart: str) -> str:
    """Markdown of one benchmark; `content` as `common.report` writes it."""
    machine = content["machine"]
    runs = max((len(v) for one in content["results"].values() for v in one.values()), default=0)
    compared = f", × what {content['reference']} has" if content["reference"] else ""
    return (
        f"![{content['name']}]({chart})\n\n{content['table']}\n\n"
        f"{f'Medians of {runs} runs' if runs > 1 else 'One run'} (least–most){compared}. {machine['cores']} cores ({machine['cpu']}),"
        f" {machine['memory_bytes'] / 2**30:.0f} GB, Postgres {machine['postgres']}, Python"
        f" {machine['python']}; {content['date'][:10]}, `{content['command']}`.\n"
    )
