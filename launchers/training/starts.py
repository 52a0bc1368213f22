"""The adapter's start (``--init_lora_weights``), in a new run and in a resumed one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, preprocess_loraga
from peft.tuners.lora import LoraGAConfig
from transformers.integrations import deepspeed as deepspeed_integration

from reflora_dist import initialize_adapters, replay_initialization
from reflora_dist.checkpoints.start_file import init_of_mark, saved_mark, write_start
from reflora_dist.collectives.ranks import is_first_rank, raise_on_all_ranks
from reflora_dist.engines.pairs import find_pairs

from ..cluster.waiting import working_first
from .options import PEFT_STARTS, Options


def start_adapter(model: Any, load_base: Any, data: Any, collator: Any, options: Options, checkpoint: Any) -> None:
    """Initialize the adapter, or repeat the change of the base of a checkpoint's run; every rank must call.

    Args:
        model: the PEFT model, not wrapped yet; under ZeRO-3 its base may have been built under ``zero.Init``.
        load_base: returns a further copy of the base.
        data: the training examples, for LoRA-GA.
        collator: makes a batch of examples.
        options: the run's options.
        checkpoint: the folder to resume from, or None.

    Raises:
        ValueError, RuntimeError: on every rank; the start does not fit the model or the checkpoint.
    """
    init = options.lora.init_lora_weights
    try:
        if checkpoint is not None:
            _require_the_checkpoints(init, checkpoint)
            replay_initialization(model, checkpoint)
        elif init not in PEFT_STARTS:
            lora_ga_config = LoraGAConfig() if init == "lora_ga" else None
            if lora_ga_config is not None:
                estimating = "estimating LoRA-GA's gradient"
                with raise_on_all_ranks(estimating), working_first(is_first_rank(), estimating):
                    if is_first_rank():
                        _estimate_gradients(model, load_base, data, collator, options, lora_ga_config)
            initialize_adapters(model, init, lora_ga_config=lora_ga_config)
        # into the run's folder; checkpoints hold copies, and this one is read if a copy is lost
        write_start(model, options.training.output_dir)
    except OSError as error:
        raise ValueError(str(error)) from error


def _require_the_checkpoints(init: str, checkpoint: str) -> None:
    """Refuse another start than the checkpoint's, because factors are loaded and not drawn again."""
    mark = saved_mark(checkpoint)
    saved = init_of_mark(mark) if mark is not None else None
    if saved != (init if init not in PEFT_STARTS else None):
        raise ValueError(
            f"init_lora_weights={init!r} does not fit {checkpoint}, whose run started with "
            f"{saved or 'a start that leaves the base alone'}: give --init_lora_weights {saved or 'default'}"
        )


def _estimate_gradients(
    model: Any, load_base: Any, data: Any, collator: Any, options: Options, lora_ga_config: LoraGAConfig
) -> None:
    """Estimate every adapted weight's gradient from the first batches, and leave it on the layers for PEFT.

    The backward pass needs whole weights, so it runs in one process on a further copy of the base.
    """
    training = options.training
    layers = {pair.name.removesuffix(".default"): pair.layer for pair in find_pairs(model)}
    names = [name.removeprefix("base_model.model.") for name in layers]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(training.seed)).tolist()
    size = training.per_device_train_batch_size
    batches = [order[i * size : (i + 1) * size] for i in range(options.lora.lora_ga_batches)]
    with _outside_zero_init(), torch.random.fork_rng():
        base = load_base().to(training.device)
    base.config.get_text_config().use_cache = False  # with a cache packed examples would see each other

    def accumulate() -> None:
        for indices in batches:
            if indices:
                batch = collator([data[i] for i in indices])
                base(**{key: value.to(training.device) for key, value in batch.items()}).loss.backward()

    config = LoraConfig(
        target_modules=names,
        init_lora_weights="lora_ga",  # type: ignore[arg-type]  # missing in PEFT's annotation
        lora_ga_config=lora_ga_config,
    )
    with torch.random.fork_rng():
        preprocess_loraga(base, config, accumulate)
    for name, layer in zip(names, layers.values(), strict=True):
        source = base.get_submodule(name)
        layer.get_base_layer()._peft_loraga_grad = source._peft_loraga_grad.to("cpu")
        del source._peft_loraga_grad


@contextlib.contextmanager
def _outside_zero_init() -> Iterator[None]:
    """Make transformers load a whole model under ZeRO-3, instead of a partition on each rank."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference
