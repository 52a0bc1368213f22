"""What ended a run is shown once, as the last line, and the launcher's exit code stays."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from launchers.cluster import launch
from launchers.screen import commands
from launchers.screen.lines import LAUNCH_FOLDER, is_first_with, left_for_last, show, show_last


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launch script's folder, which all ranks of a machine share."""
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher's module whose text a test writes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(launch, "filter_foreign", lambda: None)  # it would outlast this test
    return tmp_path / "a_launcher.py"


def test_the_first_rank_s_line_is_left_and_the_others_are_not_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_for_last(folder) is None
    assert show_last("rank 1: out of memory", "error") and not show_last("rank 0: connection lost", "error")
    assert left_for_last(folder) == ("rank 1: out of memory", "error")
    assert capsys.readouterr() == ("", "")


def test_without_a_launch_script_the_line_is_shown_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LAUNCH_FOLDER, raising=False)
    assert show_last("out of memory", "error") and is_first_with("a warning") and is_first_with("a warning")
    assert capsys.readouterr().err == "out of memory\n"


def test_a_line_is_shown_at_once_where_the_launcher_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path / "gone"))
    assert show_last("out of memory", "error")
    assert capsys.readouterr().err == "out of memory\n"


def test_a_line_is_in_colour_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = "error: [/x] " + "long " * 50
    show(text, "error")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show(text, "error")
    plain, coloured = capsys.readouterr().err.splitlines()
    assert plain == text and coloured.startswith("\x1b[1;31m") and text.strip() in coloured


@pytest.mark.parametrize(
    ("ending", "code"),
    [("raise SystemExit(3)", 3), ("raise RuntimeError('a long report')", 1), ("pass", 0)],
    ids=["exit", "raise", "return"],
)
def test_the_line_of_a_rank_is_the_launcher_s_last(
    launcher: Path, folder: Path, ending: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.write_text(f"print('the launcher')\n{ending}\n")
    show_last("finetune.py: rank 1: out of memory", "error")
    assert launch.run_launcher("a_launcher", folder) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("the launcher\n", "finetune.py: rank 1: out of memory\n")


def test_a_launcher_s_own_error_stands_where_no_rank_left_a_line(launcher: Path, folder: Path) -> None:
    launcher.write_text("raise RuntimeError('a rank was killed')\n")
    with pytest.raises(RuntimeError, match="a rank was killed"):
        launch.run_launcher("a_launcher", folder)


def test_an_exit_code_is_shown_where_nobody_left_a_line(
    launcher: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, shown in ((247, "a_launcher ended with exit code 247, and no rank left a line: see above\n"), (0, "")):
        launcher.write_text(f"raise SystemExit({code})\n")
        assert launch.run_launcher("a_launcher", folder) == code
        assert capsys.readouterr().err == shown


def test_the_launcher_gets_its_arguments(
    launcher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.write_text(
        f"import os, sys\nassert os.path.isdir(os.environ[{LAUNCH_FOLDER!r}])\nprint(sys.argv[1:])\nsys.exit(7)\n"
    )
    monkeypatch.setenv(LAUNCH_FOLDER, "")  # set by main: this restores it
    monkeypatch.setattr(sys, "argv", ["launch.py", "a_launcher", "--flag", "value"])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 7
    assert capsys.readouterr().out == "['--flag', 'value']\n"


def _refused() -> None:
    raise SystemExit("finetune.py: error: lora_r=0 must be at least 1")


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_first_rank_speaks_at_once_and_the_others_give_it_time(
    local_rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.delenv(LAUNCH_FOLDER, raising=False)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(commands.time, "sleep", pauses.append)
    with pytest.raises(SystemExit) as ended:
        commands.run_command(_refused)
    assert ended.value.code == 1 and len(pauses) == int(local_rank)
    assert capsys.readouterr().err == "finetune.py: error: lora_r=0 must be at least 1\n"


def test_other_endings_of_a_command_pass_through() -> None:
    def ends(code: object) -> None:
        raise SystemExit(code)

    for code in (0, 138, None):
        with pytest.raises(SystemExit) as ended:
            commands.run_command(lambda code=code: ends(code))
        assert ended.value.code == code
    with pytest.raises(KeyError):
        commands.run_command(lambda: {}["absent"])
    commands.run_command(lambda: logging.getLogger(__name__).debug("done"))
