"""The README's claims: every test it names exists, its snippets run as they are, its files are there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tests.support.cluster import run_ranks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_named_tests_exist() -> None:
    """A cell of the support matrix names the test that backs it."""
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= {path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", README))
    assert len(named) > 10
    assert named <= defined, named - defined


def test_named_files_exist() -> None:
    named = re.findall(r"`?\b((?:launchers|ds_configs|tests|benchmarks|reflora_dist)/[\w/.-]*\w)", README)
    missing = {path for path in named if not (ROOT / path).exists()}
    assert named and not missing


def test_the_example_of_a_method_is_its_code() -> None:
    page = (ROOT / "reflora_dist" / "methods" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = (ROOT / "reflora_dist" / "methods" / "scaled_gd.py").read_text()
    assert example == re.sub(r'    """.*?"""\n\n', "", code[code.index("class ") :], flags=re.DOTALL)


def _snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))


def _run_loop_and_checkpoint_snippets(rank: int, world_size: int, folder: str) -> str:
    import os

    loop, _, rite, latent, *_, checkpoint = _snippets()
    names = {"base_model": _model()}
    exec(loop, names)
    model, optimizer, handle = (names[key] for key in ("model", "optimizer", "handle"))
    tokens = torch.arange(32).view(1, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    os.chdir(folder)
    handle.detach()
    exec(checkpoint, names)
    assert names["state"] == handle.state_dict()
    _run_method_snippets(rite, latent, names)
    return handle.report().engine


def _run_method_snippets(rite: str, latent: str, names: dict) -> None:
    exec(rite, names)
    model, tokens = names["model"], torch.arange(32).view(1, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    names["optimizer"].step()
    assert names["handle"].report().applied_steps == 1
    names |= {"base_model": _model(), "batches": [{"input_ids": tokens, "labels": tokens}] * 8}
    exec(latent, names)
    loaded = names["PeftModel"].from_pretrained(_model(), "adapter")
    plain = names["PeftModel"].from_pretrained(_model(), "plain_lora")
    logits = [peft_model(tokens).logits for peft_model in (names["model"].eval(), loaded, plain)]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-5)


def test_loop_and_checkpoint_snippets(tmp_path: Path) -> None:
    assert run_ranks(_run_loop_and_checkpoint_snippets, 2, str(tmp_path)) == ["fsdp2", "fsdp2"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_trainer_snippet(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(), LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": list(range(16)), "labels": list(range(16))}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    names = {"peft_model": model, "args": arguments, "data": Dataset.from_list(rows)}
    exec(_snippets()[1], names)
    handle = next(c.handle for c in names["trainer"].callback_handler.callbacks if hasattr(c, "handle"))
    assert handle.report().steps == 2
    names["args"] = TrainingArguments(
        str(tmp_path / "complete"), max_steps=2, report_to="none", use_cpu=True, save_strategy="steps", save_steps=2
    )
    written = []
    for _ in range(2):  # the second run goes on from the end of the first, and writes nothing
        exec(_snippets()[4], names)
        last = Path(names["last_complete_checkpoint"](names["args"].output_dir))
        assert last.name == "checkpoint-2"
        written.append((last / "complete.json").stat().st_mtime_ns)
    assert written[0] == written[1]
