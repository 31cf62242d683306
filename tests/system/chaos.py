"""`make chaos`: seeded scenarios one after the other until the time is over, then the table of what they came to.

A seed decides who sends, how much, under which limits, on how many replicas, and which faults befall them in which
order; when exactly each strikes depends on the machine too. `make chaos SEED=…` plays the one of that seed again.
"""

import argparse
import asyncio
import datetime
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import asyncpg
import structlog

from smsd import daemon, embedded
from system import befall
from system.bench import Bench, Scenario, Tenant, Verdict

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
FAMILIES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("kill -9 at a named point", lambda name: name.startswith("kill@")),
    ("kill -9 at random", lambda name: name == "kill"),
    ("SIGSTOP for longer than a lease", lambda name: name.startswith("stop")),
    ("SIGTERM and start", lambda name: name == "term"),
    ("Postgres", lambda name: name.startswith("postgres.")),
    ("network to Postgres", lambda name: name.startswith("net.postgres.")),
    ("network to Mitto", lambda name: name.startswith("net.mitto.")),
    ("Mitto", lambda name: name.startswith(("mitto.", "item."))),
    ("receipts", lambda name: name.startswith("receipts.")),
    ("wrong clocks", lambda name: name.startswith("clock.")),
)


# ------------------------------------------------------------------------------------------- scenarios


def draw(seed: int, away_seconds: float) -> Scenario:
    """The scenario of a seed."""
    dice = random.Random(seed)
    if seed % 4 == 0:
        return _steady(seed, dice)
    accounts = dice.choice([1, 1, 1, 2])
    rates = [dice.choice([20, 30, 50]) for _ in range(accounts)]
    batch_size = dice.choice([10, 20, 50, 100])
    # In one run of four it is messages that are limited, to less than the requests would carry.
    messages_too = dice.random() < 0.25
    tenants = []
    for number in range(dice.randint(accounts, 3)):
        account = number % accounts
        sending_seconds = dice.uniform(3, 10)
        messages = min(6_000, int(sending_seconds * rates[account] * batch_size))
        tenants.append(Tenant(
            messages=max(500, messages), batch_size=batch_size, account=account, account_requests=rates[account],
            account_messages=rates[account] * batch_size * 2 // 3 if messages_too else None,
            requests=dice.choice([10_000, 10_000, max(5, rates[account] // 2)]), weight=dice.choice([1.0, 1.0, 2.0]),
        ))  # fmt: skip
    faults = _faults(dice)
    latency = dice.choice([0.0, 0.05, 0.2, 0.6])
    return Scenario(
        seed=seed, tenants=tuple(tenants), faults=faults, replicas=dice.choice([1, 2, 2, 3]),
        switches={"latency_seconds": latency, "latency_jitter_seconds": latency / 2, "dlr_failed": 0.05},
        seconds=max(20.0, away_seconds + 15), away_seconds=away_seconds, armed_lives=dice.randint(2, 6),
    )  # fmt: skip


def _steady(seed: int, dice: random.Random) -> Scenario:
    """Every fourth run: replicas come and go beside one or two that work on, and the use of the limit is measured."""
    rate, latency = dice.choice([20, 50]), dice.choice([0.0, 0.2, 0.6])
    tenants = [Tenant(rate * 8 * 10, 10, account_requests=rate) for _ in range(2)]
    return Scenario(
        seed=seed, tenants=tuple(tenants), faults=("kill", "term", *_points(dice, "kill", 1)), replicas=3,
        switches={"latency_seconds": latency, "latency_jitter_seconds": latency / 2}, armed_lives=1,
        pause_seconds=(1.5, 3.0),
    )  # fmt: skip


def _points(dice: random.Random, action: str, most: int) -> tuple[str, ...]:
    return tuple(dice.sample([name for name in befall.ARMED if name.startswith(action)], most))


def _faults(dice: random.Random) -> tuple[str, ...]:
    """Alone or together: one to four kinds, and in half of the runs a mixture of answers on top."""
    drawn = [
        *_points(dice, "kill", dice.randint(0, 2)),
        *_points(dice, "stop", dice.choice([0, 0, 1])),
    ]
    drawn += dice.sample([*befall.STRIKES, *befall.STATIC], dice.randint(1, 3))
    if dice.random() < 0.5:
        drawn += dice.sample([*befall.OF_MITTO, *befall.OF_ITEMS], dice.randint(1, 5))
    drawn += [f"receipts.{name}" for name in befall.OF_RECEIPTS if dice.random() < 0.3]
    return tuple(drawn)


# ------------------------------------------------------------------------------------------------ runs


async def play(
    scenario: Scenario, server: embedded.Postgres, folder: Path
) -> tuple[Verdict, Bench]:
    """One scenario on a database of its own."""
    name = f"chaos_{uuid.uuid4().hex[:8]}"
    await _execute(server.dsn, f"create database {name}")
    dsn = server.dsn.replace("/smsd?", f"/{name}?")
    try:
        await daemon.migrate(dsn)
        return await befall.run(scenario, dsn, folder, server)
    finally:
        await server.start()
        await _execute(server.dsn, f"drop database {name} with (force)")


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def chaos(minutes: float, seed: int | None, first: int) -> list[Verdict]:
    """Plays scenarios for so many minutes, or the one of a seed; says one line about each."""
    verdicts: list[Verdict] = []
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="smsd-chaos-") as folder:
        async with embedded.Postgres(Path(folder) / "server", settings={"fsync": "off"}) as server:
            number = seed if seed is not None else first
            while True:
                left = minutes * 60 - (time.monotonic() - started_at)
                away_seconds = 60.0 if minutes >= 10 and number % 16 == 7 else 3.0
                scenario = draw(number, away_seconds)
                place = Path(folder) / str(number)
                place.mkdir()
                verdict, bench = await play(scenario, server, place)
                verdicts.append(verdict)
                _tell(verdict, time.monotonic() - started_at, left)
                if verdict.breaches:
                    _keep_logs(bench, number)
                number += 1
                if seed is not None or time.monotonic() - started_at > minutes * 60:
                    return verdicts


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _tell(verdict: Verdict, elapsed: float, left: float) -> None:
    scenario = verdict.scenario
    use = "" if verdict.use is None else f", use {verdict.use:.3f}"
    _say(
        f"seed {scenario.seed}: {'BROKEN' if verdict.breaches else 'ok'} in {verdict.seconds:.0f} s, "
        f"{scenario.replicas} replicas, {verdict.messages} messages, {verdict.deaths} kills, "
        f"{sum(verdict.struck.values())} faults, {verdict.unknown} unknown, {verdict.resolved} resolved, "
        f"worst second {verdict.worst:.3f}{use}  "
        f"[{' '.join(scenario.faults)}]  {elapsed / 60:.1f} min gone, {max(0.0, left) / 60:.1f} left"
    )
    for breach in verdict.breaches:
        _say(f"  {breach[:1000]}")
    if verdict.breaches:
        _say(f"  again: make chaos SEED={scenario.seed}")


def _keep_logs(bench: Bench, seed: int) -> None:
    path = Path(tempfile.gettempdir()) / f"smsd-chaos-{seed}.log"
    path.write_text(
        "\n".join(f"{one.name}: {line}" for one in bench.installation.daemons for line in one.lines)
    )
    _say(f"  what the daemons said: {path}")


# ------------------------------------------------------------------------------------------- the table


def table(verdicts: Sequence[Verdict], command: str) -> str:
    """What all runs came to, as Markdown."""
    struck: Counter[str] = sum((verdict.struck for verdict in verdicts), Counter())
    families = {
        title: sum(n for name, n in struck.items() if belongs(name)) for title, belongs in FAMILIES
    }
    uses = [verdict.use for verdict in verdicts if verdict.use is not None]
    judged, unjudged = sum(one.judged for one in verdicts), sum(one.unjudged for one in verdicts)
    rows: list[tuple[str, object]] = [
        ("runs", len(verdicts)),
        ("seeds", f"{verdicts[0].scenario.seed} to {verdicts[-1].scenario.seed}"),
        ("kills of a daemon", sum(verdict.deaths for verdict in verdicts)),
        *[(f"faults: {title}", n) for title, n in families.items()],
        ("messages", sum(verdict.messages for verdict in verdicts)),
        ("accepted by the simulator", sum(verdict.accepted for verdict in verdicts)),
        ("duplicates", sum(verdict.duplicates for verdict in verdicts)),
        ("lost", sum(verdict.lost for verdict in verdicts)),
        ("contradictions", sum(verdict.contradictions for verdict in verdicts)),
        ("receipts lost", sum(verdict.receipts_lost for verdict in verdicts)),
        ("unknown at the end", sum(verdict.unknown for verdict in verdicts)),
        ("unknown meanwhile and resolved", sum(verdict.resolved for verdict in verdicts)),
        ("unknown at the end though a receipt came", sum(verdict.resolvable for verdict in verdicts)),
        ("worst second / limit", f"{max(one.worst for one in verdicts):.3f} of {judged} seconds; {unjudged} not judged"),
        ("use of the limit while replicas come and go", f"{min(uses):.3f} to {max(uses):.3f}" if uses else "not measured"),
        ("broken runs", sum(bool(verdict.breaches) for verdict in verdicts)),
    ]  # fmt: skip
    lines = ["| | |", "|---|---|", *[f"| {what} | {value} |" for what, value in rows]]
    kinds = ", ".join(f"{name} {n}" for name, n in sorted(struck.items()))
    today = datetime.datetime.now(datetime.UTC).date()
    return "\n".join([f"`{command}`, {today}:", "", *lines, "", f"Each kind: {kinds}."])


def write(document: Path, name: str, content: str) -> None:
    """Puts what was produced between its markers in a document."""
    text = document.read_text()
    begin, end = f"<!-- {name}: produced, do not edit -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    assert found, f"{document} has no {begin}"
    _, found, after = rest.partition(end)
    assert found, f"{document} has no {end}"
    document.write_text(f"{before}{begin}\n{content}\n{end}{after}")


def main() -> int:
    """The exit code: 1 if anything was broken."""
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--minutes", type=float, default=30, help="MINUTES=, how long")
    parser.add_argument("--seed", type=int, help="SEED=, only the scenario of this seed")
    parser.add_argument("--first", type=int, default=1, help="FIRST=, the seed to begin with")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    verdicts = asyncio.run(chaos(given.minutes, given.seed, given.first))
    command = f"make chaos MINUTES={given.minutes:g} FIRST={given.first}"
    content = table(verdicts, command if given.seed is None else f"make chaos SEED={given.seed}")
    _say("\n" + content)
    if given.seed is None:
        write(DOCUMENT, "chaos", content)
    return int(any(verdict.breaches for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
