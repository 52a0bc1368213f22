"""Options from a file: read with YAML's types under the options' names, overridden by flags, refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers import finetune
from launchers.configurations import shipped_names
from launchers.training.arguments import FinetuneArguments
from launchers.training.glue_tasks import ClassificationOptions
from launchers.training.options import DataOptions, LoraOptions, ModelOptions, parse_options
from launchers.training.run_file import find_run_file, read_mapping, read_run_file, run_file_text
from tests.support.launchers import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "launchers" / "examples").glob("*.yaml"))


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def _parsed(tmp_path: Path, text: str, *flags: str) -> Any:
    return parse_options([f"--config={_file(tmp_path, text)}", f"--output_dir={tmp_path / 'out'}", *flags])


def test_a_file_sets_options_and_flags_override_it(tmp_path: Path) -> None:
    text = "lora_r: 8\nlearning_rate: 3e-4\nmethod: reflora-s\ndataset: [a.jsonl, b.jsonl]\neval_fraction: 0.25\n"
    text += "rslora: true\nlora_alpha: 4\noptim_args: null\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    options = _parsed(tmp_path, text, "--lora_r=4", "--dataset", "c.jsonl")
    assert (options.lora.lora_r, options.lora.method, options.lora.rslora) == (4, "reflora-s", True)
    assert options.lora.lora_alpha == 4.0 and isinstance(options.lora.lora_alpha, float)
    assert (options.training.learning_rate, options.training.lr_scheduler_kwargs) == (3e-4, {"num_cycles": 2})
    assert (options.data.dataset, options.data.eval_fraction) == (["c.jsonl"], 0.25)


def test_words_that_an_older_yaml_takes_for_truths_are_text(tmp_path: Path) -> None:
    """YAML 1.1 reads ``no`` as false, and ``3e-4`` and ``1e3`` as text."""
    options = _parsed(tmp_path, "eval_strategy: no\nsave_strategy: no\nlearning_rate: 1e-3\nmodel: on\n")
    assert (options.training.eval_strategy, options.training.save_strategy) == ("no", "no")
    assert (options.training.learning_rate, options.model.model) == (1e-3, "on")


@pytest.mark.parametrize(
    "value", ["12e4567", "1e5", "no", "on", "0o17", "0123", "1_0", "~", "3.", "2026-12-01", 0.5, 3]
)
def test_what_is_written_is_read(value: Any, tmp_path: Path) -> None:
    assert read_mapping(_file(tmp_path, run_file_text(["# a comment"], {"run_name": value}))) == {"run_name": value}


def test_one_word_is_a_list_of_one(tmp_path: Path) -> None:
    assert _parsed(tmp_path, "target_modules: q_proj\n").lora.target_modules == ["q_proj"]


def test_null_keeps_all_checkpoints(tmp_path: Path) -> None:
    assert _parsed(tmp_path, "save_total_limit: null\n").training.save_total_limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: sixteen", "lora_r='sixteen' must be a whole number"),
        ("lora_r: 8.5", "lora_r=8.5 must be a whole number"),
        ("lora_r: '8'", "lora_r='8' must be a whole number"),
        ("lora_r: true", "lora_r=True must be a whole number"),
        ("lora_r: null", "lora_r=None must be a whole number"),
        ("lora_r: 010", "lora_r='010' must be a whole number"),
        ("learning_rate: fast", "learning_rate='fast' must be a number"),
        ("learning_rate: [1.0]", "learning_rate=[1.0] must be a number"),
        ("lora_alpha: true", "lora_alpha=True must be a number or null"),
        ("packing: yes", "packing='yes' must be true or false"),
        ("packing: 1", "packing=1 must be true or false"),
        ("bf16: maybe", "bf16='maybe' must be true or false or null"),
        ("model: 7", "model=7 must be text or null"),
        ("dataset: {a: b}", "dataset={'a': 'b'} must be a list of texts"),
        ("dataset: [a, 7]", "dataset=['a', 7] must be a list of texts"),
        ("method: adalora", "method='adalora' must be one of lora, "),
        ("lr_scheduler_type: steep", "lr_scheduler_type='steep' must be one of linear, "),
        ("data:\n  max_length: 5", "there is no option data; did you mean dataset?"),
        ("lr: 1e-3", "there is no option lr; did you mean learning_rate?"),
        ("batch_size: 2", "there is no option batch_size; did you mean per_device_train_batch_size?"),
        ("learning-rate: 1e-3", "there is no option learning-rate; did you mean learning_rate?"),
        ("lerning_rate: 1e-3", "there is no option lerning_rate; did you mean learning_rate"),
        ("xyzzy: 1", "there is no option xyzzy"),
        ("config: other.yaml", "there is no option config"),
        ("1: 2", "there is no option 1"),
        ("seed: 1\nlora_r: 4\nseed: 2", "cannot be read: the key 'seed' is there twice"),
        ("dataset: &d [a]\neval_dataset: *d", "cannot be read: *d in line 2 refers to another value"),
        ("- lora_r", "holds ['lora_r'] where options and their values are wanted"),
        ("lora_r", "holds 'lora_r' where"),
        ("", "holds None where"),
        ("lora_r: [", "cannot be read: while parsing"),
        ("lora_r: !!python/name:os.system ''", "cannot be read: could not determine a constructor"),
        ("[" * 5000, "cannot be read: "),
        ("\x00", "cannot be read: "),
        ("# " + "x" * 2**20, "cannot be read: it has more than"),
    ],
    ids=lambda value: value[:24],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(SystemExit) as refused:
        finetune.main([f"--config={path}"])
    printed = str(refused.value)
    assert printed.startswith("finetune.py: error: ") and str(path) in printed
    assert message in printed
    assert "\n" not in printed


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path), "absent.yaml", "zero4"):
        with pytest.raises(SystemExit, match=rf"config='{name}': no such file; .*: fsdp2, one_gpu_4bit, zero3$"):
            finetune.main([f"--config={name}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e-3"], "there is no option --lr; did you mean --learning_rate"),
        (["--lr=1e-3"], "there is no option --lr; did you mean --learning_rate"),
        (["--batch_size", "2"], "there is no option --batch_size; did you mean --per_device_train_batch_size"),
        (["--epochs", "2"], "there is no option --epochs; did you mean --num_train_epochs"),
        (["--max-lenght", "2"], "there is no option --max-lenght; did you mean --max_length"),
        (["--resume_from"], "there is no option --resume_from; did you mean --resume_from_checkpoint"),
        (["--lora_rank", "2", "--xyzzy"], "there is no option --lora_rank; did you mean --lora_r?"),
        (["--xyzzy"], "there is no option --xyzzy; --help lists the options"),
        (
            ["--learning_rat", "1"],
            "there is no option --learning_rat; did you mean --learning_rate",
        ),  # no abbreviations
        (["run.yaml"], "'run.yaml' belongs to no option; --help lists the options"),
        (["--lora_r", "2", "3"], "'3' belongs to no option"),
        (["--lora_r", "two"], "argument --lora_r/--lora-r: invalid int value: 'two'"),
        (["--lora_r"], "argument --lora_r/--lora-r: expected one argument"),
        (["--method", "adalora"], "argument --method: invalid choice: 'adalora'"),
    ],
)
def test_a_mistyped_option_gets_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"finetune.py: error: {message}")) as refused:
        finetune.main(arguments)
    assert "\n" not in str(refused.value)
    printed = capsys.readouterr()
    assert "usage" not in printed.out + printed.err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_found_by_name_and_says_how_to_start_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # nothing depends on the folder in which the command is typed
    classes = (ModelOptions, LoraOptions, DataOptions, FinetuneArguments, ClassificationOptions)
    options = read_run_file(find_run_file(path.stem), classes)
    assert options == yaml.safe_load(path.read_text()) | {name: options[name] for name in ("learning_rate",)}
    assert options["output_dir"] == f"outputs/{path.stem}"
    assert path.read_text().splitlines()[1].endswith(f"--config launchers/examples/{path.name}")


def test_the_examples_are_shipped() -> None:
    assert (
        [path.stem for path in EXAMPLES] == shipped_names("launchers/examples") == [*("fsdp2", "one_gpu_4bit", "zero3")]
    )
