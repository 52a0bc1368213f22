"""Check of FSDP's settings in accelerate's configuration."""

from __future__ import annotations

from typing import Any

from .findings import SHARED_SEQUENCES, Findings
from .setup import Setup
from .values import count, truth

_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}
# FSDP2's equivalents of FSDP1's sharding strategies.
_FSDP2_STRATEGIES = {
    "SHARD_GRAD_OP": "fsdp_reshard_after_forward: false",
    "NO_SHARD": "distributed_type: MULTI_GPU",
    "HYBRID_SHARD": "parallelism_config with dp_replicate_size and dp_shard_size",
    "HYBRID_SHARD_ZERO2": "parallelism_config with both sizes, and fsdp_reshard_after_forward: false",
}
_REFUSED_PARALLELISM = {
    "tp": "tensor parallelism is not supported",
    "sp": "sequence parallelism is DeepSpeed's (Ulysses), and FSDP has none",
}


def _strategy(arguments: Any) -> str:
    strategy = str(arguments.fsdp_sharding_strategy or "FULL_SHARD").upper()
    return _STRATEGIES.get(strategy, strategy)


def _class_names(arguments: Any) -> list[str]:
    named = arguments.fsdp_transformer_layer_cls_to_wrap
    return str(named).split(",") if named else []


def fsdp1(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    """Fill in FSDP1's settings. Trainer always uses PEFT's wrapping policy, not the file's."""
    strategy = _strategy(arguments)
    setup.class_names = [name for name in _class_names(arguments) if name]  # PEFT's policy skips empty names
    setup.shard_size = setup.world_size
    if strategy.startswith(("HYBRID", "_HYBRID")):
        setup.shard_size = setup.ranks_per_node
    if strategy == "NO_SHARD":
        setup.shard_size = 1
    setup.reshard_after_forward = strategy in ("FULL_SHARD", "HYBRID_SHARD")
    original = truth(arguments.fsdp_use_orig_params)
    if strategy == "NO_SHARD" and not original:
        findings.error(path, "NO_SHARD without fsdp_use_orig_params: attach refuses it", "fsdp_use_orig_params: true")
    if setup.offload_params:
        findings.warning(path, "FSDP1 with fsdp_offload_params is not tested", "use FSDP2")


def fsdp2(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    """Fill in FSDP2's settings."""
    reshard = arguments.fsdp_reshard_after_forward
    setup.reshard_after_forward = reshard is None or str(reshard).lower() not in ("false", "0", "no")
    setup.shard_size = setup.world_size
    strategy = _strategy(arguments)
    if strategy != "FULL_SHARD":
        findings.warning(
            path,
            f"fsdp_sharding_strategy: {strategy} has no effect: accelerate reads it for fsdp_version 1 only",
            _FSDP2_STRATEGIES.get(strategy, "remove it"),
        )
    _wrap(path, arguments, setup, findings)
    if getattr(arguments, "use_parallelism_config", False):
        _mesh(path, arguments, setup, findings)


def _wrap(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    """Fill in which modules are gathered together.

    Without a policy all layers belong to the root unit, which stays gathered until the backward.
    """
    policy = str(arguments.fsdp_auto_wrap_policy or "NO_WRAP").upper()
    remedy = "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
    if policy == "TRANSFORMER_BASED_WRAP":
        setup.class_names = _class_names(arguments)
    elif policy == "SIZE_BASED_WRAP":
        findings.error(
            path,
            f"fsdp_auto_wrap_policy: {policy}: FSDP2 cannot wrap a list of layers, which accelerate passes to it",
            remedy,
        )
    else:
        setup.reshard_after_forward = False
        findings.warning(
            path,
            "FSDP2 without fsdp_auto_wrap_policy (NO_WRAP): layers are no units, so every rank gathers the whole model",
            remedy,
        )
        if truth(arguments.fsdp_activation_checkpointing):
            findings.error(
                path, "fsdp_activation_checkpointing without fsdp_auto_wrap_policy: accelerate fails on it", remedy
            )


def _mesh(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    sizes = {
        name: count(path, vars(arguments), f"parallelism_config_{name}_size", findings) or 1
        for name in ("dp_replicate", "dp_shard", "cp", *_REFUSED_PARALLELISM)
    }
    for name, why in _REFUSED_PARALLELISM.items():
        if sizes[name] > 1:
            findings.error(path, f"parallelism_config_{name}_size={sizes[name]}: {why}", "leave it out, or set 1")
    shards = sizes["dp_shard"] * sizes["cp"]  # FSDP2 shards over the ranks of a sequence too
    own = max(1, setup.ranks_per_node // sizes["cp"])
    if shards == 1 and setup.world_size > 1:
        findings.error(
            path,
            "dp_shard_size is 1, which leaves FSDP nothing to shard across: accelerate refuses it",
            "a dp_shard_size above 1, or distributed_type: MULTI_GPU",
        )
        return
    total = sizes["dp_replicate"] * shards
    if total != setup.world_size:
        of_sequences = f" x cp_size {sizes['cp']}" if sizes["cp"] > 1 else ""
        findings.error(
            path,
            f"dp_replicate_size {sizes['dp_replicate']} x dp_shard_size {sizes['dp_shard']}{of_sequences} is {total}, "
            f"but there are {setup.world_size} ranks",
            f"dp_shard_size: the ranks of a machine{' by cp_size' if sizes['cp'] > 1 else ''}, {own}; "
            f"dp_replicate_size: the machines, {setup.num_nodes}; or --world_size {total}",
        )
        return
    if sizes["cp"] > 1:
        findings.note(
            path,
            SHARED_SEQUENCES.format(f"parallelism_config_cp_size={sizes['cp']}"),
            "it needs attn_implementation: sdpa and CUDA devices",
        )
    if sizes["dp_replicate"] > 1:
        setup.shard_size = shards
        if setup.ranks_per_node % shards:
            findings.warning(
                path,
                f"copies of {shards} ranks do not divide the {setup.ranks_per_node} ranks of a machine: "
                "parameters are gathered between machines",
                f"dp_shard_size: {own}",
            )
