"""evaluate.py: the same answers in any batch and on any number of ranks, resumed, counted exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from launchers import evaluate
from launchers.data.tokenization import encode_prompts, format_prompt
from launchers.evaluation import generation
from launchers.evaluation.answer_rules import ANSWER_WORDS
from reflora_dist.files.base_files import load_tokenizer
from reflora_dist.lora_sb import LoraXSConfig
from tests.support.cluster import run_ranks
from tests.support.launchers import (
    DATA,
    NUM_QUESTIONS,
    REPOSITORY,
    free_port,
    launch,
    micro_model,
    needs_data,
    write_questions,
)

TASKS = ("boolq", "winogrande", "gsm8k")


def _save_adapter(folder: Path, config: LoraConfig | LoraXSConfig) -> Path:
    """An adapter on the micro model that changes what it writes."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = get_peft_model(base, config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    path = folder / f"adapter-{config.peft_type.value}"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    micro_model(folder / "model")
    _save_adapter(folder, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    write_questions(folder / "data")
    return folder


def _options(folder: Path, output: str, **changes: Any) -> list[str]:
    options = {
        "adapter": folder / "adapter-LORA",
        "data": folder / "data",
        "tasks": " ".join(TASKS),
        "max_new_tokens": 6,
        "batch_size": 3,
        "output_dir": folder / output,
        "disable_tqdm": True,
        **changes,
    }
    return [part for name, value in options.items() for part in (f"--{name}", *str(value).split(" "))]


def _run(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    evaluate.main(_options(folder, output, **changes))
    return json.loads((folder / output / "results.json").read_text())


def _answers(folder: Path) -> dict[tuple[str, int], str]:
    lines = [line for path in folder.glob("answers.rank*.jsonl") for line in path.read_text().splitlines()]
    answers = [json.loads(line) for line in lines]
    assert len({(answer["task"], answer["index"]) for answer in answers}) == len(answers), "a question answered twice"
    return {(answer["task"], answer["index"]): answer["output"] for answer in answers}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[str, int], str]:
    """The answers of one process, one question at a time."""
    _run(folder, "alone", batch_size=1)
    answers = _answers(folder / "alone")
    assert len(answers) == 3 * NUM_QUESTIONS and len(set(answers.values())) > NUM_QUESTIONS
    return answers


def _evaluate_rank(rank: int, world_size: int, argv: list[str]) -> None:
    # what `accelerate launch` sets with an FSDP configuration, for which transformers builds rank 1's model otherwise
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    evaluate.main(argv)


def _run_ranks(folder: Path, output: str, world_size: int, **changes: Any) -> dict[str, Any]:
    argv = _options(folder, output, **changes)
    run_ranks(_evaluate_rank, world_size, argv, timeout=120, init_process_group=False)
    return json.loads((folder / output / "results.json").read_text())


def test_a_batch_changes_no_answer(folder: Path, alone: dict[tuple[str, int], str]) -> None:
    _run(folder, "batched", batch_size=NUM_QUESTIONS)
    assert _answers(folder / "batched") == alone


def test_the_prompts_are_those_of_training(folder: Path, alone: dict[tuple[str, int], str]) -> None:
    """Plain generation on the token ids that training sees, without any of the evaluation's code."""
    tokenizer = load_tokenizer(str(folder / "model"))
    config = generation.generation_config(tokenizer)
    model = generation.load_model(
        str(folder / "model"), str(folder / "adapter-LORA"), torch.float32, torch.device("cpu"), config
    )
    for index in range(NUM_QUESTIONS):
        record = json.loads((folder / "data" / "boolq" / "test.json").read_text())[index]
        ids = torch.tensor(encode_prompts(tokenizer, [format_prompt(record["instruction"], "", "alpaca")]))
        for _ in range(6):
            likeliest = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, likeliest], dim=1)
        written = tokenizer.decode(ids[0, -6:].tolist(), skip_special_tokens=True).strip()
        assert alone["boolq", index] == written


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.all_ranks)])
def test_ranks_share_the_questions(folder: Path, alone: dict[tuple[str, int], str], world_size: int) -> None:
    results = _run_ranks(folder, f"ranks-{world_size}", world_size)
    assert _answers(folder / f"ranks-{world_size}") == alone
    assert results["world_size"] == world_size
    counts = [len(p.read_text().splitlines()) for p in (folder / f"ranks-{world_size}").glob("answers.rank*.jsonl")]
    assert len(counts) == world_size and max(counts) - min(counts) <= 1
    assert results["tasks"] == json.loads((folder / "alone" / "results.json").read_text())["tasks"]


def test_a_killed_run_goes_on_with_other_ranks(
    folder: Path, alone: dict[tuple[str, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks were killed, one in the middle of a line; one rank does what is left, and no more."""
    _run_ranks(folder, "killed", 2)
    for path, keep in ((folder / "killed" / "answers.rank0.jsonl", 4), (folder / "killed" / "answers.rank1.jsonl", 2)):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
    (folder / "killed" / "results.json").unlink()
    answered: list[int] = []
    generate = generation.generate

    def counting(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[str]:
        answered.append(len(prompts))
        return generate(model, tokenizer, prompts, tokens)

    monkeypatch.setattr(generation, "generate", counting)
    results = _run(folder, "killed")
    assert sum(answered) == 3 * NUM_QUESTIONS - 6
    repaired = folder / "killed" / "answers.rank1.jsonl"
    repaired.write_text(repaired.read_text().rpartition("\n")[0] + "\n")  # rank 1 was not there to mend its file
    assert _answers(folder / "killed") == alone
    assert results["tasks"] == json.loads((folder / "alone" / "results.json").read_text())["tasks"]
    _run(folder, "killed")
    assert sum(answered) == 3 * NUM_QUESTIONS - 6


def test_more_questions_and_tasks_are_added_to_what_is_there(
    folder: Path, alone: dict[tuple[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(folder, "grown", tasks="boolq", limit=2)
    assert {task: entry["n"] for task, entry in first["tasks"].items()} == {"boolq": 2}
    capsys.readouterr()
    second = _run(folder, "grown", tasks="boolq gsm8k", limit=4)
    assert {task: entry["n"] for task, entry in second["tasks"].items()} == {"boolq": 4, "gsm8k": 4}
    assert "2 of 8 questions are answered already" in capsys.readouterr().out
    assert _answers(folder / "grown").items() <= alone.items()


def _change_adapter(folder: Path) -> dict[str, Any]:
    other = folder / "other_adapter"
    if not other.exists():
        os.rename(_save_adapter(folder, LoraXSConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")), other)
    return {"adapter": other}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_template": "plain"}, "prompt_template='alpaca', not 'plain'"),
        ({"adapter": None}, "adapter="),
        ({"max_new_tokens": 7}, "max_new_tokens="),
        ({"num_beams": 2}, "num_beams=1, not 2"),
        ({"model_dtype": "bfloat16"}, "model_dtype='float32', not 'bfloat16'"),
        ({"data": None}, "questions="),
    ],
)
def test_answers_of_other_settings_are_refused(
    folder: Path, alone: dict[tuple[str, int], str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "adapter" in changes:
        changes = _change_adapter(folder)
    if "data" in changes:
        changes = {"data": tmp_path}
        write_questions(tmp_path)
        file = tmp_path / "boolq" / "test.json"
        file.write_text(file.read_text().replace(" 7919?", " 7918?"))
    before = (folder / "alone" / "results.json").read_text()
    with pytest.raises(SystemExit, match=f"{re.escape(message)}.*give another --output_dir") as caught:
        _run(folder, "alone", **changes)
    assert "holds answers made with" in str(caught.value)
    assert (folder / "alone" / "results.json").read_text() == before


def test_a_retrained_adapter_in_the_same_place_is_refused(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    settings = {"adapter": tmp_path / "adapter", "tasks": "boolq", "limit": 2}
    _run(folder, str(tmp_path / "out"), **settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="adapter_files="):
        _run(folder, str(tmp_path / "out"), **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "boolq copa"}, "'copa' is none of"),
        ({"tasks": "boolq boolq=hub"}, "named twice"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"adapter": "nowhere"}, "adapter_config.json cannot be read"),
        ({"model": "nowhere"}, "model 'nowhere' cannot be loaded"),
        ({"data": "nowhere"}, "--tasks boolq=FILE"),
    ],
)
def test_mistakes_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        if "model" in changes:  # its tokenizer is looked for first
            changes = {**changes, "tokenizer": folder / "model"}
        _run(folder, f"mistake-{next(iter(changes))}", **changes)


def test_a_broken_answer_file_is_named(folder: Path) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "answers.rank0.jsonl").write_text('{"task": "boolq"}\n')
    with pytest.raises(SystemExit, match=r"answers.rank0.jsonl, line 1, is damaged \(index is missing\)"):
        _run(folder, "broken")


def test_the_template_is_the_one_of_the_training_run(folder: Path) -> None:
    metrics = folder / "adapter-LORA" / "metrics.json"
    metrics.write_text(json.dumps({"settings": {"prompt_template": "plain"}}))
    try:
        assert _run(folder, "plain", tasks="boolq", limit=2)["settings"]["prompt_template"] == "plain"
        explicit = _run(folder, "explicit", tasks="boolq", limit=2, prompt_template="alpaca")
        assert explicit["settings"]["prompt_template"] == "alpaca"
    finally:
        metrics.unlink()


def test_adapters_of_lora_sb_are_loaded(folder: Path, alone: dict[tuple[str, int], str]) -> None:
    _run(folder, "latent", **_change_adapter(folder))
    latent = _answers(folder / "latent")
    assert latent.keys() == alone.keys() and latent != alone


def test_the_base_alone_and_beams(folder: Path, alone: dict[tuple[str, int], str]) -> None:
    argv = _options(folder, "base", model=folder / "model")
    evaluate.main(argv[2:])
    assert _answers(folder / "base") != alone
    _run(folder, "beams", num_beams=3)
    assert _answers(folder / "beams") != alone


def test_recorded_answers_give_the_table(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the model would have written is given; the figures are counted by hand."""
    recorded = {
        "boolq": [
            "the correct answer is true",
            "true",
            "True",
            "false",
            "false true",
            "",
            "the correct answer is true",
        ],
        "winogrande": ["option1", "option1", "option2", "option2", "option1", "option2", "option1"],
        "gsm8k": ["#### 3", "#### -7", "4", "7", "so 1,003 - 1,000 = 3", "seven", "3.0"],
    }
    texts = {}
    for task in TASKS:
        for index, record in enumerate(json.loads((folder / "data" / task / "test.json").read_text())):
            texts[task, record["instruction"]] = recorded[task][index]
    current: list[str] = []

    load_model = generation.load_model

    def load(*arguments: Any) -> Any:
        model = load_model(*arguments)
        model.config.max_position_embeddings = 8
        return model

    def write(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[str]:
        task = {6: "boolq", 7: "winogrande", 8: "gsm8k"}[tokens]
        current.append(task)
        instructions = [tokenizer.decode(p).split("### Instruction:\n")[1].split("\n\n")[0] for p in prompts]
        return [texts[task, instruction] for instruction in instructions]

    monkeypatch.setattr(generation, "load_model", load)
    monkeypatch.setattr(generation, "generate", write)
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", {"boolq": 6, "winogrande": 7, "gsm8k": 8})
    argv = [part for part in _options(folder, "recorded") if part not in ("--max_new_tokens", "6")]
    evaluate.main(argv)
    results = json.loads((folder / "recorded" / "results.json").read_text())
    # references alternate: true false ..., option1 option2 ..., 3 -7 ...
    assert {task: (entry["correct"], entry["n"], entry["unanswered"]) for task, entry in results["tasks"].items()} == {
        "boolq": (3, 7, 2),  # 0, 3, 6
        "winogrande": (5, 7, 0),  # 0, 3, 4, 5, 6
        "gsm8k": (4, 7, 1),  # 0, 1, 4, 6
    }
    assert results["commonsense_average"] == pytest.approx(100 * (3 / 7 + 5 / 7) / 2)
    printed = capsys.readouterr().out
    assert "21 of 21 prompts exceed the model's 8 positions" in caplog.text
    for row in ("boolq │ 42.86 │ 7 │ 2", "winogrande │ 71.43 │ 7 │ 0", "gsm8k │ 57.14 │ 7 │ 1"):
        assert row in re.sub(r" +", " ", printed)
    assert "commonsense tasks │ 57.14" in re.sub(r" +", " ", printed)


@needs_data
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("torchrun", marks=pytest.mark.all_ranks),  # the recipe's test uses it too
        pytest.param("deepspeed", marks=pytest.mark.all_ranks),
        pytest.param("accelerate", marks=pytest.mark.all_ranks),
    ],
)
def test_every_launcher_starts_it_on_real_questions(folder: Path, launcher: str) -> None:
    port = free_port()
    accelerate_config = REPOSITORY / "launchers" / "accelerate" / "deepspeed_zero3.yaml"
    command = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={port}"],
        "accelerate": [
            *("accelerate.commands.launch", "--num_processes=2", f"--main_process_port={port}"),
            f"--config_file={accelerate_config}",
        ],
    }[launcher]
    tasks = " ".join(task for task in [*ANSWER_WORDS, "gsm8k"] if task != "hellaswag")
    argv = _options(folder, launcher, data=DATA, tasks=tasks, limit=3, max_new_tokens=3)
    printed = launch(["python", "-m", *command, REPOSITORY / "launchers" / "evaluate.py", *argv], timeout_s=200)
    results = json.loads((folder / launcher / "results.json").read_text())
    assert (results["world_size"], {entry["n"] for entry in results["tasks"].values()}) == (2, {3})
    assert printed.count("mean of the commonsense tasks") == 1  # one rank speaks
    assert len(list((folder / launcher).glob("answers.rank*.jsonl"))) == 2


def test_an_adapter_with_a_tokenizer_of_its_own_is_asked_with_it(folder: Path, tmp_path: Path) -> None:
    """Tokens may have been added to it, which the base's tokenizer would take apart."""
    base, adapter = str(folder / "model"), tmp_path / "adapter"
    shutil.copytree(folder / "adapter-LORA", adapter)
    assert generation.tokenizer_of(base, None) == generation.tokenizer_of(base, str(adapter)) == base
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(adapter)
    own = load_tokenizer(generation.tokenizer_of(base, str(adapter)))
    assert len(encode_prompts(own, ["<own>"])[0]) < len(encode_prompts(load_tokenizer(base), ["<own>"])[0])
