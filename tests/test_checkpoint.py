"""The adapter and the training state survive a save under every raw engine, on the same and on other numbers of ranks.

Training is that of the synthetic workload, clipped, with a warm-up of one step and an interval of two: a schedule
that restarts, a moment that is lost or a factor that is stale shows in the factors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoint import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from tests.cluster import run_ranks
from tests.engines_under_test import ENGINES
from tests.engines_under_test.common import Wrapped, _train_on, adamw, mean_over_ranks
from tests.engines_under_test.zero import Zero, _zero, zero_config
from tests.workloads import Factors, Workload, build_model, synthetic_workload, worst_factor_error, worst_loss_error

OWN_LOOP = [name for name in ENGINES if not name.endswith("-trainer")]
ZERO = ("zero1", "zero2", "zero3", "zero3-two-groups", "zero1-bf16")
SAVED_AT, STEPS = 3, 5
OTHER_RANKS_TOLERANCE = 1e-5  # another number of ranks sums gradients in another order; measured 8e-8
# DDP and ZeRO-1/2 cut their first step's buckets differently, so a fresh process sums in another order; measured 7e-8
REBUCKETED_TOLERANCE = 1e-6
BF16_TOLERANCE = 2e-2  # bf16 gradients summed in another order; measured 3e-3


class Outcome(NamedTuple):
    """What a rank saw: losses and factors after the checkpoint, and its handle's state."""

    losses: list[float]
    at_checkpoint: Factors
    factors: Factors
    handle: dict[str, Any]


def _wrap(engine_name: str, world_size: int, universal: bool = False) -> tuple[Workload, Wrapped]:
    workload = synthetic_workload(steps=STEPS)
    engine = ENGINES[engine_name]
    settings = dataclasses.replace(workload.settings, clip=0.5)
    model = build_model(workload, dtype=engine.model_dtype)
    wrap = engine.wrap
    if universal:
        assert isinstance(wrap, functools.partial) and wrap.func is _zero
        more = {**wrap.keywords.get("more", {}), "checkpoint": {"load_universal": True}}
        wrap = functools.partial(wrap, more=more)
    return workload, wrap(model, settings, workload.batches.shape[1] // world_size)


def _config(method: str) -> RefLoRAConfig:
    return RefLoRAConfig(method=method, warmup_steps=1, interval=2)


def _train_and_save(
    rank: int, world_size: int, engine_name: str, method: str, folder: str, saved_at: int = SAVED_AT
) -> Outcome:
    """Train without interruption, saving on the way."""
    workload, wrapped = _wrap(engine_name, world_size)
    handle = attach(wrapped.model, wrapped.optimizer, _config(method))
    losses, at_checkpoint = [], {}
    for step, batch in enumerate(workload.batches):
        if step == saved_at:
            save_checkpoint(folder, wrapped.model, wrapped.optimizer, handle)
            at_checkpoint = wrapped.factors()
        losses.append(_train_on(wrapped, batch))
    return Outcome(mean_over_ranks(losses)[saved_at:], at_checkpoint, wrapped.factors(), handle.state_dict())


def _resume(
    rank: int,
    world_size: int,
    engine_name: str,
    method: str,
    folder: str,
    saved_at: int = SAVED_AT,
    universal: bool = False,
) -> Outcome:
    """A fresh model and optimizer, loaded and trained to the end."""
    workload, wrapped = _wrap(engine_name, world_size, universal)
    state = load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    if hasattr(wrapped.model, "micro_steps"):
        wrapped.model.micro_steps = wrapped.model.global_steps  # DeepSpeed starts it anew; the harness compares
    handle = attach(wrapped.model, wrapped.optimizer, _config(method), state_dict=state)
    at_checkpoint = wrapped.factors()
    losses = [_train_on(wrapped, batch) for batch in workload.batches[saved_at:]]
    return Outcome(mean_over_ranks(losses), at_checkpoint, wrapped.factors(), handle.state_dict())


def _engines_with_ranks() -> Iterator[Any]:
    """Every raw engine once; without the option a selection of different kinds, methods taking turns."""
    default = {"single", "ddp", "fsdp2", "fsdp2-hsdp-shard1", "fsdp1-full", "fsdp1-flat", "fsdp1-no-shard"}
    default |= {"zero1", "zero2-two-groups", "zero3-subgroups", "zero3-persist-none", "zero1-bf16"}
    for index, name in enumerate(OWN_LOOP):
        for turn, saved_at in enumerate((SAVED_AT, 1)):  # 1: at the end of the warm-up
            method = ("reflora", "reflora-s")[(index + turn) % 2]
            marks = [] if name in default and saved_at == SAVED_AT else [pytest.mark.all_ranks]
            world_size = ENGINES[name].world_sizes[index % len(ENGINES[name].world_sizes)]
            yield pytest.param(name, method, world_size, saved_at, marks=marks, id=f"{name}-{method}-after{saved_at}")


@pytest.mark.parametrize(("engine_name", "method", "world_size", "saved_at"), _engines_with_ranks())
def test_resumed_training_continues_as_if_uninterrupted(
    engine_name: str, method: str, world_size: int, saved_at: int, tmp_path: Path
) -> None:
    """Losses, factors and schedule of a resumed run are those of the uninterrupted one on every rank, bit by bit
    where the engine itself is deterministic; the adapter in the checkpoint equals the gathered factors exactly,
    and no file holds the frozen base.
    """
    rebuckets = engine_name.startswith(("ddp", "zero1", "zero2"))
    tolerance = REBUCKETED_TOLERANCE if rebuckets else 0.0
    if "bf16" in engine_name:
        tolerance = BF16_TOLERANCE
    folder = str(tmp_path / "checkpoint")
    complete = run_ranks(_train_and_save, world_size, engine_name, method, folder, saved_at)
    _assert_adapter_equals(tmp_path / "checkpoint", complete[0].at_checkpoint)
    assert_no_frozen_base(tmp_path / "checkpoint")
    for expected, resumed in zip(
        complete, run_ranks(_resume, world_size, engine_name, method, folder, saved_at), strict=True
    ):
        assert resumed.handle == expected.handle
        assert worst_factor_error(resumed.at_checkpoint, _as_float(expected.at_checkpoint)) == 0.0
        assert worst_loss_error(resumed.losses, expected.losses) <= tolerance
        assert worst_factor_error(resumed.factors, _as_float(expected.factors)) <= tolerance


def _assert_adapter_equals(folder: Path, factors: Factors) -> None:
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in factors}
    for name, factor in factors.items():
        assert torch.equal(saved[name.replace(".default", "")], factor), name


def assert_no_frozen_base(folder: Path) -> None:
    """No file under the folder holds the first values of any random base weight, in fp32 or bf16.

    safetensors, torch.save and DCP all store tensors uncompressed, so the bytes would be found.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            held = [name for name, forms in _base_bytes().items() if any(form in content for form in forms)]
            assert not held, f"{path} holds {held}"


@functools.lru_cache
def _base_bytes() -> dict[str, tuple[bytes, bytes]]:
    weights = synthetic_workload(steps=1).base_weights
    samples = {name: weight.flatten()[:16].contiguous() for name, weight in weights.items() if "norm" not in name}
    return {
        name: (sample.numpy().tobytes(), sample.bfloat16().view(torch.int16).numpy().tobytes())
        for name, sample in samples.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_for_the_base_finds_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """`assert_no_frozen_base` fails on a file that holds one frozen weight: its passing elsewhere means something."""
    weights = synthetic_workload(steps=1).base_weights
    torch.save({"x": weights["lm_head.weight"].to(dtype)}, tmp_path / "state.pt")
    with pytest.raises(AssertionError, match="lm_head"):
        assert_no_frozen_base(tmp_path)


def _other_numbers_of_ranks() -> Iterator[Any]:
    default = {("fsdp2", 2, 3), ("zero3", 4, 2), ("zero3-two-groups", 2, 3), ("zero2", 2, 3)}
    for name in ("fsdp2", "fsdp2-offload", "ddp", *ZERO):
        for index, (before, after) in enumerate(((2, 3), (4, 2))):
            marks = [] if (name, before, after) in default else [pytest.mark.all_ranks]
            method = ("reflora", "reflora-s")[index]
            yield pytest.param(name, method, before, after, marks=marks, id=f"{name}-{method}-{before}to{after}")


@pytest.mark.parametrize(("engine_name", "method", "before", "after"), _other_numbers_of_ranks())
def test_training_resumes_on_another_number_of_ranks(
    engine_name: str, method: str, before: int, after: int, tmp_path: Path
) -> None:
    """FSDP2 and DDP load as it is; DeepSpeed refuses and names the conversion, after which it loads too.

    The factors loaded are exactly those saved, and training goes on to the end of the uninterrupted run.
    """
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(_train_and_save, before, engine_name, method, folder)[0]
    universal = engine_name in ZERO
    if universal:
        with pytest.raises(RuntimeError, match=rf"written by {before} ranks .*ds_to_universal .*load_universal"):
            run_ranks(_resume, after, engine_name, method, folder)
        with pytest.raises(RuntimeError, match="holds no universal checkpoint"):
            run_ranks(_resume, after, engine_name, method, folder, SAVED_AT, True)
        _convert(tmp_path / "checkpoint")
        assert_no_frozen_base(tmp_path / "checkpoint")
    resumed = run_ranks(_resume, after, engine_name, method, folder, SAVED_AT, universal)
    tolerance = BF16_TOLERANCE if "bf16" in engine_name else OTHER_RANKS_TOLERANCE
    for outcome in resumed:
        assert worst_factor_error(outcome.at_checkpoint, _as_float(expected.at_checkpoint)) == 0.0
        assert worst_factor_error(outcome.factors, _as_float(expected.factors)) <= tolerance
        assert worst_loss_error(outcome.losses, expected.losses) <= tolerance
        assert outcome.handle == expected.handle


def _convert(folder: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = ["--input_folder", str(folder / "state"), "--output_folder", str(folder / "state_universal")]
    subprocess.run([*command, *folders], check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def _as_float(factors: Factors) -> Factors:
    return {name: factor.float() for name, factor in factors.items()}


# --- what is refused ---


@pytest.fixture(scope="module")
def ddp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp") / "checkpoint"
    run_ranks(_train_and_save, 2, "ddp", "reflora", str(folder))
    return folder


def _without_record(folder: Path) -> None:
    (folder / "reflora.json").unlink()


def _half_record(folder: Path) -> None:
    text = (folder / "reflora.json").read_text()
    (folder / "reflora.json").write_text(text[: len(text) // 2])


def _without_file(folder: Path) -> None:
    next((folder / "state").glob("*.distcp")).unlink()


def _half_file(folder: Path) -> None:
    file = next((folder / "state").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def _other_version(folder: Path) -> None:
    record = json.loads((folder / "reflora.json").read_text())
    (folder / "reflora.json").write_text(json.dumps({**record, "version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_record, "no complete checkpoint: reflora.json"),
        (_half_record, "reflora.json is damaged"),
        (_without_file, "distcp is missing"),
        (_half_file, "has 1000 bytes instead of"),
        (_other_version, "version=99"),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank(
    damage: Any, message: str, ddp_checkpoint: Path, tmp_path: Path
) -> None:
    """A save that was killed, a lost and a truncated file each end in an error that names the file, not in a hang."""
    folder = shutil.copytree(ddp_checkpoint, tmp_path / "checkpoint")
    damage(folder)
    assert [message in text for text in run_ranks(_error_of_loading, 2, "ddp", str(folder))] == [True, True]


def test_another_engine_is_refused(ddp_checkpoint: Path, tmp_path: Path) -> None:
    """The error names both engines; one process counts as DDP, since both hold everything whole."""
    for text in run_ranks(_error_of_loading, 2, "fsdp2", str(ddp_checkpoint)):
        assert "written under ddp and this is fsdp2" in text
    outcome = run_ranks(_resume, 1, "single", "reflora", str(ddp_checkpoint))[0]
    assert outcome.handle["steps"] == STEPS


def test_fsdp1_refuses_another_number_of_ranks(tmp_path: Path) -> None:
    """FSDP1 cannot redistribute its flat parameters; the error says so and what to do."""
    folder = str(tmp_path / "checkpoint")
    run_ranks(_train_and_save, 2, "fsdp1-full", "reflora", folder)
    for text in run_ranks(_error_of_loading, 3, "fsdp1-full", folder):
        assert "written by 2 ranks and this run has 3, which fsdp1 cannot load: use 2 ranks" in text


def _error_of_loading(rank: int, world_size: int, engine_name: str, folder: str) -> str:
    _, wrapped = _wrap(engine_name, world_size)
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as caught:
        load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    return str(caught.value)


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Rank 0's error reaches the ranks that write nothing; they would wait for it in the next collective."""
    (tmp_path / "file").write_text("")
    texts = run_ranks(_error_of_saving, 2, "fsdp2", str(tmp_path / "file" / "folder"))
    assert "Not a directory" in texts[0]
    assert "failed on rank 0: NotADirectoryError" in texts[1]


def _error_of_saving(rank: int, world_size: int, engine_name: str, folder: str) -> str:
    _, wrapped = _wrap(engine_name, world_size)
    with pytest.raises((OSError, RuntimeError)) as caught:
        save_adapter(wrapped.model, folder)
    return str(caught.value)


# --- what PEFT counts to an adapter ---

_VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "bias": {"target_modules": ["q_proj", "gate_proj"], "bias": "lora_only"},
}


def _variant_cases() -> Iterator[Any]:
    default = {
        ("zero3-persist-none", "dora"),
        ("fsdp1-full", "modules-to-save"),
        ("fsdp2", "embedding"),
        ("zero3", "modules-to-save"),
        ("fsdp1-flat", "dora"),
    }
    for name in ("ddp", "fsdp2", "fsdp1-full", "fsdp1-flat", "zero2", "zero3", "zero3-persist-none"):
        for variant in (*_VARIANTS, "two-adapters"):
            if name == "fsdp1-flat" and variant in ("embedding", "modules-to-save"):
                continue  # PEFT's wrap policy gives frozen and trained parameters one unit there, torch refuses it
            marks = [] if (name, variant) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, variant, marks=marks, id=f"{name}-{variant}")


@pytest.mark.parametrize(("engine_name", "variant"), _variant_cases())
def test_saved_adapter_is_byte_for_byte_what_peft_writes(engine_name: str, variant: str, tmp_path: Path) -> None:
    """The files of a wrapped model, saved before and after a step, equal those that PEFT writes for the same model
    in one process, and `PeftModel.from_pretrained` computes the same logits from them.
    """
    expected = _variant_model(variant)
    expected.save_pretrained(tmp_path / "expected", save_embedding_layers=False)
    run_ranks(_save_variant, 2, engine_name, variant, str(tmp_path))
    files = sorted(path.relative_to(tmp_path / "expected") for path in (tmp_path / "expected").rglob("adapter_*"))
    assert len(files) == (4 if variant == "two-adapters" else 2)
    for file in files:
        assert _comparable(tmp_path / "before" / file) == _comparable(tmp_path / "expected" / file), file
    assert not list((tmp_path / "before").rglob(".adapter-*"))
    loaded = PeftModel.from_pretrained(_variant_base(), tmp_path / "after").eval()
    reference = load_file(tmp_path / "after.safetensors")["logits"]
    with torch.no_grad():
        logits = loaded(input_ids=synthetic_workload(steps=1).batches[0][:2]).logits
    # the distributed forward may use another kernel; a stale or missing parameter moves logits by 1e-2
    assert torch.allclose(logits, reference, atol=1e-5)


def _comparable(file: Path) -> Any:
    """The bytes; of the configuration its content, since PEFT writes sets in the order of their hashes."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}


def _variant_base() -> LlamaForCausalLM:
    workload = synthetic_workload(steps=1)
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    base.load_state_dict(workload.base_weights)
    return base


def _variant_model(variant: str) -> PeftModel:
    torch.manual_seed(0)
    lora = {**synthetic_workload(steps=1).lora, **_VARIANTS.get(variant, {})}
    model = get_peft_model(_variant_base(), LoraConfig(**lora))
    if variant == "two-adapters":
        model.add_adapter("other", LoraConfig(**{**lora, "r": 4}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def _save_variant(rank: int, world_size: int, engine_name: str, variant: str, folder: str) -> None:
    from safetensors.torch import save_file

    workload = synthetic_workload(steps=1)
    wrapped = _wrap_variant(engine_name, _variant_model(variant), world_size)
    save_adapter(wrapped.model, f"{folder}/before")
    _train_on(wrapped, workload.batches[0])
    save_adapter(wrapped.model, f"{folder}/after")
    wrapped.model.eval()
    with torch.no_grad():
        logits: Tensor = wrapped.model(input_ids=workload.batches[0][:2]).logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, f"{folder}/after.safetensors")


def _wrap_variant(engine_name: str, model: PeftModel, world_size: int) -> Wrapped:
    """As the engine under test, which asserts that nothing but factors is trained."""
    workload = synthetic_workload(steps=1)
    settings = workload.settings
    model.train()
    if engine_name == "ddp":
        ddp = DistributedDataParallel(model)
        return Wrapped(ddp, adamw(ddp, settings), settings)
    if engine_name == "fsdp2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        return Wrapped(model, adamw(model, settings), settings)
    if engine_name.startswith("fsdp1"):
        flat = engine_name == "fsdp1-flat"
        policy = fsdp_auto_wrap_policy(model) if flat else ModuleWrapPolicy({LlamaDecoderLayer})
        options: dict[str, Any] = {"use_orig_params": not flat, "device_id": torch.device("cpu")}
        fsdp1 = FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
        return Wrapped(fsdp1, adamw(fsdp1, settings), settings)
    stage = int(engine_name[4])
    more = {"stage3_param_persistence_threshold": 0} if engine_name.endswith("persist-none") else {}
    config = zero_config(settings, workload.batches.shape[1] // world_size, stage, **more)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model, settings), config=config)
    return Zero(engine, optimizer, settings)


@pytest.mark.parametrize(
    ("engine_name", "bare"),
    [
        ("zero3-persist-none", True),
        ("fsdp1-full", False),
        *(
            pytest.param(*case, marks=pytest.mark.all_ranks)
            for case in (
                ("single", False),
                ("ddp", True),
                ("fsdp2", False),
                ("fsdp2-hsdp-shard1", False),
                ("fsdp1-flat", False),
                ("zero1-bf16", False),
                ("zero2", True),
                ("zero2-round-robin", False),
                ("zero3", False),
            )
        ),
    ],
)
def test_an_adapter_loaded_into_a_running_engine_is_trained_on(engine_name: str, bare: bool, tmp_path: Path) -> None:
    """After two steps the adapter of before is loaded; a step of learning rate zero leaves it: also the masters
    that the engine updates were replaced, or the step would bring the old factors back.
    """
    world_size = ENGINES[engine_name].world_sizes[0]
    for first, moved, loaded, stepped in run_ranks(_load_again, world_size, engine_name, str(tmp_path / "a"), bare):
        assert worst_factor_error(moved, first) > 1e-3
        assert worst_factor_error(loaded, first) == 0.0
        assert worst_factor_error(stepped, first) == 0.0


def _load_again(rank: int, world_size: int, engine_name: str, folder: str, bare: bool) -> tuple[Factors, ...]:
    workload, wrapped = _wrap(engine_name, world_size)
    model = wrapped.bare if bare else wrapped.model
    save_adapter(model, folder)
    first = _as_float(wrapped.factors())
    for batch in workload.batches[:2]:
        _train_on(wrapped, batch)
    moved = _as_float(wrapped.factors())
    load_adapter(model, wrapped.optimizer, folder)
    loaded = _as_float(wrapped.factors())
    for group in wrapped.optimizer.param_groups:
        group["lr"] = 0.0
    _train_on(wrapped, workload.batches[2])
    return first, moved, loaded, _as_float(wrapped.factors())


# --- killed ---


@pytest.mark.parametrize("engine_name", ["zero3", "fsdp2"])
def test_a_killed_run_resumes_from_its_last_complete_checkpoint(engine_name: str, tmp_path: Path) -> None:
    """All ranks are ended by SIGKILL within a step, the second save half done; a new launch takes the first
    checkpoint, refuses the half one and ends bit-equal to the run that was not killed.
    """
    folder = str(tmp_path / "complete")
    expected = run_ranks(_train_and_save, 2, engine_name, "reflora", folder)
    with pytest.raises(RuntimeError, match="exit codes"):
        run_ranks(_train_until_killed, 2, engine_name, str(tmp_path))
    assert not (tmp_path / "step4" / "reflora.json").exists()
    for text in run_ranks(_error_of_loading, 2, engine_name, str(tmp_path / "step4")):
        assert "no complete checkpoint" in text
    for resumed, outcome in zip(
        run_ranks(_resume, 2, engine_name, "reflora", str(tmp_path / "step3")), expected, strict=True
    ):
        assert resumed.losses == outcome.losses
        assert worst_factor_error(resumed.factors, outcome.factors) == 0.0


def _train_until_killed(rank: int, world_size: int, engine_name: str, folder: str) -> None:
    import reflora_dist.checkpoint as checkpoint

    workload, wrapped = _wrap(engine_name, world_size)
    handle = attach(wrapped.model, wrapped.optimizer, _config("reflora"))
    for step, batch in enumerate(workload.batches):
        if step == SAVED_AT:
            save_checkpoint(f"{folder}/step{step}", wrapped.model, wrapped.optimizer, handle)
        if step == SAVED_AT + 1:
            checkpoint._write_record = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
            save_checkpoint(f"{folder}/step{step}", wrapped.model, wrapped.optimizer, handle)
            os.kill(os.getpid(), signal.SIGKILL)
        _train_on(wrapped, batch)
