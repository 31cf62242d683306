"""`python -m bench NAME…`: runs benchmarks one after another; `make bench` and `smsd bench` do the same."""

import argparse
import asyncio
import importlib
import sys
from pathlib import Path

import uvloop

from bench import documents
from bench.common import CHECKOUT, Machine, Options

NAMES = ("pipeline", "receipts", "scale", "latency", "limits", "bloat", "soak", "certificate")
"""Each a module with `async def run(machine, options)`; the quick ones first."""


def main(arguments: list[str]) -> None:
    """Runs what is asked for; without names everything but the soak and bloat, which take half an hour each."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--runs", type=int, default=5, help="of each variant, alternating (5)")
    parser.add_argument("--quick", action="store_true", help="small and once: does it work?")
    parser.add_argument(
        "--out",
        type=Path,
        default=CHECKOUT / "docs" / "performance",
        help="where files go (docs/performance)",
    )
    parser.add_argument("--messages", type=int, nargs="+", default=[], help="sizes of your own")
    parser.add_argument("--minutes", type=float, help="of the soak and bloat (30)")
    parser.add_argument(
        "--write", action="store_true", help="run nothing: put the last figures into the documents"
    )
    given = parser.parse_args(arguments)
    if given.write:
        for name in ("README.md", "docs/performance.md"):
            print(f"{name}: {', '.join(documents.write(CHECKOUT / name, given.out)) or 'nothing'}")
        return
    if unknown := [name for name in given.name if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    names = given.name or [name for name in NAMES if name not in ("bloat", "soak")]
    options = Options(
        runs=1 if given.quick else given.runs,
        quick=given.quick,
        out=given.out,
        command=" ".join(["python -m bench", *arguments]),
        messages=tuple(given.messages),
        minutes=given.minutes,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(names, options))


async def _run(names: list[str], options: Options) -> None:
    for name in names:
        print(f"\n== {name}", flush=True)
        # Each has a Postgres of its own: a run must not inherit another's bloat.
        async with Machine() as machine:
            await importlib.import_module(f"bench.{name}").run(machine, options)


if __name__ == "__main__":
    main(sys.argv[1:])
