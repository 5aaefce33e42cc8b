"""The campaign's fixtures, which of its cases run when, and what is told of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import table
from harness.world import World, federation_of

HERE = Path(__file__).parent
_told: list[table.Told] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "case(number, did, short=''): one case of the fault campaign (tests/faults)"
    )
    config.addinivalue_line("markers", "campaign: only `make faults` runs it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole, chosen, left = bool(os.environ.get("MEDFL_FAULTS")), [], []
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
        for mark in item.iter_markers("case"):
            item.user_properties.append((f"case {mark.args[0]}", mark.args[1]))
            item.user_properties.append(("short", mark.kwargs.get("short", "")))
        out = item.get_closest_marker("campaign") is not None and not whole
        (left if out else chosen).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    place = os.environ.get("MEDFL_FAULTS_TABLE")
    # A worker's reports reach the one who wrote the table's name; it must not write its own share.
    if place and not os.environ.get("PYTEST_XDIST_WORKER"):
        table.note(_told, report)
        if report.when == "teardown":
            # After each test: a campaign that is broken off leaves what it has seen.
            table.write(_told, Path(place), whole=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    place = os.environ.get("MEDFL_FAULTS_TABLE")
    if place and not hasattr(session.config, "workerinput"):
        ended = not (session.shouldstop or session.shouldfail)
        if not table.write(_told, Path(place), whole=ended):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """seen("..."): what the table says was seen."""
    return lambda text: request.node.user_properties.append(("seen", text))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A folder for a federation; all that was started ends with the test, and all is checked."""
    made = World(tmp_path / "world")
    yield made
    made.close()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """federation(names, study, **toml): see `federation_of`; checked and ended after the test."""
    made: list[World] = []

    def make(names: tuple[str, ...] = ("north", "south"), **more: Any) -> World:
        made.append(federation_of(tmp_path / f"world-{len(made)}", names, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a case in a shared federation the common assertions hold as well."""
    yield
    if "shared" in request.fixturenames:
        request.getfixturevalue("shared").check()
