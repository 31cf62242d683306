"""What befalls a run of the bench: every fault by its name, in families.

`kill@POINT`, `stop@POINT`: the named points of `smsd/faults.py`. `mitto.SWITCH`, `item.SWITCH`, `receipts.SWITCH`: a
share of requests, items, receipts is struck by that switch of the simulator. The rest are strikes, functions here.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from smsd import embedded, faults
from smsd.simulator import Fault, Simulator, Switches
from smsd.simulator.switches import ItemFault
from system import proxy
from system.bench import LEASE_SECONDS, SETTINGS, Bench, Scenario, Verdict, stock
from system.harness import Installation
from system.proxy import Harm

Strike = Callable[[Bench, random.Random], Awaitable[None]]
STRIKES: dict[str, Strike] = {}
WRONG_CLOCK = Path(__file__).parent / "wrongclock"
SECOND = 1.0
OF_RECEIPTS = (
    "dlr_failed", "dlr_doubled", "dlr_out_of_order", "dlr_contradicting", "dlr_unknown_word", "dlr_before_answer",
)  # fmt: skip
NOT_DRAWN = {
    # Which id is whose cannot be known then: sampled by GET, not decided by what the answer says.
    Fault.SHUFFLED_ANSWER,
    # Says that nothing was accepted: an account must be told that such answers cannot be believed.
    Fault.ACCEPT_THEN_500,
}
PAUSING = {
    Fault.FAIL_400,
    Fault.FAIL_401,
    Fault.FAIL_403,
    Fault.FAIL_404,
    Fault.FAIL_OTHER,
    Fault.REDIRECT,
}
POSTGRES_OF_OUR_OWN = {"postgres.crash", "postgres.away"}


def strike(name: str) -> Callable[[Strike], Strike]:
    """Names a strike."""

    def keep(function: Strike) -> Strike:
        STRIKES[name] = function
        return function

    return keep


# ----------------------------------------------------------------------------------------- processes


def _signalled(name: str, number: signal.Signals) -> Strike:
    async def send(bench: Bench, dice: random.Random) -> None:
        if ready := bench.replicas.ready:
            one = dice.choice(ready)
            if number is not signal.SIGSTOP:
                bench.replicas.disarm(one)
            one.signal(number)
            bench.verdict.struck[name] += 1
            if number is signal.SIGTERM:
                await one.ended(30)

    return strike(name)(send)


_signalled("kill", signal.SIGKILL)
_signalled("stop", signal.SIGSTOP)
_signalled("term", signal.SIGTERM)


# ------------------------------------------------------------------------------------------ Postgres


@strike("postgres.terminate")
async def _terminate(bench: Bench, dice: random.Random) -> None:
    rows = await bench.execute(
        "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    )
    for row in dice.sample(rows, min(len(rows), dice.randint(1, 4))):
        await bench.execute("select pg_terminate_backend($1)", row["pid"])
        bench.verdict.struck["postgres.terminate"] += 1


async def without_postgres(bench: Bench, seconds: float) -> None:
    """Stops Postgres as `pg_ctl stop -m immediate` does, and starts it again after so long."""
    server = bench.postgres
    assert server is not None, "this run has a Postgres that is not its own"
    assert server.pid is not None
    os.kill(server.pid, signal.SIGQUIT)
    await server.wait_exit()
    await asyncio.sleep(seconds)
    await server.start()


@strike("postgres.crash")
async def _crash(bench: Bench, dice: random.Random) -> None:
    bench.verdict.struck["postgres.crash"] += 1
    await without_postgres(bench, dice.uniform(0.0, 0.5))


@strike("postgres.away")
async def _away(bench: Bench, dice: random.Random) -> None:
    bench.verdict.struck["postgres.away"] += 1
    await without_postgres(bench, bench.scenario.away_seconds)


@strike("postgres.clock")
async def _step(bench: Bench, dice: random.Random) -> None:
    """The database's clock is an hour ahead from now on, or right again."""
    await bench.execute(
        "update bench_clock set ahead = case when ahead = interval '0' then interval '1 hour' else interval '0' end"
    )
    bench.verdict.struck["postgres.clock"] += 1
    await asyncio.sleep(3 * SECOND)


async def make_clock_movable(bench: Bench) -> None:
    """A clock_timestamp() and now() of ours stand before Postgres' own in this database."""
    name = bench.dsn.partition("?")[0].rpartition("/")[2]
    await bench.execute("create table bench_clock as select interval '0' as ahead")
    for function in ("clock_timestamp", "now"):
        await bench.execute(
            f"create function public.{function}() returns timestamptz language sql volatile as "
            f"$$ select pg_catalog.{function}() + (select ahead from public.bench_clock) $$"
        )
    await bench.execute(f'alter database "{name}" set search_path = public, pg_catalog')


# ------------------------------------------------------------------------------------------- network


def _harmed(name: str, harm: Harm, to: Callable[[Bench], proxy.Proxy], share: float) -> Strike:
    async def do(bench: Bench, dice: random.Random) -> None:
        between = to(bench)
        struck = between.struck
        await between.do(harm, share)
        await asyncio.sleep(dice.uniform(0.3, 1.2))
        await between.do(Harm.NONE)
        bench.verdict.struck[name] += between.struck - struck

    return strike(name)(do)


for _harm in Harm:  # in order: a seed draws from the list of all strikes
    if _harm not in (Harm.NONE, Harm.LATE):
        _share = 1.0 if _harm is Harm.REFUSED else 0.3
        _harmed(f"net.mitto.{_harm}", _harm, lambda bench: bench.to_mitto, _share)
    if _harm not in (Harm.NONE, Harm.SLOW, Harm.CLOSED):
        _harmed(f"net.postgres.{_harm}", _harm, lambda bench: bench.to_postgres, 0.1)


# --------------------------------------------------------------------------------------------- Mitto


@strike("mitto.outage")
async def _outage(bench: Bench, dice: random.Random) -> None:
    bench.verdict.struck["mitto.outage"] += 1
    await bench.mitto.stop()
    await asyncio.sleep(dice.uniform(0.5, 2.5) * SECOND)
    await bench.mitto.start()


@strike("mitto.ceiling")
async def _ceiling(bench: Bench, dice: random.Random) -> None:
    """For a while Mitto takes less than we were told."""
    plans = zip(bench.scenario.tenants, bench.shops, strict=True)
    limits = {
        shop.account: max(1, int(plan.account_requests * dice.uniform(0.3, 0.8)))
        for plan, shop in plans
    }
    bench.mitto.switches.retry_after = dice.choice([None, 1, "date"])
    bench.mitto.switches.limits_by_account = limits
    await asyncio.sleep(dice.uniform(1.0, 3.0))
    bench.mitto.switches.limits_by_account = {}
    bench.verdict.struck["mitto.ceiling"] += 1


STATIC = ("clock.wall", "net.mitto.no name")
POINTS = tuple(point for point in faults.POINTS if not point.startswith("retention."))
"""Those that a campaign passes; the others are in `test_retention`."""
ARMED = tuple(f"{action}@{point}" for action in ("kill", "stop") for point in POINTS)
OF_MITTO = tuple(f"mitto.{fault.value}" for fault in Fault if fault not in NOT_DRAWN)
OF_ITEMS = tuple(f"item.{fault.value}" for fault in ItemFault)
FAULTS = (
    *ARMED,
    *STRIKES,
    *OF_MITTO,
    *OF_ITEMS,
    *(f"receipts.{name}" for name in OF_RECEIPTS),
    *STATIC,
)


# -------------------------------------------------------------------------------------- a run of them


def share_of(name: str, dice: random.Random) -> float:
    """The share of requests, items or receipts that a switch strikes."""
    family, _, switch = name.partition(".")
    if family == "receipts":
        return round(dice.uniform(0.1, 0.5), 3)
    if family == "item" or switch in PAUSING:
        return round(dice.uniform(0.005, 0.02), 3)
    return round(dice.uniform(0.03, 0.12), 3)


async def prepare(bench: Bench) -> None:
    """Database, tenants, proxies, switches and replicas of a run, up to the start of the daemons."""
    scenario = bench.scenario
    dice = scenario.dice("prepare")
    believed = "unknown" if "mitto.accept_then_500" in scenario.faults else "refused"
    if "postgres.clock" in scenario.faults:
        await make_clock_movable(bench)
    bench.shops = await stock(bench.dsn, scenario.tenants, bench.installation, believed)
    switches: dict[str, object] = {"seed": scenario.seed, "dlr_batch": 50, **scenario.switches}
    for name in scenario.faults:
        family, _, switch = name.partition(".")
        if family in ("mitto", "item", "receipts") and name not in STRIKES:
            switches.setdefault(switch, share_of(name, dice))
        if family in ("item", "receipts"):
            bench.verdict.struck[name] += 1  # one run: the simulator does not count them
    bench.mitto.switches = Switches.model_validate(switches)
    points = [name for name in scenario.faults if "@" in name]
    settings = [_settings(bench, place) for place in range(scenario.replicas)]
    bench.replicas = type(bench.replicas)(bench.installation, bench.verdict, settings)
    if points:
        orders = iter([_order(points[i % len(points)], dice) for i in range(scenario.armed_lives)])
        bench.replicas.orders = lambda _place: next(orders, None)


def _order(name: str, dice: random.Random) -> str:
    action, _, point = name.partition("@")
    most = {"chunk": 1, "receipts": 3}.get(point.partition(".")[0], 8)
    return f"{point}:{dice.randint(1, most)}:{action}"


def _settings(bench: Bench, place: int) -> dict[str, object]:
    """How the replica of this place is started."""
    settings: dict[str, object] = dict(SETTINGS)
    names = bench.scenario.faults
    if any(name.startswith("net.mitto.") for name in names):
        settings["mitto_base_url"] = f"http://{bench.to_mitto.address}"
    if any(name.startswith("net.postgres.") for name in names):
        settings["database_url"] = proxy.dsn_through(bench.to_postgres, bench.dsn)
    if "net.mitto.no name" in names and place == 0:
        settings["mitto_base_url"] = "http://mitto.invalid"
        bench.verdict.struck["net.mitto.no name"] += 1
    if "clock.wall" in names and place % 2 == 0:
        seconds = 3600 if bench.scenario.seed % 2 else -3600
        settings["extra"] = {
            "PYTHONPATH": str(WRONG_CLOCK),
            "SMSD_TEST_CLOCK_SECONDS": str(seconds),
        }
        bench.verdict.struck["clock.wall"] += 1
    return settings


async def befall(bench: Bench) -> None:
    """Strikes in turn until every campaign has ended."""
    dice = bench.scenario.dice("befall")
    strikes = [name for name in bench.scenario.faults if name in STRIKES]
    turns: list[str] = []
    left = bench.scenario.most_strikes
    # A point of the receipts may lie ahead of a life that began when all was sent.
    while not bench.over() or (bench.replicas.armed and bench.mitto.receipts.outstanding):
        await asyncio.sleep(dice.uniform(*bench.scenario.pause_seconds))
        if strikes and left and not bench.over():
            turns, left = turns or dice.sample(strikes, len(strikes)), left - 1
            await STRIKES[turns.pop()](bench, dice)


async def calm(bench: Bench) -> None:
    """No more faults: what lies in ruins is put up again."""
    bench.replicas.orders = lambda _place: None
    await bench.to_mitto.do(Harm.NONE)
    await bench.to_postgres.do(Harm.NONE)
    if bench.postgres is not None:
        await bench.postgres.start()
    with contextlib.suppress(OSError):
        await bench.mitto.start() if not await _listens(bench.mitto) else None
    kept = {
        name: value
        for name, value in bench.scenario.switches.items()
        if name.startswith(("dlr", "latency"))
    }
    seed = bench.mitto.switches.seed
    bench.mitto.switches = Switches.model_validate({"seed": seed, "dlr_batch": 50, **kept})
    for one in bench.replicas.places:
        # A point that was not reached is not reached any more: it would strike in calm.
        if one is not None and one.lives and bench.replicas.disarm(one) and not one.stopped:
            one.signal(signal.SIGKILL)
    await asyncio.sleep(LEASE_SECONDS / 10)


async def _listens(mitto: Simulator) -> bool:
    try:
        _, writer = await asyncio.open_connection(mitto.host, mitto.port)
    except OSError:
        return False
    writer.close()
    return True


async def run(
    scenario: Scenario,
    dsn: str,
    folder: Path,
    postgres: embedded.Postgres | None = None,
    doing: Callable[[Bench], Awaitable[None]] = befall,
) -> tuple[Verdict, Bench]:
    """Plays a scenario on a database that has the schema and nothing else. postgres: its server, where that may be
    stopped. doing: what befalls it, its own faults in turn unless told. The bench is for its logs and its ledger."""
    async with Simulator() as mitto, Installation(dsn, mitto, folder) as installation:
        bench = Bench(scenario, installation, postgres)
        async with bench.to_mitto, bench.to_postgres:
            await prepare(bench)
            return await bench.play(doing, calm), bench
