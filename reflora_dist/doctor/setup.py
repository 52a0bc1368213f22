"""The engine and settings that follow from configuration files and options."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Setup:
    """An engine with the settings that determine memory and traffic.

    Attributes:
        engine: name of the engine, as in ``Report.engine``.
        world_size, num_nodes: ranks and machines of the job.
        shard_size: ranks that together hold one copy of every parameter.
        precision: "no", "bf16" or "fp16".
        micro_batch_size: sequences per rank and backward pass.
        accumulation: backward passes per optimizer step.
        activation_checkpointing: whether backward recomputes the layers.
        reshard_after_forward: FSDP: whether gathered parameters are freed after the forward.
        offload_optimizer, offload_params: whether these are offloaded to host memory.
        persistence_threshold, model_persistence_threshold: ZeRO-3: largest number of elements of a parameter that stays
            whole on every rank, and of all such parameters together.
        secondary_size: ZeRO++: number of ranks that share a second copy, from which backward gathers; 1 if none.
        bucket_elements: DeepSpeed: total elements of its reduction buffers.
        max_live_elements: ZeRO-3: largest number of gathered elements at a time.
        sub_group_elements: ZeRO-3: this rank's elements that the optimizer updates at a time; 0 for all.
        round_robin: ZeRO-1/2: whether the order of parameters is round-robin over the ranks.
        alignment: ZeRO-1/2: parameters are padded to a multiple of this many elements.
        class_names: FSDP: class names of the modules to wrap by the file; empty for the model's own choice.
        moments: state tensors of a factor's size that the optimizer in DeepSpeed's file keeps; None if it names none.
        tall_adapters: whether lora_A of linear layers is stored ``[in, r]``.
        half_gradients: DeepSpeed: whether masters and their gradients are float16.
    """

    engine: str
    world_size: int
    num_nodes: int = 1
    shard_size: int = 1
    precision: str = "bf16"
    micro_batch_size: int = 1
    accumulation: int = 1
    activation_checkpointing: bool = False
    reshard_after_forward: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    persistence_threshold: int = 0
    model_persistence_threshold: int = 0
    secondary_size: int = 1
    bucket_elements: int = 0
    max_live_elements: int = 0
    sub_group_elements: int = 0
    round_robin: bool = False
    alignment: int = 1
    class_names: list[str] = dataclasses.field(default_factory=list)
    moments: int | None = None
    tall_adapters: bool = False
    half_gradients: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed holds fp32 masters beside the model's weights."""
        return self.engine.startswith("zero")

    @property
    def whole(self) -> bool:
        """Whether every rank holds whole factors."""
        return self.engine in ("single", "ddp") or (self.engine == "fsdp1" and self.shard_size == 1)

    @property
    def replicas(self) -> int:
        """Number of copies of every shard."""
        return self.world_size // self.shard_size

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.world_size // self.num_nodes)
