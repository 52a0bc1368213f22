"""Models whose start changed their base, under every engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import RefLoRAConfig, initialize_adapters, replay_initialization
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import Wrapped
from tests.support.engines_under_test.zero import zero_config
from tests.support.workloads import Factors, synthetic_workload

STEPS = 4
# k_proj and v_proj are 32 x 64: LoRA-GA takes 2 r = 16 singular vectors
WORKLOAD = synthetic_workload(steps=STEPS)
METHOD = RefLoRAConfig(method="reflora", warmup_steps=0)
# logits of magnitude 1 from weights rounded once more; a base that is not changed back is off by 0.3 and more
LOGIT_TOLERANCE = 5e-6


def base_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    base: Any = LlamaForCausalLM(LlamaConfig(**WORKLOAD.llama))
    base.load_state_dict(WORKLOAD.base_weights)
    base.config.use_cache = False
    return base.to(dtype)


def logits_of(model: Any) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=WORKLOAD.batches[0][:2]).logits.float()
    model.train(training)
    return logits.clone()


def leave_gradients(model: PeftModel) -> None:
    """What PEFT's preprocess_loraga leaves, computed on a copy of the base in one process."""
    base = base_model()
    base(input_ids=WORKLOAD.batches[0], labels=WORKLOAD.batches[0]).loss.backward()
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            layer.get_base_layer()._peft_loraga_grad = base.get_submodule(name).weight.grad


def build_started(
    engine_name: str, init: str, world_size: int, checkpoint: str | None, rank: int
) -> tuple[Wrapped, Factors]:
    """The wrapped model with its start made, or repeated. Ranks have different seeds, which nothing may show."""
    engine = ENGINES[engine_name]
    torch.manual_seed(100 + rank)
    base = base_model(engine.model_dtype)
    if engine_name.startswith("zero3"):
        config = zero_config(WORKLOAD.settings, 1, 3)
        deepspeed.zero.Init(module=base, config_dict_or_path=config)
        assert all(parameter.numel() == 0 for parameter in base.parameters())
    model = get_peft_model(base, LoraConfig(**WORKLOAD.lora))
    if checkpoint is not None:
        replay_initialization(model, checkpoint)
    else:
        if init == "lora_ga" and rank == 0:
            leave_gradients(model)
        initialize_adapters(model, init, lora_ga_config=LoraGAConfig() if init == "lora_ga" else None)
    initial = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    return engine.wrap(model, WORKLOAD.settings, WORKLOAD.batches.shape[1] // world_size), initial
