"""Check of ZeRO's options and of other kinds of parallelism in DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from ..checkpoints.deepspeed_universal import is_round_robin
from .findings import SHARED_SEQUENCES, Findings
from .values import count


def check_zero(where: str, filled: dict[str, Any], loaded: Any, size: tuple[int, int], findings: Findings) -> None:
    """Find settings that attach refuses, that have no effect, or that do not fit the ranks.

    Args:
        where: the file, for findings.
        filled: its contents.
        loaded: the ``DeepSpeedConfig`` that was made from them.
        size: numbers of ranks and machines.
        findings: receives the problems.
    """
    zero, stage = loaded.zero_config, loaded.zero_optimization_stage
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        if section is not None and section.device == "nvme":
            findings.error(
                where, f"{name}.device='nvme': attach refuses it, the masters are not in memory", "use 'cpu'"
            )
    if zero.offload_optimizer is not None and zero.offload_optimizer.ratio < 1:
        ratio = zero.offload_optimizer.ratio
        findings.error(where, f"offload_optimizer.ratio={ratio}: attach refuses two optimizers in a step", "set 1.0")
    if zero.zenflow is not None:
        findings.error(where, "zenflow: attach refuses it, it updates outside the optimizer's step", "remove it")
    if loaded.load_universal_checkpoint and is_round_robin(stage, bool(zero.round_robin_gradients)):
        findings.error(
            where,
            "checkpoint.load_universal with round_robin_gradients: DeepSpeed mixes up the parameters as it loads them",
            "remove round_robin_gradients",
        )
    if zero.offload_param is not None and zero.offload_param.device != "none" and stage != 3:
        findings.warning(where, f"offload_param means nothing to stage {stage}", "remove it, or set stage 3")
    _check_hierarchy(where, zero, stage, size, findings)
    _check_parallelism(where, filled, loaded, size[0], findings)
    if zero.zero_quantized_weights or zero.zero_quantized_gradients or zero.zero_quantized_nontrainable_weights:
        findings.warning(where, "zero_quantized_*: needs CUDA kernels that DeepSpeed compiles, and rounds", "")
    masters = (
        loaded.bfloat16_config.bf16_master_weights_and_grads or loaded.float16_config.fp16_master_weights_and_grads
    )
    if masters:
        findings.warning(where, "16-bit masters: the sizes below assume fp32 ones", "remove *_master_weights_and_grads")


def _check_hierarchy(where: str, zero: Any, stage: int, size: tuple[int, int], findings: Findings) -> None:
    secondary = zero.zero_hpz_partition_size
    if secondary <= 1:
        return
    world_size, num_nodes = size
    if stage != 3:
        findings.warning(where, f"zero_hpz_partition_size={secondary} means nothing to stage {stage}", "set stage 3")
    elif world_size % secondary or secondary > world_size:
        findings.error(
            where,
            f"zero_hpz_partition_size={secondary} does not divide the {world_size} ranks",
            f"set the ranks of a machine, {max(1, world_size // num_nodes)}",
        )
    elif secondary != world_size // num_nodes:
        findings.warning(
            where,
            f"zero_hpz_partition_size={secondary}, but a machine has {world_size // num_nodes} ranks: the second copy "
            "pays where it lies within one",
            f"set {world_size // num_nodes}",
        )


def _check_parallelism(where: str, filled: dict[str, Any], loaded: Any, ranks: int, findings: Findings) -> None:
    tensor = loaded.tensor_parallel_config.autotp_size
    if tensor > 1:
        findings.error(where, f"tensor_parallel.autotp_size={tensor}: attach refuses tensor parallelism", "remove it")
    sequence = count(where, filled, "sequence_parallel_size", findings)
    data = count(where, filled, "data_parallel_size", findings)
    if sequence is None:
        return
    if ranks % max(1, sequence) or (data is not None and data * sequence != ranks):
        of_data = "" if data is None else f"data_parallel_size={data} x "
        findings.error(
            where, f"{of_data}sequence_parallel_size={sequence}, but there are {ranks} ranks", "remove it, or set 1"
        )
    elif sequence > 1:
        findings.note(
            where,
            SHARED_SEQUENCES.format(f"sequence_parallel_size={sequence}"),
            "give deepspeed.initialize the mpu of UlyssesSPAttentionHF.register_with_transformers",
        )
