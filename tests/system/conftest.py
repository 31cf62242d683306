"""What the system tests stand on: a whole installation per test; what its daemons said is shown when a test fails."""

from collections.abc import AsyncIterator, Generator
from pathlib import Path

import pytest

from smsd.simulator import Simulator
from system.harness import Installation

_INSTALLATION = pytest.StashKey[Installation]()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests measure: under pytest-xdist they run one after the other."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("system"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """A pytest that xdist does not get on with ignores the groups and says nothing."""
    if hasattr(session.config, "workerinput") and session.config.getvalue("loadgroup"):
        alone = [item.nodeid for item in session.items if "xdist_group" in item.keywords]
        lost = [one for one in alone if "@" not in one]
        assert not lost, f"pytest-xdist does not know their groups: {lost[:3]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts the log of the daemons into the report of a test that failed."""
    report = yield
    installation = item.stash.get(_INSTALLATION, None)
    if report.failed and installation is not None:
        report.sections += [(f"{one.name} said", one.stderr) for one in installation.daemons]
    return report


@pytest.fixture
async def mitto() -> AsyncIterator[Simulator]:
    """The simulator, in this process: its ledger is what really happened."""
    async with Simulator() as simulator:
        simulator.switches.dlr_batch = 100
        yield simulator


@pytest.fixture
async def installation(
    empty_dsn: str, mitto: Simulator, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Installation]:
    """An empty database, and nothing that runs yet."""
    async with Installation(empty_dsn, mitto, tmp_path) as made:
        request.node.stash[_INSTALLATION] = made
        yield made
