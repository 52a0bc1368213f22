"""Options of the test suite."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import settings

from benchmarks.harness.two_hosts import SYSTEM_PATH
from tests.support import tally
from tests.support.selection import starts_processes

_LONGEST_FIRST = ("launchers", "engines", "checkpoints", "benchmarks", "doctor")  # folders of tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-ranks",
        action="store_true",
        help="run everything: every engine on every number of ranks it is valid on, every case",
    )
    parser.addoption("--fast", action="store_true", help="only tests that start no process: under three minutes")
    parser.addoption(
        "--examples",
        type=int,
        help="how many random inputs each property test tries that does not say it itself; others in every run",
    )


def pytest_configure(config: pytest.Config) -> None:
    examples = config.getoption("--examples")
    settings.register_profile("few", max_examples=60, derandomize=True, deadline=None)
    settings.register_profile("many", max_examples=examples or 1, deadline=None)
    settings.load_profile("many" if examples else "few")
    config.addinivalue_line("markers", "slow: takes long though it starts no process; --fast leaves it out")
    config.addinivalue_line("markers", "all_ranks: a further engine, number of ranks or case; runs with --all-ranks")
    config.addinivalue_line("markers", "gpu: needs a GPU, and is left out where there is none")
    config.addinivalue_line("markers", "pdsh: needs pdsh and sshd, and is left out where they are not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tally.COUNTS:
        terminalreporter.section("random inputs")
        for line in tally.table():
            terminalreporter.line(line)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """With ``REFLORA_NO_SKIPS`` set a skip is a failure: CI has all that a test can need."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("REFLORA_NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (not skip: nothing is missing) what is for ``--all-ranks`` or for tools not there."""
    left_out = set() if config.getoption("--all-ranks") else {"all_ranks"}
    left_out |= set() if torch.cuda.is_available() else {"gpu"}
    left_out |= set() if shutil.which("pdsh") and shutil.which("sshd", path=SYSTEM_PATH) else {"pdsh"}
    fast = config.getoption("--fast")
    left_out |= {"slow"} if fast else set()

    def stays(item: pytest.Item) -> bool:
        return not any(map(item.get_closest_marker, left_out)) and not (fast and starts_processes(item))

    kept = [item for item in items if stays(item)]
    further = set(items) - set(kept)
    if further:
        config.hook.pytest_deselected(items=further)
    # Two workers take whole files in this order: the longest first, so that neither waits for the other at the end.
    items[:] = sorted(kept, key=_folder_order)


def _folder_order(item: pytest.Item) -> int:
    folder = item.path.parent.name
    return _LONGEST_FIRST.index(folder) if folder in _LONGEST_FIRST else len(_LONGEST_FIRST)
