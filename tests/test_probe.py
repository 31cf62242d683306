"""What Mitto leaves open, asked of the simulator under each of its answers."""

import asyncio
import os
import pty
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Api
from support import new_account
from system.harness import SMSD, Installation
from test_cli import typed

from smsd import database, mitto, probe, queue
from smsd.probe import TEXTS, ProbeError, Report, Wanted
from smsd.simulator import Simulator, Switches

PHONE = 306_900_000_001
ALL = ("unknownId", "dateSkewSeconds", "sendShape", "referenceKept", "orderKept", "badItem",
       "largestRequest", "throttle")  # fmt: skip


@pytest.fixture
async def account(pool: database.Pool) -> int:
    return await new_account(pool)


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(Switches(dlr=False)) as simulator:
        yield simulator


async def ask(
    pool: database.Pool, simulator: Simulator, account: int, timeout: float = 5, **wanted: int
) -> Report:
    async with mitto.Client(simulator.url, timeout) as client:
        return await probe.run(pool, client, Wanted(account, PHONE, "Shop", **wanted))


def values(report: Report) -> dict[str, Any]:
    return {finding.name: finding.value for finding in report.findings}


def notes(report: Report) -> dict[str, str]:
    return {finding.name: finding.note for finding in report.findings}


async def stored(pool: database.Pool, account: int) -> dict[str, Any]:
    known = await pool.fetchval("select capabilities from traffic_account where id = $1", account)
    return dict(known)


def posts(simulator: Simulator) -> list[int]:
    """Messages of each POST, in order."""
    return [one.messages for one in simulator.ledger.requests if one.kind != "get"]


# ------------------------------------------------------------------------------------- what it finds


async def test_every_question_gets_its_line_and_what_was_answered_is_kept(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    report = await ask(pool, simulator, account)
    assert tuple(values(report)) == ALL
    known = await stored(pool, account)
    assert known == report.capabilities
    assert before <= datetime.fromisoformat(known.pop("probedAt")) <= datetime.now(UTC)
    assert abs(known.pop("dateSkewSeconds")) <= 1
    assert known == {
        "unknownId": 404, "sendShape": "list", "referenceKept": False, "orderKept": True,
        "badItem": "whole_4xx",
    }  # fmt: skip


async def test_no_more_messages_are_sent_than_were_announced_and_all_to_the_number_that_was_given(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, bad_item="item_with_error")
    await ask(pool, simulator, account, largest=20)
    sent = list(simulator.ledger.messages())
    assert len(sent) == Wanted(account, PHONE, "Shop", largest=20).messages
    assert {(one.destination, one.sender, one.account) for one in sent} == {(PHONE, "Shop", "main")}
    assert len({one.text for one in sent}) == len(sent)
    assert posts(simulator) == [1, TEXTS, 2, 20]


@pytest.mark.parametrize(
    ("switches", "name", "value"),
    [
        ({"keep_reference": True}, "referenceKept", True),
        ({"refuse_reference": True}, "referenceKept", False),
        ({"refuse_reference": True}, "sendShape", "list"),
        ({"send_shape": "flat"}, "sendShape", "flat"),
        ({"shuffled_answer": 1}, "orderKept", False),
        ({"shuffled_answer": 1, "keep_reference": True}, "referenceKept", True),
        ({"bad_item": "item_without_id"}, "badItem", "item_without_id"),
        ({"bad_item": "item_with_error"}, "badItem", "item_with_error"),
        ({"bad_item": "item_with_error", "shuffled_answer": 1}, "badItem", "item_with_error"),
        ({"seconds_to_be_found": 0.3, "keep_reference": True}, "referenceKept", True),
        ({"seconds_to_be_found": 0.3}, "orderKept", True),
        ({"error_key": "error"}, "badItem", "whole_4xx"),
    ],
)  # fmt: skip
async def test_each_answer_of_mitto_is_recognised(
    pool: database.Pool, account: int, simulator: Simulator,
    switches: dict[str, Any], name: str, value: object,
) -> None:  # fmt: skip
    simulator.switches = Switches(dlr=False, **switches)
    report = await ask(pool, simulator, account)
    assert report.capabilities[name] == value, notes(report)[name]
    assert (await stored(pool, account))[name] == value


@pytest.mark.parametrize("skew", [3600, -90])
async def test_mitto_s_clock_is_compared_with_ours(
    pool: database.Pool, account: int, simulator: Simulator, skew: int
) -> None:
    simulator.switches = Switches(dlr=False, clock_skew_seconds=skew)
    assert abs((await ask(pool, simulator, account)).capabilities["dateSkewSeconds"] - skew) <= 1


async def test_the_largest_request_is_found_by_halving_and_binds_the_sender(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, largest_request=100)
    report = await ask(pool, simulator, account, largest=300)
    assert posts(simulator)[-3:] == [300, 150, 75]
    assert report.capabilities["largestRequest"] == 75
    largest = "select largest_request from traffic_account where id = $1"
    assert await pool.fetchval(largest, account) == 75
    assert simulator.ledger.accepted_count == 1 + TEXTS + 75, "a 413 costs nothing"


async def test_what_was_not_asked_for_costs_nothing_and_is_not_known(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    await queue.lower_largest_request(pool, account, 120)
    report = await ask(pool, simulator, account)
    assert values(report)["largestRequest"] is None
    assert "60 are put into a request" in notes(report)["largestRequest"]
    assert values(report)["throttle"] is None
    assert not {"largestRequest", "throttle"} & (await stored(pool, account)).keys()
    assert posts(simulator) == [1, TEXTS, 2]


@pytest.mark.parametrize(
    ("retry_after", "least", "most"), [(None, None, None), (0.4, 0.4, 0.4), ("date", 1, 2)]
)
async def test_a_burst_of_gets_shows_what_throttling_looks_like_and_every_replica_waits(
    pool: database.Pool, account: int, simulator: Simulator,
    retry_after: Any, least: float | None, most: float | None,
) -> None:  # fmt: skip
    simulator.switches = Switches(dlr=False, max_requests_per_second=30, retry_after=retry_after)
    report = await ask(pool, simulator, account, throttle=200)
    told = report.capabilities["throttle"]
    assert told["status"] == 429
    if least is None or most is None:
        assert told["retryAfter"] is None
    else:
        assert least <= told["retryAfter"] <= most
    assert sum(1 for one in simulator.ledger.requests if one.kind == "get") < 200
    assert await pool.fetchval("select blocked_until > now() from traffic_account")


async def test_a_burst_that_is_not_throttled_leaves_the_question_open(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    report = await ask(pool, simulator, account, throttle=40)
    assert "throttle" not in report.capabilities
    assert notes(report)["throttle"] == "none of 40 quick GETs was throttled"
    assert sum(1 for one in simulator.ledger.requests if one.kind == "get") == 41 + 1 + TEXTS


async def test_what_is_throttled_on_the_way_waits_as_told_and_is_asked_again(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, max_requests_per_second=4, retry_after=1)
    report = await ask(pool, simulator, account)
    assert report.capabilities["throttle"] == {"status": 429, "retryAfter": 1}
    assert report.capabilities["orderKept"] is True
    assert simulator.ledger.duplicates() == []
    assert len(posts(simulator)) >= 3


# ---------------------------------------------------------------------------------------- in doubt


@pytest.mark.parametrize(
    "fault",
    ["accept_then_reset", "accept_then_hang", "accept_then_502", "ids_in_4xx", "broken_answer",
     "half_answer", "short_answer", "items_without_id"],
)  # fmt: skip
async def test_after_an_answer_in_doubt_nothing_more_is_posted_and_what_was_known_stays(
    pool: database.Pool, account: int, simulator: Simulator, fault: str
) -> None:
    await ask(pool, simulator, account)
    before = await stored(pool, account)
    simulator.switches = Switches(dlr=False, clock_skew_seconds=600, **{fault: 1.0})
    report = await ask(pool, simulator, account, timeout=0.4, largest=10)
    assert posts(simulator) == [1, TEXTS, 2, 1]
    after = await stored(pool, account)
    changed = {name for name in after if after[name] != before.get(name)} - {"probedAt"}
    assert changed <= {"dateSkewSeconds", "sendShape"}, "items_without_id still has a shape"
    assert abs(after["dateSkewSeconds"] - 600) <= 1
    for name in ("referenceKept", "orderKept", "badItem", "largestRequest"):
        assert values(report)[name] is None
        assert notes(report)[name]


async def test_a_request_of_several_in_doubt_is_the_last_one(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, repeated_id_answer=1)
    report = await ask(pool, simulator, account, largest=10)
    assert posts(simulator) == [1, TEXTS]
    assert {name for name, value in values(report).items() if value is None} == {
        "orderKept", "badItem", "largestRequest", "throttle",
    }  # fmt: skip


async def test_a_refusal_leaves_its_question_open_and_the_next_is_asked(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, fail_500=1, faults_left=1)
    report = await ask(pool, simulator, account)
    assert values(report)["sendShape"] is None
    assert "HTTP 500" in notes(report)["sendShape"]
    assert values(report)["orderKept"] is True


async def test_a_message_that_is_never_found_says_nothing_of_references_or_order(
    pool: database.Pool, account: int, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LOOKS_SECONDS", (0.0, 0.01))
    simulator.switches = Switches(dlr=False, seconds_to_be_found=600)
    report = await ask(pool, simulator, account)
    assert values(report)["referenceKept"] is values(report)["orderKept"] is None
    assert "is not there" in notes(report)["orderKept"]
    assert values(report)["sendShape"] == "list"


async def test_a_probe_that_asks_less_forgets_nothing(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, max_requests_per_second=50, retry_after=0.1)
    await ask(pool, simulator, account, largest=12, throttle=100)
    simulator.switches = Switches(dlr=False, send_shape="flat")
    await ask(pool, simulator, account)
    known = await stored(pool, account)
    assert (known["largestRequest"], known["throttle"]["status"]) == (12, 429)
    assert known["sendShape"] == "flat"


# ------------------------------------------------------------------------------- nothing is half stored


async def assert_in_vain(
    pool: database.Pool, simulator: Simulator, account: int, says: str
) -> None:
    with pytest.raises(ProbeError, match=says) as raised:
        await ask(pool, simulator, account, throttle=5)
    assert "\n" not in str(raised.value)
    assert (
        await pool.fetchval("select count(*) from traffic_account where capabilities <> '{}'") == 0
    )


async def test_a_key_that_is_refused_ends_it_before_anything_is_sent(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.api_keys = {"another"}
    await assert_in_vain(pool, simulator, account, f"key of account {account}.*401.*apiKey")
    assert posts(simulator) == []


async def test_a_key_that_is_refused_for_sending_ends_it(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    simulator.switches = Switches(dlr=False, fail_401=1)
    await assert_in_vain(pool, simulator, account, "401")
    assert simulator.ledger.accepted_count == 0


async def test_a_mitto_that_is_not_there_ends_it(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    await simulator.stop()
    await assert_in_vain(pool, simulator, account, "cannot be reached.*SMSD_MITTO_BASE_URL")


async def test_an_account_that_is_not_there_ends_it(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    await assert_in_vain(pool, simulator, account + 1, f"no traffic account {account + 1}")
    assert simulator.ledger.requests == []


async def test_an_account_that_waits_for_mitto_ends_it_at_once(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    await queue.block_account(pool, account, 600)
    async with asyncio.timeout(5):
        await assert_in_vain(pool, simulator, account, "waits 600 s")
    assert simulator.ledger.requests == []


# -------------------------------------------------------------------------------------- under the limits


async def test_every_request_takes_of_the_account_s_limit_and_of_that_over_all(
    pool: database.Pool, account: int, simulator: Simulator
) -> None:
    async with mitto.Client(simulator.url, 5) as client:
        await probe.run(pool, client, Wanted(account, PHONE, "Shop"), all_limit=10)
    asked = len(simulator.ledger.requests)
    assert asked == 1 + 3 + 1 + TEXTS
    granted = (
        "select base + coalesce(cum[array_length(cum, 1)] - base, 0) from rate where scope = $1"
    )
    assert await pool.fetchval(granted, 1) == await pool.fetchval(granted, 0) == asked
    assert simulator.ledger.worst_second() <= 10


@pytest.mark.alone
async def test_a_probe_that_runs_out_of_time_keeps_what_it_found_by_then(
    pool: database.Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request a second: the first shows Mitto's clock, the second sends a message, a third would come too late."""
    monkeypatch.setattr(probe, "SECONDS_MOST", 1.75)
    account = await new_account(pool, requests_per_second=1)
    report = await ask(pool, simulator, account)
    assert len(simulator.ledger.requests) == 2
    assert {name for name, value in values(report).items() if value is not None} == {
        "unknownId", "dateSkewSeconds", "sendShape",
    }  # fmt: skip
    assert "no time was left" in notes(report)["orderKept"]
    assert await stored(pool, account) == report.capabilities


# ---------------------------------------------------------------------------------- as a person sees it


@pytest.fixture
async def shell(dsn: str, tmp_path: Path, account: int) -> AsyncIterator[Installation]:
    """Where commands are typed: one traffic account."""
    async with (
        Simulator(Switches(dlr=False)) as simulator,
        Installation(dsn, simulator, tmp_path) as installation,
    ):
        yield installation


def command(account: int, *more: str, to: str = f"+{PHONE}", sender: str = "Shop") -> list[str]:
    return ["probe", "--account", str(account), "--to", to, "--sender", sender, *more]


async def test_the_table_has_a_line_a_question_and_json_has_all_of_it(
    shell: Installation, account: int
) -> None:
    people = await shell.command(*command(account, "--yes", "--throttle", "3"))
    assert (people.code, people.err) == (0, "")
    lines = [line.split() for line in people.out.splitlines()]
    assert [line[0] for line in lines] == list(ALL)
    told = {line[0]: line[1] for line in lines}
    assert (told["unknownId"], told["referenceKept"], told["orderKept"]) == ("404", "no", "yes")
    assert told["throttle"] == "unknown"
    programs = await shell.command(*command(account, "--yes", "--json"))
    answer = orjson.loads(programs.out)
    assert [finding["name"] for finding in answer["findings"]] == list(ALL)
    assert answer["capabilities"]["badItem"] == "whole_4xx"


@pytest.mark.parametrize("columns", [40, 120])
async def test_the_table_fits_the_terminal(shell: Installation, account: int, columns: int) -> None:
    code, output = await typed(shell.environment(), columns, *command(account, "--yes"))
    lines = output.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(ALL)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"to": "6900000000"}, "--to: '6900000000' is no phone number"),
        ({"to": "+1"}, "--to: '+1' is no phone number"),
        ({"sender": "Τα νέα"}, "--sender: 'Τα νέα'; takes"),
    ],
)
async def test_a_wrong_number_or_sender_is_one_line(
    shell: Installation, account: int, changes: dict[str, str], says: str
) -> None:
    done = await shell.command(*command(account, "--yes", **changes))
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"smsd: {says}")
    assert shell.mitto.ledger.requests == []


async def test_no_such_account_and_nobody_to_ask_are_one_line_each(
    shell: Installation, account: int
) -> None:
    missing = await shell.command(*command(account + 7, "--yes"))
    silent = await shell.command(*command(account))
    assert (missing.code, silent.code) == (1, 1)
    assert missing.err.startswith(f"smsd: there is no traffic account {account + 7}")
    assert "--yes" in silent.err
    assert [len(done.err.splitlines()) for done in (missing, silent)] == [1, 1]
    assert shell.mitto.ledger.requests == []


@pytest.mark.parametrize(("answer", "posted"), [(b"n\n", 0), (b"y\n", 3)])
async def test_a_person_is_told_how_many_messages_it_costs_before_they_are_sent(
    shell: Installation, account: int, answer: bytes, posted: int
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    process = await asyncio.create_subprocess_exec(
        *SMSD, *command(account), env=shell.environment(), stdin=theirs,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    os.close(theirs)
    os.close(ours)
    assert f"{1 + TEXTS + 1} messages of one segment each go to +{PHONE}" in err.decode()
    assert len(posts(shell.mitto)) == posted
    assert process.returncode == (0 if posted else 1)
    assert bool(out.strip()) is bool(posted)


async def test_the_operator_s_view_of_an_account_shows_its_capabilities(api: Api) -> None:
    admin = api.admin
    made = await admin(
        "POST", "/api/admin/traffic-accounts", {"name": "M", "trafficAccountId": "m", "apiKey": "k"}
    )
    assert made.body["capabilities"] == {}
    async with Simulator(Switches(dlr=False)) as simulator:
        report = await ask(api.ctx.pool, simulator, made.body["id"])
    shown = await admin("GET", f"/api/admin/traffic-accounts/{made.body['id']}")
    assert shown.body["capabilities"] == report.capabilities
