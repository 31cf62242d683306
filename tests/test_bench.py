"""The benchmarks: what they say of given figures, and that the pipeline can be measured at all."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from bench import common, documents
from bench.__main__ import NAMES
from bench.common import DATABASE_VARIABLE, Machine, Mitto, Options, Results
from bench.latency import Latency
from bench.limits import Grants, Use
from bench.pipeline import Pipeline
from bench.receipts import Receipts

ROOT = Path(__file__).parent.parent
RESULTS: Results = {
    "bare": {"messages/s": [200.0, 100.0, 300.0], "seconds": [5.0, 10.0, 3.3]},
    "smsd": {"messages/s": [150.0, 120.0, 180.0]},
}


@pytest.fixture
async def machine(postgres: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    """The tests' Postgres."""
    monkeypatch.setenv(DATABASE_VARIABLE, postgres)
    async with Machine() as machine:
        yield machine


def test_a_variant_is_judged_by_medians() -> None:
    assert common.ratio(RESULTS, "messages/s", "smsd", "bare") == 0.75


def test_a_table_tells_medians_least_most_and_the_ratio_to_the_reference() -> None:
    assert common.table(RESULTS, "bare") == [
        ["", "messages/s", "seconds"],
        ["bare", "200 (100–300)", "5 (3.3–10)"],
        ["smsd", "150 (120–180) ×0.75", "–"],
    ]


def test_a_reference_that_has_only_zeros_is_no_divisor() -> None:
    results: Results = {"a": {"errors": [0.0, 0.0]}, "b": {"errors": [2.0, 1.0]}}
    assert common.table(results, "a")[2] == ["b", "1.5 (1–2)"]


async def test_variants_take_turns_and_every_other_round_backwards() -> None:
    order: list[str] = []

    async def settle() -> None:
        order.append("-")

    def variant(name: str) -> common.Variant:
        async def run() -> dict[str, float]:
            order.append(name)
            return {"runs": len(order)}

        return run

    results = await common.alternate({"a": variant("a"), "b": variant("b")}, 3, settle)
    assert "".join(order) == "-a-b-b-a-a-b"
    assert results == {"a": {"runs": [2, 8, 10]}, "b": {"runs": [4, 6, 12]}}


async def test_a_report_keeps_every_value_and_says_how_it_came_about(
    machine: Machine, tmp_path: Path
) -> None:
    options = Options(runs=3, out=tmp_path / "new", command="python -m bench some")
    common.report("some", RESULTS, machine, options, reference="bare", settings={"messages": 7})
    written = json.loads((tmp_path / "new" / "some.json").read_text())
    assert written["results"] == RESULTS
    assert written["medians"]["smsd"] == {"messages/s": 150.0}
    assert (written["command"], written["settings"]) == ("python -m bench some", {"messages": 7})
    assert {"cores", "cpu", "memory_bytes", "postgres"} <= written["machine"].keys()
    drawn = (tmp_path / "new" / "some.svg").exists()
    assert drawn == (importlib.util.find_spec("matplotlib") is not None)


async def test_figures_come_into_a_document_where_it_has_a_place_for_them(
    machine: Machine, tmp_path: Path
) -> None:
    common.report("some", RESULTS, machine, Options(out=tmp_path, command="x"), reference="bare")
    document = tmp_path / "page.md"
    block = "<!-- bench: {} -->\nold\n<!-- end of bench -->\n"
    document.write_text(f"Before\n{block.format('some')}between\n{block.format('other')}after\n")
    assert documents.write(document, tmp_path) == ["some"]
    written = document.read_text()
    assert "| smsd | 150 (120–180) ×0.75 | – |" in written
    assert "![some](some.svg)" in written
    assert written.count("old") == 1
    documents.write(document, tmp_path)
    assert document.read_text() == written


async def test_the_cpu_of_postgres_counts_backends_that_ended(machine: Machine) -> None:
    before = machine.cpu_seconds()
    async with machine.database(migrated=False) as dsn:
        connection = await asyncpg.connect(dsn)
        # Until the kernel, which counts in ticks, has seen it.
        while machine.cpu_seconds() < before + 0.1:
            await connection.execute("select sum(g) from generate_series(1, 200000) g")
        await connection.close()
    assert machine.cpu_seconds() >= before + 0.1


async def test_the_pipeline_and_its_references_record_every_result(machine: Machine) -> None:
    async with Mitto(machine.folder) as mitto:
        pipeline = Pipeline(machine, mitto, 600)  # two batches, the last one not full
        for variant in (
            pipeline.smsd,
            *(pipeline.beside("bench.bare", n) for n in ("bare", "batches")),
        ):
            figures = await variant()  # checks what Mitto accepted and what the tables have
            assert figures["messages/s"] > 0


async def test_the_bare_pipeline_sends_as_much_text_as_smsd(machine: Machine) -> None:
    async with Mitto(machine.folder) as mitto:
        pipeline = Pipeline(machine, mitto, 9)
        lengths = set()
        for variant in (pipeline.smsd, pipeline.beside("bench.bare", "bare")):
            await variant()
            rows = (await mitto.control("GET", "accepted"))["rows"]
            assert len({one["text"] for one in rows}) == 9
            lengths.add(sum(len(one["text"]) for one in rows))
        assert len(lengths) == 1


def test_every_benchmark_has_a_module() -> None:
    assert [name for name in NAMES if not (ROOT / "bench" / f"{name}.py").exists()] == []


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smsd", "bench", "speed"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no benchmark 'speed'" in done.stderr
    assert "pipeline" in done.stderr


async def test_every_receipt_that_is_posted_delivers_a_message(machine: Machine) -> None:
    async with Mitto(machine.folder) as mitto:
        receipts = Receipts(machine, mitto, 150)  # in arrays: one that is full, and one that is not
        for variant in (receipts.bare, receipts.smsd):
            figures = await variant()  # checks rows, counters and audit
            assert figures["receipts/s"] > 0
            assert figures["arrays: receipts/s"] > 0


async def test_leases_with_limits_and_without_are_counted(machine: Machine) -> None:
    grants = Grants(machine, 0.2, 2_000)
    for variant, most in ((grants.bare(2), 1), (grants.claim(2, 4, all_limits=True), 4)):
        figures = await variant()
        assert figures["grants/s"] > 0
        assert 0 < figures["grants a call"] <= most


async def test_use_of_a_limit_is_what_the_simulator_saw(machine: Machine) -> None:
    async with Mitto(machine.folder) as mitto:
        figures = await Use(machine, mitto, 3).of(20)()
    assert figures["requests"] >= 60  # and what asks whether the list of ids is in order
    assert 0 < figures["use"] <= 1.1
    assert figures["worst second / limit"] > 0


async def test_latencies_count_from_when_a_request_was_due(machine: Machine) -> None:
    async with Mitto(machine.folder) as mitto:
        figures = await Latency(machine, mitto, 300, 0.5).beside(1, 100)()
    for name in ("enqueue", "status", "single"):
        assert 0 < figures[f"{name} p50"] <= figures[f"{name} p99"] <= figures[f"{name} max"]
