"""An output folder that was used before: refused, overwritten, resumed with other settings, or done already."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launchers import finetune
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import micro_model, write_records

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "no"}
ENGINES = [
    "single",
    "zero3",
    *(pytest.param(engine, marks=pytest.mark.all_ranks) for engine in ("ddp", "zero2", "fsdp1", "fsdp2")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("used")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


def _rank(rank: int, world_size: int, engine: str, argv: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        finetune_rank(rank, world_size, engine, argv)
    return printed.getvalue()


def _train(folder: Path, output: Path, engine: str = "single", **changes: Any) -> str:
    """Run finetune.py and return what its first rank printed."""
    argv = finetune_options(folder, str(output), **{**SAVING, **changes})
    ranks = 1 if engine == "single" else 2
    return run_ranks(_rank, ranks, engine, argv, timeout=240, init_process_group=False)[0]


@pytest.fixture
def used(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a folder with a finished run of four steps, of the engine that the test asks for."""
    engine = getattr(request, "param", "single")
    if not (folder / engine).exists():
        _train(folder, folder / engine, engine)
    return Path(shutil.copytree(folder / engine, tmp_path / "used"))


def _metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def _refused(folder: Path, output: Path, message: str, **changes: Any) -> None:
    with pytest.raises(SystemExit, match=message):
        finetune.main(finetune_options(folder, str(output), **{**SAVING, **changes}))
    assert (output / "checkpoint-4" / "trainer_state.json").is_file()


def test_a_new_run_in_a_used_folder_is_refused_before_anything_is_loaded(folder: Path, used: Path) -> None:
    message = r"has checkpoints of an earlier run \(the last is checkpoint-4\): give --resume_from_checkpoint auto"
    _refused(folder, used, message, model="absent", dataset="absent")
    other = used.parent / "elsewhere"
    shutil.copytree(used, other)
    _refused(folder, used, message, resume_from_checkpoint=other / "checkpoint-2", model="absent")


def test_what_cannot_be_both_is_refused(folder: Path, used: Path) -> None:
    for resumed in ("auto", used / "checkpoint-2"):
        message = "overwrite_output_dir=True would remove what resume_from_checkpoint=.* goes on from: give one"
        _refused(folder, used, message, overwrite_output_dir=True, resume_from_checkpoint=resumed)


def test_a_start_that_fails_removes_nothing(folder: Path, used: Path) -> None:
    _refused(folder, used, "no such file", overwrite_output_dir=True, dataset=folder / "absent.jsonl")
    assert (used / "checkpoint-2").is_dir()


def test_overwriting_removes_checkpoints_and_nothing_else(folder: Path, used: Path) -> None:
    kept = ["notes.txt", "checkpoint-best/trainer_state.json", "checkpoint-9/notes.txt", "my-checkpoint-4/a"]
    for name in kept:
        (used / name).parent.mkdir(exist_ok=True)
        (used / name).write_text("mine")
    printed = _train(folder, used, overwrite_output_dir=True, max_steps=3)
    assert printed.count("of an earlier run") == 2
    assert (used / "checkpoint-2" / "complete.json").is_file() and not (used / "checkpoint-4").exists()
    assert [(used / name).read_text() for name in kept] == ["mine"] * len(kept)
    assert _metrics(used)["steps"] == 3


@pytest.mark.parametrize(("used", "engine"), [("single", "single")], indirect=["used"])
def test_a_finished_run_says_so_and_is_not_trained_again(folder: Path, used: Path, engine: str) -> None:
    before = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
    printed = _train(folder, used, engine, resume_from_checkpoint="auto", model="absent")  # which nobody loads
    assert "all 4 steps are done, nothing is trained" in printed
    assert {path: path.read_bytes() for path in used.rglob("*") if path.is_file()} == before
    assert "all 4 steps are done" in _train(
        folder, used, engine, resume_from_checkpoint="auto", max_steps=None, num_train_epochs=0.1, model="absent"
    )


@pytest.mark.parametrize(
    ("used", "engine"),
    [
        (engine, engine) if isinstance(engine, str) else pytest.param(*engine.values * 2, marks=engine.marks)
        for engine in ENGINES
    ],
    indirect=["used"],
)
def test_a_run_that_was_killed_after_its_last_checkpoint_writes_its_results(
    folder: Path, used: Path, engine: str
) -> None:
    """Trainer alone would take a fifth step."""
    before, adapter = _metrics(used), load_file(used / "adapter_model.safetensors")
    for name in ("metrics.json", "adapter_model.safetensors", "adapter_config.json"):
        (used / name).unlink()
    printed = _train(folder, used, engine, resume_from_checkpoint="auto")
    assert "all 4 steps are done, nothing is trained; the results follow" in printed
    after = _metrics(used)
    assert (after["steps"], after["train_loss"]) == (4, before["train_loss"])
    assert (after["step_seconds_median"], after["bytes_per_step"]) == (None, None)
    found = load_file(used / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.items())


@pytest.mark.parametrize(
    ("used", "engine"),
    [
        (engine, engine) if isinstance(engine, str) else pytest.param(*engine.values * 2, marks=engine.marks)
        for engine in ENGINES
    ],
    indirect=["used"],
)
def test_other_settings_are_named_recorded_and_take_effect(folder: Path, used: Path, engine: str) -> None:
    changes = {"learning_rate": 1e-3, "max_steps": 6, "save_steps": 3, "lr_scheduler_type": "constant", "seed": 7}
    (used / "metrics.json").unlink()
    printed = _train(folder, used, engine, resume_from_checkpoint=used / "checkpoint-2", **changes)
    for line in (
        "learning_rate: 0.01 -> 0.001",
        "max_steps: 4 -> 6",
        "lr_scheduler_type: 'linear' -> 'constant'",
        "seed: 42 -> 7",
    ):
        assert printed.count(f"from step 3 on {line}\n") == 1, printed
    assert printed.count("from step 3 on") == 4  # save_steps has no influence on what is trained
    metrics = _metrics(used)
    assert (metrics["settings"]["learning_rate"], metrics["settings"]["seed"]) == (1e-2, 42)
    changed = {"learning_rate": [1e-2, 1e-3], "max_steps": [4, 6], "lr_scheduler_type": ["linear", "constant"]}
    assert metrics["settings_changed"] == [{"step": 2, "seed": [42, 7], **changed}]
    # Trainer itself would go on with the checkpoint's learning rate and numbers of steps
    assert sorted(path.name for path in used.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    history = json.loads((used / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([1e-2, 0.75e-2, 1e-3, 1e-3, 1e-3, 1e-3])
    assert "# from step 3 on learning_rate: 0.01 -> 0.001\n" in (used / "run.yaml").read_text()
    if engine == "single":
        _check_the_record_of_a_second_resumption(folder, used, metrics["settings_changed"], changes)


def _check_the_record_of_a_second_resumption(
    folder: Path, used: Path, recorded: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    """The same settings are no change; back to the first ones is one."""
    printed = _train(folder, used, resume_from_checkpoint=used / "checkpoint-3", **changes)
    assert "->" not in printed.partition("attached")[0]
    assert _metrics(used)["settings_changed"] == recorded
    changes |= {"seed": 42}
    printed = _train(folder, used, resume_from_checkpoint=used / "checkpoint-3", **changes)
    assert "from step 4 on seed: 7 -> 42\n" in printed
    assert _metrics(used)["settings_changed"] == [*recorded, {"step": 3, "seed": [7, 42]}]


def test_a_batch_is_compared_as_a_whole_too(folder: Path, used: Path) -> None:
    """Over all ranks and micro-batches."""
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    printed = _train(folder, used, resume_from_checkpoint=used / "checkpoint-2", **changes)
    assert "from step 3 on per_device_train_batch_size: 2 -> 1\n" in printed
    assert "from step 3 on gradient_accumulation_steps: 1 -> 4\n" in printed
    assert "from step 3 on global_batch_size: 2 -> 4\n" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.5}, r"weight_decay=0\.5 has no effect .* goes on with 0\.0: give --weight_decay 0\.0, or"),
        ({"adam_beta2": 0.5}, r"adam_beta2=0\.5 has no effect .* give --adam_beta2 0\.999"),
        ({"optim": "sgd"}, r"optim='sgd' has no effect"),
    ],
)
def test_what_the_checkpoint_decides_is_refused(folder: Path, used: Path, changes: Any, message: str) -> None:
    _refused(folder, used, message, resume_from_checkpoint="auto", max_steps=6, **changes)


def test_another_rate_of_a_schedule_that_follows_the_loss_is_refused(folder: Path, tmp_path: Path) -> None:
    changes = {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 2}
    _train(folder, tmp_path / "run", **changes)
    with pytest.raises(RuntimeError, match=r"learning_rate=0\.5 has no effect on a resumed run: GreedyLR goes on with"):
        _train(*(folder, tmp_path / "run"), resume_from_checkpoint="auto", max_steps=6, learning_rate=0.5, **changes)


def test_a_checkpoint_without_settings_is_resumed_and_said_to_have_none(folder: Path, used: Path) -> None:
    """That of an earlier release."""
    path = used / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunSettings"]
    path.write_text(json.dumps(state))
    record = json.loads((path.parent / "complete.json").read_text())
    record["files"][path.name] = path.stat().st_size
    (path.parent / "complete.json").write_text(json.dumps(record))
    printed = _train(folder, used, resume_from_checkpoint=path.parent, learning_rate=1e-3, max_steps=3)
    assert "does not record its run's settings" in printed
    metrics = _metrics(used)
    assert (metrics["settings"]["learning_rate"], metrics["settings_changed"]) == (1e-3, [])
    history = json.loads((used / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["learning_rate"] == pytest.approx(1e-3 / 3)  # which counts, whatever it was before


def _die_in_the_first_step(rank: int, world_size: int, argv: list[str]) -> None:
    def die(*args: Any) -> None:
        raise RuntimeError("the first step")

    finetune.Trainer.training_step = die  # type: ignore[method-assign]
    finetune_rank(rank, world_size, "single", argv)


def test_the_settings_are_written_before_the_first_step_and_give_the_same_run(folder: Path, tmp_path: Path) -> None:
    changes = {"lora_alpha": 3.5, "lr_scheduler_type": "cosine", "report_to": "none", "reflora_warmup_steps": None}
    changes |= {"weight_decay": 1e-5, "save_strategy": "no", "eval_strategy": "steps", "max_steps": 12}
    argv = finetune_options(folder, str(tmp_path / "killed"), **{**SAVING, **changes})
    with pytest.raises(RuntimeError, match="the first step"):
        run_ranks(_die_in_the_first_step, 1, argv, init_process_group=False)
    file = tmp_path / "killed" / "run.yaml"
    assert "reflora_warmup_steps: 2\n" in file.read_text()  # a tenth of twelve, rounded up
    for output, options in (("flags", argv), ("file", [f"--config={file}"])):
        options = [*options, f"--output_dir={tmp_path / output}"]
        run_ranks(finetune_rank, 1, "single", options, timeout=240, init_process_group=False)
    flags, from_file = _metrics(tmp_path / "flags"), _metrics(tmp_path / "file")
    assert flags["report"]["applied_steps"] == 10
    for name in ("train_loss", "held_out_loss", "report"):
        assert from_file[name] == flags[name], name
    assert from_file["settings"] == flags["settings"] | {"reflora_warmup_steps": 2}
    assert (tmp_path / "file" / "run.yaml").read_text() == file.read_text().replace("killed", "file")
    adapters = [load_file(tmp_path / output / "adapter_model.safetensors") for output in ("flags", "file")]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())


@pytest.mark.parametrize(("example", "engine"), [("zero3", "ddp"), ("fsdp2", "fsdp2"), ("one_gpu_4bit", "single")])
def test_an_example_trains_in_small(folder: Path, tmp_path: Path, example: str, engine: str) -> None:
    """With its own settings, but for the model, the data and the length; DeepSpeed's file is that of the example."""
    small = ["model", "dataset", "output_dir", "cache_dir", "max_length", "max_steps", "lora_r"]
    argv = finetune_options(folder, str(tmp_path / "run"), max_steps=2)
    argv = [option for option in argv if option[2:].partition("=")[0] in small]
    argv += [f"--config={example}", "--prompt_template=plain", "--eval_fraction=0.2", "--gradient_accumulation_steps=1"]
    run_ranks(_rank, 1 if engine == "single" else 2, engine, argv, timeout=240, init_process_group=False)
    metrics = _metrics(tmp_path / "run")
    assert metrics["report"]["engine"] == example.replace("one_gpu_4bit", "single")
    assert metrics["settings"]["load_in_4bit"] == (example == "one_gpu_4bit")
    assert [point["step"] for point in metrics["held_out_loss"]] == [0, 2]
    assert [point["step"] for point in metrics["train_loss"]] == [1, 2]
