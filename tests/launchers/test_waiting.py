"""Ranks that wait say for whom and since when, and no time limit of torch's ends them while another one works."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from launchers.cluster import meeting, waiting
from launchers.cluster.waiting import stage, told, wait_for_ranks, working_first
from launchers.training.beginning import Beginning
from tests.support.cluster import run_ranks
from tests.support.launchers import REPOSITORY, free_port, launch, micro_model, short_training, write_records

LIMIT_SECONDS, WORK_SECONDS = 2.0, 5.0


def _join(limit: float) -> None:
    """A group whose collectives end after so many seconds."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=limit))


def _work_first(rank: int, world_size: int, folder: str) -> tuple[str, float]:
    """What this rank said, and for how long it waited."""
    _join(LIMIT_SECONDS)
    waiting.FIRST_WORD_SECONDS, waiting.NEXT_WORD_SECONDS = 0.5, 1.0
    said, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said), working_first(rank == 1, "tokenizing the records"):
        if rank == 1:
            time.sleep(WORK_SECONDS)
            (Path(folder) / "made").touch()
        assert (Path(folder) / "made").exists()
    return said.getvalue(), time.monotonic() - start


def test_ranks_outwait_the_time_limit_of_collectives_and_one_of_them_says_so(tmp_path: Path) -> None:
    said, seconds = zip(*run_ranks(_work_first, 3, str(tmp_path), init_process_group=False), strict=True)
    assert min(seconds) >= WORK_SECONDS
    lines = said[0].splitlines()
    assert 3 <= len(lines) <= 6  # after 0.5 s, then every second
    for line in lines:
        assert re.fullmatch(r"\S+: rank 0: since \d\d:\d\d:\d\d waiting for rank 1: tokenizing the records", line), line
    assert said[1:] == ("", "")


def _fail_first(rank: int, world_size: int) -> str:
    try:
        with working_first(rank == 0, "tokenizing"):
            if rank == 0:
                raise ValueError("no end-of-sequence token")
    except ValueError as error:
        return str(error)
    return "went on"


def test_a_rank_that_fails_lets_the_others_go(tmp_path: Path) -> None:
    assert run_ranks(_fail_first, 2) == ["no end-of-sequence token", "went on"]


def _meet_often(rank: int, world_size: int) -> list[int]:
    """How many ranks had come before this one left each meeting."""
    store, counts = dist.distributed_c10d._get_default_store(), []
    for turn in range(20):
        if turn % world_size == rank:
            time.sleep(0.01)
        store.add(f"came {turn}", 1)
        wait_for_ranks("coming")
        counts.append(store.add(f"came {turn}", 0))
    return counts


def test_nobody_leaves_before_all_have_come() -> None:
    assert run_ranks(_meet_often, 3) == [[3] * 20] * 3


def test_a_single_process_does_not_wait() -> None:
    with working_first(False, "nothing"):
        wait_for_ranks("nothing")


def test_the_innermost_wait_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.delenv("RANK", raising=False)
    with told("waiting for the others to join"), told("compiling an extension"):
        time.sleep(0.5)
    with told("waiting for what comes at once"):
        pass
    time.sleep(0.3)
    said = capsys.readouterr().err
    assert re.fullmatch(r"\S+: since \d\d:\d\d:\d\d compiling an extension\n", said), said


@pytest.mark.parametrize(("rank", "says"), [(None, True), ("0", True), ("1", False)])
def test_a_stage_is_told_by_the_first_rank_until_it_ends(
    rank: str | None, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with stage("loading the model"):
        time.sleep(0.5)
    beginning = Beginning("lora-sb")
    with beginning:
        beginning.on_step_begin(None, None, None)
        time.sleep(0.5)
    with beginning:
        time.sleep(0.5)
    said = [line.partition(" since ")[2][9:] for line in capsys.readouterr().err.splitlines()]
    engine = "preparing the engine, the optimizer and lora-sb, taking the gradients of the first batches"
    assert said == (["loading the model", engine] if says else [])


def test_a_stage_names_the_hub_that_may_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for offline, name in (("0", "some/llama"), ("0", str(tmp_path)), ("1", "some/llama")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with stage("loading the model", name):
            time.sleep(0.5)
    said = [line.partition(" since ")[2][9:] for line in capsys.readouterr().err.splitlines()]
    from_hub = ", from http://127.0.0.1:1 or the cache (HF_HUB_OFFLINE=1: from the cache alone)"
    assert said == [f"loading the model {name}" for name in (f"some/llama{from_hub}", tmp_path, "some/llama")]


@pytest.mark.parametrize(("world_size", "says"), [("1", True), ("2", False)])
def test_who_works_first_says_so_where_nobody_waits(
    world_size: str, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with working_first(True, "tokenizing the records"):
        time.sleep(0.5)
    assert capsys.readouterr().err.endswith("tokenizing the records\n") == says


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"node_rank": 0, "nodes": 3}, "waiting for the machine with --node-rank 1, 2, for 2 s at most"),
        ({"node_rank": 1, "nodes": 2}, "waiting for the machine with --node-rank 0 to answer at 127.0.0.1:"),
    ],
)
def test_a_machine_says_which_others_it_waits_for(
    machine: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.3)
    with pytest.raises(ValueError):
        meeting.meet(**machine, head="127.0.0.1", port=free_port(), wait=2.0, facts=[])
    assert expected in capsys.readouterr().err


def test_a_host_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """It lets ssh in, and then its file system hangs."""
    programs = {"pdsh": "exit 1", "ssh": "exec sleep 50", "timeout": 'shift; exec /usr/bin/timeout 1 "$@"'}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    command = ["bash", REPOSITORY / "launchers" / "multinode.sh", "deepspeed", "--hostfile", tmp_path / "hostfile"]
    printed = launch(command, timeout_s=100, expect_failure=True, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "looking at node0 (up to 60 s)" in printed and "node0 does not answer within 60 s" in printed


def _tokenize_for_long(rank: int, world_size: int, argv: list[str], limit: float) -> str:
    """finetune.py, where one rank needs longer for the records than a collective may take."""
    from launchers import finetune

    _join(limit)
    original = finetune.tokenized

    def slow(*args: object, build: bool, **kwargs: object) -> object:
        time.sleep(limit + 3 if build else 0)
        return original(*args, build=build, **kwargs)  # type: ignore[arg-type]

    finetune.tokenized = slow  # type: ignore[assignment]
    waiting.FIRST_WORD_SECONDS = 1.0
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        finetune.main(argv)
    return said.getvalue()


def test_finetuning_survives_records_that_take_longer_than_a_collective_may(tmp_path: Path) -> None:
    micro_model(tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    argv = [option for option in short_training(tmp_path, "out") if "eval_fraction" not in option]
    argv += ["--disable_tqdm=True", f"--cache_dir={tmp_path / 'cache'}"]
    said = run_ranks(_tokenize_for_long, 2, argv, 10.0, timeout=170, init_process_group=False)
    assert "waiting for rank 0: tokenizing the records" in said[1] and "tokenizing" not in said[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert os.listdir(tmp_path / "cache")
