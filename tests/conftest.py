"""Options of the test suite."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-ranks",
        action="store_true",
        help="run every engine on every number of ranks it is valid on, not only on one",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes")
    config.addinivalue_line("markers", "all_ranks: an engine on a further number of ranks; runs with --all-ranks")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """With ``REFLORA_NO_SKIPS`` set a skip is a failure: CI has all that a test can need."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("REFLORA_NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--all-ranks`` leave out (not skip: nothing is missing) what is marked for it."""
    if config.getoption("--all-ranks"):
        return
    further = [item for item in items if item.get_closest_marker("all_ranks")]
    if further:
        config.hook.pytest_deselected(items=further)
        items[:] = [item for item in items if not item.get_closest_marker("all_ranks")]
