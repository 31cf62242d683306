"""The verdict on a run of the bench: what its daemons say and have written, against what the simulator saw."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smsd import audit, database
from smsd.simulator import Report
from smsd.simulator.ledger import Request

if TYPE_CHECKING:
    from system.bench import Bench


async def judge(bench: "Bench") -> None:
    """Checks every invariant of a run that has come to rest."""
    verdict, ledger = bench.verdict, bench.mitto.ledger
    for request in ledger.requests:
        if request.fault is not None:
            verdict.struck[f"mitto.{request.fault.value}"] += 1
    verdict.accepted = ledger.accepted_count
    twice = ledger.duplicates("destination_text")
    verdict.duplicates = len(twice)
    verdict.check(not twice, f"accepted twice: {twice[:3]}")
    await _check_messages(bench)
    await _check_money(bench)
    await _check_leases(bench)
    await _check_limits(bench)
    verdict.resolved = max(0, sum(one.most_unknown for one in bench.campaigns) - bench.unknown())


async def _check_messages(bench: "Bench") -> None:
    verdict = bench.verdict
    rows = await bench.execute(
        "select phone, text, status, own_state, provider_id, reason from message_shown"
    )
    ours = {(row["phone"], row["text"]): row for row in rows}
    verdict.messages = len(rows)
    verdict.check(len(ours) == len(rows), "a message stands twice in the database")
    expected = sum(plan.messages for plan in bench.scenario.tenants)
    campaigns_own = sum(not text.startswith("single ") for _, text in ours)
    verdict.check(campaigns_own == expected, f"{campaigns_own} messages for {expected} recipients")
    statuses = Counter(row["status"] for row in rows)
    verdict.lost = sum(statuses[open_] for open_ in ("queued", "processing", None))
    verdict.check(not verdict.lost, f"not spoken for: {statuses}")
    verdict.unknown = statuses["unknown"]
    answered = set(bench.singles) - {text for _, text in ours}
    # The last one may not have been answered.
    verdict.check(len(answered) <= 1, f"single messages were lost: {sorted(answered)[:3]}")
    _check_contradictions(bench, ours)
    if verdict.resolvable:
        asked = await bench.execute(
            "select verdict, asked, cardinality(candidates) as candidates, next_ask_at, count(*) as n"
            "  from early_receipt group by 1, 2, 3, 4 order by n desc limit 5"
        )
        verdict.breaches.append(
            f"{verdict.resolvable} are unknown though their receipts came: {[dict(row) for row in asked]}"
        )


def _check_contradictions(bench: "Bench", ours: Mapping[tuple[int, str], Any]) -> None:
    verdict, wrong = bench.verdict, []
    there = {(one.destination, one.text): one for one in bench.mitto.ledger.messages()}
    for key, accepted in there.items():
        row = ours.get(key)
        if row is not None and row["status"] == "unknown":
            verdict.resolvable += accepted.receipt is not None
        elif row is None or row["own_state"] not in (10, 11, 20, 30):
            wrong.append(f"accepted there, here {dict(row) if row else None}")
        elif row["provider_id"] == accepted.message_id:
            final = {Report.DELIVERED: 30, Report.FAILED: 20}.get(accepted.receipt or Report.QUEUED)
            verdict.receipts_lost += final is not None and row["own_state"] != final
        else:
            wrong.append(f"{row['provider_id']} here, {accepted.message_id} there")
    wrong += [
        f"accepted here, not there: {dict(row)}"
        for key, row in ours.items()
        if row["own_state"] in (10, 11, 20, 30) and key not in there
    ]
    verdict.contradictions = len(wrong)
    verdict.check(not wrong, f"{len(wrong)} contradictions: {wrong[:3]}")
    verdict.check(
        not verdict.receipts_lost,
        f"{verdict.receipts_lost} receipts were answered 2xx and are lost",
    )


async def _check_money(bench: "Bench") -> None:
    for shop in bench.shops:
        money = await shop.credits()
        row = (
            await bench.execute(
                "select granted, spent, reserved from credit where tenant_id = $1", shop.id
            )
        )[0]
        held = (await bench.execute(
            "select coalesce(sum(m.segments), 0) as held from message_shown m where tenant_id = $1 and status = 'unknown'",
            shop.id,
        ))[0]["held"]  # fmt: skip
        adds_up = row["granted"] == money["balance"] + row["spent"] and money["reserved"] == held
        bench.verdict.check(
            adds_up, f"credits of tenant {shop.id}: {money}, {dict(row)}, unknown hold {held}"
        )
    connection = await database.connect(bench.dsn)
    try:
        broken = [check for check in await audit.run(connection) if check.broken]
    finally:
        await connection.close()
    bench.verdict.check(not broken, f"audit: {broken}")


async def _check_leases(bench: "Bench") -> None:
    row = (await bench.execute("select count(*) as n from batch where state in (0, 1, 2, 3)"))[0]
    bench.verdict.check(not row["n"], f"{row['n']} batches are open at the end")


async def _check_limits(bench: "Bench") -> None:
    """Every second of each account and tenant against its limit, by the simulator's clock."""
    verdict, ledger = bench.verdict, bench.mitto.ledger
    of_tenant: defaultdict[str, dict[int, Request]] = defaultdict(dict)
    for message in ledger.messages():
        of_tenant[message.sender][message.request] = ledger.requests[message.request]
    for number, (plan, shop) in enumerate(zip(bench.scenario.tenants, bench.shops, strict=True), 1):
        # A receipt of the bench names no account: with several, a look-up is asked under the limit of any of them that
        # has something unknown, and counted by the simulator for the account of the message.
        alone = len({one.account for one in bench.scenario.tenants}) == 1
        of_account = [
            one
            for one in ledger.requests
            if one.account == shop.account and (alone or one.kind != "get")
        ]
        await _judge(
            bench, of_account, plan.account_requests, f"requests of account {plan.account}"
        )
        if plan.account_messages is not None:
            await _judge(
                bench,
                of_account,
                plan.account_messages,
                f"messages of account {plan.account}",
                messages=True,
            )
        await _judge(
            bench,
            list(of_tenant[f"Shop{number}"].values()),
            plan.requests,
            f"requests of tenant {number}",
        )
    verdict.use = _use(bench)


async def _judge(
    bench: "Bench", requests: Sequence[Request], limit: int, whose: str, *, messages: bool = False
) -> None:
    """The largest window of a second, but for those in which our own proxy kept a request. A process stopped between
    its gate and its first byte sends late, and nobody can help it: such runs are not judged."""
    zombies = {"stop", "stop@gate.passed", "stop@body.sent"}.intersection(bench.scenario.faults)
    arrivals = sorted((one.arrived_monotonic, one.messages if messages else 1) for one in requests)
    inside = oldest = worst = 0
    worst_at = 0.0
    for at, cost in arrivals:
        inside += cost
        while at >= arrivals[oldest][0] + 1.0:
            inside -= arrivals[oldest][1]
            oldest += 1
        if zombies or _was_kept(bench, arrivals[oldest][0], at):
            bench.verdict.unjudged += 1
        else:
            bench.verdict.judged += 1
            if inside > worst:
                worst, worst_at = inside, at
    bench.verdict.worst = max(bench.verdict.worst, worst / limit)
    if worst > limit:
        late = await _latest(
            bench, [one for one in requests if 0 <= worst_at - one.arrived_monotonic < 1.0]
        )
        bench.verdict.check(False, f"{whose}: {worst} in a second, the limit is {limit}; {late}")


async def _latest(bench: "Bench", requests: Sequence[Request]) -> str:
    """Which of these arrived the latest after their slots, and what is known of the others."""
    slots = {
        (row["phone"], row["text"]): row
        for row in await bench.execute(
            "select m.phone, m.text, a.replica_id, extract(epoch from a.slot_at)::float8 as slot_at"
            "  from message_shown m join batch b on b.id = m.batch_id"
            "  join attempt a on a.batch_id = b.id and a.n = b.attempt"
        )
    }
    of_request = {one.request: (one.destination, one.text) for one in bench.mitto.ledger.messages()}
    late = sorted(
        (
            (one.arrived_at - row["slot_at"], row["replica_id"])
            for one in requests
            if (row := slots.get(of_request.get(one.number, (0, ""))))
        ),
        reverse=True,
    )
    latest = ", ".join(
        f"{seconds * 1000:.0f} ms of replica {replica}" for seconds, replica in late[:3]
    )
    kinds = Counter(one.kind for one in requests)
    return f"latest after their slots: {latest}; {dict(kinds)}"


def _was_kept(bench: "Bench", since: float, until: float) -> bool:
    return any(start <= until and end >= since for start, end in bench.to_mitto.late)


def _use(bench: "Bench") -> float | None:
    """What was used of the account's limit while there was work, where only replicas came and went."""
    quiet = all(name.partition("@")[0] in ("kill", "term") for name in bench.scenario.faults)
    if (
        not quiet
        or len({plan.account for plan in bench.scenario.tenants}) > 1
        or bench.scenario.replicas < 2
    ):
        return None
    plan = bench.scenario.tenants[0]
    if plan.account_messages is not None:
        return None
    if sum(one.requests for one in bench.scenario.tenants) < plan.account_requests:
        return None
    requests = bench.mitto.ledger.requests
    posts = sorted(one.arrived_monotonic for one in requests if one.kind != "get")
    if len(posts) < 5 * plan.account_requests:
        return None
    first, last = posts[0], posts[len(posts) * 9 // 10]
    # Questions about unknown messages use the limit too.
    used = sum(first < one.arrived_monotonic <= last for one in requests)
    return used / (last - first) / plan.account_requests
