"""The filter of the libraries' lines: by message and version, and every other warning once."""

from __future__ import annotations

import builtins
import importlib.metadata
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.screen import foreign
from launchers.screen.foreign import FOREIGN, Foreign, filter_foreign
from launchers.screen.lines import LAUNCH_FOLDER

INSTALLED = importlib.metadata.version("torch").split("+")[0]
EVERY_RANK = "every rank prints this"


@pytest.fixture
def filtered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The filter with two entries, one of them for another version; nothing of it outlasts the test."""
    entries = (Foreign("torch", f"=={INSTALLED}", r"noise \d+"), Foreign("torch", f"!={INSTALLED}", "news"))
    monkeypatch.setattr(foreign, "FOREIGN", entries)
    monkeypatch.setattr(sys, "argv", ["launchers/finetune.py"])
    for name in ("RANK", LAUNCH_FOLDER):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which restores it
    for holder, name in ((warnings, "showwarning"), (logging.Logger, "handle"), (builtins, "print")):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # which restores it
    monkeypatch.setattr(logging.root, "handlers", [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        filter_foreign()
        yield


def test_what_is_foreign_is_left_out_by_message_and_version(filtered: None, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("noise 7", "noise of another kind", "news"):
        warnings.warn(text, FutureWarning, stacklevel=1)
        logging.getLogger("some.package").warning("%s, logged", text)
        print(f"{text}, printed")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["noise of another kind, printed", "news, printed"]
    assert printed.err.splitlines() == [
        f"finetune.py: warning: {text}"
        for kind in ("noise of another kind", "news")
        for text in (kind, f"{kind}, logged")
    ]


def test_a_library_that_shows_its_warnings_itself_is_not_repeated(
    filtered: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("some"), "handlers", [logging.StreamHandler(sys.stdout)])
    monkeypatch.setattr(logging.getLogger("silent"), "handlers", [logging.NullHandler()])
    logging.getLogger("some.package").warning("a slow hub")
    logging.getLogger("silent.package").warning("shown by none")
    assert capsys.readouterr() == ("a slow hub\n", "finetune.py: warning: shown by none\n")


def test_a_warning_of_a_library_is_one_line_that_names_it(filtered: None, capsys: pytest.CaptureFixture[str]) -> None:
    warnings.showwarning("two\n  lines", UserWarning, "/env/site-packages/peft/utils/other.py", 3)
    assert capsys.readouterr().err == "finetune.py: warning: peft: two lines\n"


def test_ranks_show_what_they_share_once(
    filtered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for text in (EVERY_RANK, f"only here: {rank}"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == [
        f"finetune.py: rank 0: warning: {EVERY_RANK}",
        "finetune.py: rank 0: warning: only here: 0",
        "finetune.py: rank 1: warning: only here: 1",
    ]


def test_what_is_no_warning_passes(filtered: None, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("some.package")
    seen: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info("noise 7")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert seen == ["noise 7"]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: line.message[:30])
def test_every_entry_names_a_message_and_an_end_of_its_versions(line: Foreign) -> None:
    assert re.compile(line.message) and "<" in line.versions
    assert importlib.metadata.version(line.distribution)


def test_a_library_that_is_not_installed_prints_nothing() -> None:
    assert not Foreign("no-such-library", ">=0", "text").holds()
