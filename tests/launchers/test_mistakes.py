"""What a mistake on the command line gets: one clear line before training, with the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers import finetune
from tests.support.launchers import micro_model, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "{folder}/absent.jsonl"}, "absent.jsonl'.*no such file"),
        ({"dataset": "{folder}/empty.jsonl"}, "empty.jsonl' is empty"),
        ({"dataset": "{folder}/bad.jsonl"}, "bad.jsonl, line 2: field 'output' is missing"),
        ({"eval_dataset": "{folder}/absent.jsonl"}, "absent.jsonl'.*no such file"),
        ({"eval_fraction": "1.5"}, "eval_fraction=1.5"),
        ({"max_length": "3"}, "max_length=3 is too short"),
        ({"max_length": "1"}, "max_length=1 must be at least 2"),
        ({"model": "{folder}/absent"}, "absent.* cannot be loaded"),
        ({"output_dir": "{folder}/file/out"}, "output_dir=.*is not writable"),
        ({"cache_dir": "{folder}/file/cache"}, "cache_dir=.*is not writable"),
        ({"lora_r": "0"}, "lora_r=0 must be at least 1"),
        ({"scaled_gd_damping": "0.05"}, "scaled_gd_damping=0.05 means nothing to --method reflora"),
        ({"carry_moments": "True", "method": "lora-pro"}, "carry_moments=True means nothing to method='lora-pro'"),
        ({"lora_dropout": "1"}, "lora_dropout=1.0 must be in"),
        ({"reflora_interval": "0"}, "reflora_interval=0 must be"),
        ({"reflora_warmup_steps": "-1"}, "reflora_warmup_steps=-1 must be"),
        ({"load_in_4bit": "True", "method": "lora-sb"}, "method lora-sb needs the weights.*drop --load_in_4bit"),
        ({"load_in_4bit": "True", "init_lora_weights": "pissa"}, "init_lora_weights pissa needs.*drop --load_in_4bit"),
        ({"target_modules": "no_such_layer"}, "no_such_layer"),
        ({"resume_from_checkpoint": "{folder}/model"}, "is no checkpoint"),
        ({"max_eval_records": "0"}, "max_eval_records=0"),
        ({"fp16": "True"}, "fp16=True needs a GPU, and there is none: give --bf16 True"),
        ({"model": "{folder}/modle"}, "no such file or folder; did you mean .*/model"),
        ({"dataset": "{folder}/recrods.jsonl"}, "no such file or folder; did you mean .*/records.jsonl"),
        ({"deepspeed": "{folder}/absent.json"}, "absent.json.: no such file"),
        ({"deepspeed": "{folder}/model/config.json"}, "needs a launcher"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_before_training(folder: Path, changes: dict[str, str], message: str) -> None:
    options = {
        "model": "{folder}/model",
        "dataset": "{folder}/records.jsonl",
        "output_dir": "{folder}/out",
        "cache_dir": "{folder}/cache",
        **changes,
    }
    argv = [f"--{name}={value.format(folder=folder)}" for name, value in options.items()]
    with pytest.raises(SystemExit, match=f"(?s)finetune.py: error: .*{message}"):
        finetune.main(argv)


def test_an_unknown_method_is_refused_by_the_parser() -> None:
    with pytest.raises(SystemExit, match=r"finetune\.py: error: argument --method: invalid choice: 'adalora'"):
        finetune.main(["--method=adalora"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be: not even root can write there."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"output_dir=.*is not writable"):
        finetune.main([f"--output_dir={tmp_path / 'file' / 'run'}"])


def test_both_kinds_of_evaluation_data_at_once_are_refused(folder: Path) -> None:
    records = json.dumps(str(folder / "records.jsonl")).strip('"')
    with pytest.raises(SystemExit, match="--eval_dataset or --eval_fraction, not both"):
        finetune.main([f"--dataset={records}", f"--eval_dataset={records}", "--eval_fraction=0.1"])
