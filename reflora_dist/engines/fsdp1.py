"""The engine of FSDP1, where parameters are pieces of a unit's flat parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..collectives.tiling import Layout
from .base import Engine
from .fsdp1_flat import flat_parameter_engine, positions
from .pairs import AdapterPair
from .parameters import ParameterEngine
from .replicated import ReplicatedEngine, require_fsdp1


class FSDP1Engine(ParameterEngine):
    """The engine of ``FullyShardedDataParallel(use_orig_params=True)``: factors are pieces of the rank's flat shards.

    Args:
        pairs: the model's adapters.
        optimizer: the torch optimizer that holds the factors.
        units: every FSDP module of the model.
        group: the ranks over which the units shard.

    Raises:
        ValueError: the optimizer does not hold the factors, or this rank's pieces have other sizes than FSDP's shards.
    """

    name = "fsdp1"

    def __init__(
        self,
        pairs: Sequence[AdapterPair],
        optimizer: torch.optim.Optimizer,
        units: Sequence[FullyShardedDataParallel],
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(pairs, optimizer)
        self.group = group
        flats = [unit._handle.flat_param for unit in units if unit._handle is not None]
        places = {key: (flat, position) for flat in flats for key, (position, _) in positions(flat).items()}
        self._layouts = []
        for factor, (module, name) in enumerate(self._owners):
            flat, position = places[id(getattr(module, "_fsdp_wrapped_module", module)), name]
            whole = self.pairs[factor // 2].whole(factor % 2)
            self._layouts.append(whole._replace(chunk=flat._sharded_size.numel(), offset=position))
        self.layout = "flat" if any(layout.columns for layout in self._layouts) else "tall"
        self._check_pieces()

    def require_wrapped(self, model: nn.Module) -> None:
        require_fsdp1(model)

    def layouts(self) -> list[Layout]:
        return self._layouts


def recognize(model: nn.Module, optimizer: Any, pairs: Sequence[AdapterPair]) -> Engine | None:
    """Return the engine if FSDP1 has wrapped modules of the model, else None.

    Raises:
        ValueError: the FSDP modules hold no parameters, or an option is not supported.
    """
    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    if not units:
        return None
    wrapped = [pair.name for pair in pairs if pair.of_a_parameter]
    if wrapped:
        raise ValueError(
            f"{wrapped[0]} adapts a parameter (target_parameters), which PEFT's forward cannot do under FSDP1, not "
            "even with plain LoRA: autograd refuses its change of a view of FSDP1's buffer; use FSDP2 (fully_shard)"
        )
    groups = {id(unit.process_group): unit.process_group for unit in units if unit._handle is not None}
    sharded = any(unit._handle is not None and unit._handle.uses_sharded_strategy for unit in units)
    if sharded and len({tuple(dist.get_process_group_ranks(group)) for group in groups.values()}) > 1:
        raise ValueError("FSDP modules of this model shard over different process groups; use one for all")
    group = next(iter(groups.values()), None)
    if group is None:
        raise ValueError("the FSDP modules hold no parameters: pass the model that FSDP wrapped")
    if not sharded and not all(unit._use_orig_params for unit in units):
        raise ValueError("FSDP NO_SHARD with use_orig_params=False is not supported; set use_orig_params=True")
    engine: Engine
    if not sharded:
        engine = ReplicatedEngine(pairs, optimizer, "fsdp1")
    elif all(unit._use_orig_params for unit in units):
        engine = FSDP1Engine(pairs, optimizer, units, group)
    else:
        engine = flat_parameter_engine(pairs, optimizer, units, group)
    if sharded:
        engine.replicas = getattr(units[0], "_inter_node_pg", None)  # HYBRID_SHARD
    engine.reduces_gradients_to_half = any(
        unit._handle is not None
        and unit._handle._keep_low_precision_grads
        and unit._handle._fwd_bwd_param_dtype == torch.float16
        for unit in units
    )
    return engine
