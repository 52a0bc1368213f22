"""initialize_lora_sb() and initialize_lora_xs(): initial A, B and R of every adapter, under any engine."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..checkpoints.adapter_files import write_weights
from ..collectives.communicator import Communicator
from ..collectives.ranks import raise_on_all_ranks
from ..engines.find_training import find_training_engine
from ..engines.pairs import clean_name, find_peft_model
from ..engines.whole_parameters import Owner, gather, owned_tensors, scatter
from .config import LoRASBConfig
from .gradients import Loss, mean_gradients, row_block
from .layer import LoraXSLinear
from .svd import truncated_svd

_LEAST_OVERSAMPLING = 16
_R_STD = 1e-5  # standard deviation of LoRA-XS's initial R, as published


@dataclasses.dataclass(frozen=True)
class _Target:
    """One active adapter, with its layer and the layer's name without wrapper segments."""

    name: str
    layer: LoraXSLinear
    adapter: str

    def key(self, side: str) -> str:
        return f"{self.name}.lora_xs_{side}.{self.adapter}.weight"


def initialize_lora_sb(
    model: nn.Module, optimizer: Any, batches: Iterable[Any], config: LoRASBConfig, *, loss: Loss | None = None
) -> None:
    """Initialize every adapter with the best rank-r approximation of the first full-fine-tuning step (LoRA-SB).

    Let ``U S V^T`` be the truncated SVD of ``-learning_rate * sign(G)``, with G the mean gradient at the pretrained
    weights. Then B = U, A = V^T, R = S / s (Ponkshe et al., 2024, arXiv 2411.19557). Gradients, optimizer state and
    random states do not change. Call it once, before training and before the optimizer has any state.

    Args:
        model: the PEFT model with LoraXSConfig adapters, bare or wrapped; under FSDP1 the model that FSDP returned.
        optimizer: the optimizer that the engine returned.
        batches: this rank's batches. The first ``config.num_batches`` are kept; each group of modules uses all of them.
        config: the settings, the same on all ranks.
        loss: ``loss(model, batch)``; by default ``model(**batch).loss``.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank; there is no such adapter, it is merged or disabled, there
            are too few batches, or a gradient has fewer than r nonzero singular values.

    Communication: every rank must call. For each group of modules:
        gradients: ``out * in`` float32 values per batch and module, and the engine's own in a forward and backward.
        SVD: per module ``power_iterations + 1`` all-reduces of ``in * (r + oversampling)`` float64 values, two small
            ones, and one of B, ``out * r``.
        result: A and B are brought to the engine's shards; R follows once, after all groups.
    """
    with raise_on_all_ranks("preparing LoRA-SB"):
        targets, owners = _prepare(model, optimizer)
        if config.learning_rate is None:
            raise ValueError(
                "learning_rate=None: give the first step's; with a linear warm-up this is peak / warm-up steps"
            )
        kept = list(itertools.islice(batches, config.num_batches))
        if len(kept) < config.num_batches:
            raise ValueError(f"num_batches={config.num_batches}, but there are only {len(kept)} on this rank")
    _require_equal(targets, config)
    comm = _communicator(model)
    # with R = 0 the model computes its base, so every group sees the gradient at the pretrained weights
    scatter(model, owners, {t.key("R"): torch.zeros(t.layer.r[t.adapter], t.layer.r[t.adapter]) for t in targets})
    latent = {}
    for group in _groups(targets, config.modules_per_pass):
        gradients = mean_gradients(model, [t.layer for t in group], kept, loss or _model_loss, comm)
        values: dict[str, Tensor] = {}
        for target in group:
            step = gradients.pop(0).sign_().mul_(-config.learning_rate)
            left, singular, right = _svd(target, step, config, comm)
            values |= {target.key("A"): right, target.key("B"): _whole(left, comm)}
            latent[target.key("R")] = torch.diag(singular / target.layer.scaling[target.adapter])
        scatter(model, owners, values)
    write_weights(model, optimizer, owners, latent)


def initialize_lora_xs(model: nn.Module, optimizer: Any, config: LoRASBConfig) -> None:
    """Initialize every adapter with the leading singular vectors of its pretrained weight (LoRA-XS).

    Let ``U S V^T`` be the truncated SVD of W. Then B = U and A = S V^T, as in the published code, and R is drawn from a
    normal distribution with standard deviation 1e-5 (Bałazy et al., 2024, arXiv 2405.17604).

    Under FSDP2 each rank uses the rows that it holds, and no weight is gathered. Under other engines weights are
    gathered one at a time (under FSDP1 one unit at a time), and each rank keeps a block of rows.

    Args:
        model, optimizer, config: as for :func:`initialize_lora_sb`.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank; there is no such adapter, it is merged or disabled, or a
            weight has fewer than r nonzero singular values.

    Communication: every rank must call. The gathers, the SVD's all-reduces as in :func:`initialize_lora_sb`, and the
    transfer of A, B and R to the engine's shards.
    """
    with raise_on_all_ranks("preparing LoRA-XS"):
        targets, owners = _prepare(model, optimizer)
    _require_equal(targets, config)
    generator = torch.Generator().manual_seed(config.seed)
    latent = {}
    for group in _groups(targets, config.modules_per_pass):
        values: dict[str, Tensor] = {}
        for target, rows, comm in _weights(model, owners, group):
            left, singular, right = _svd(target, rows, config, comm)
            values |= {target.key("A"): singular[:, None] * right, target.key("B"): _whole(left, comm)}
        scatter(model, owners, values)
        for target in group:
            r = target.layer.r[target.adapter]
            latent[target.key("R")] = _R_STD * torch.randn(r, r, generator=generator)
    write_weights(model, optimizer, owners, latent)


def _prepare(model: nn.Module, optimizer: Any) -> tuple[list[_Target], dict[str, Owner]]:
    find_training_engine(model, optimizer)  # raises for an unknown engine
    peft_model = find_peft_model(model)
    targets = []
    for path, module in peft_model.named_modules():
        if isinstance(module, LoraXSLinear):
            name = clean_name(path)
            if module.merged or module.disable_adapters:
                raise ValueError(f"{name} is merged or disabled: unmerge and enable the adapters first")
            active = [adapter for adapter in module.active_adapters if adapter in module.lora_xs_R]
            if len(active) > 1:
                raise ValueError(f"{name} has several active adapters {active}: activate the one to initialize")
            targets += [_Target(name, module, adapter) for adapter in active]
    if not targets:
        raise ValueError(
            f"no active LoRA-XS adapter found in {type(model).__name__}: wrap the model with "
            "peft.get_peft_model(model, LoraXSConfig(...))"
        )
    return targets, owned_tensors(model, peft_model)


def _require_equal(targets: Sequence[_Target], config: LoRASBConfig) -> None:
    """Refuse ranks that disagree: their collectives would hang, or sum values of different modules."""
    own = repr((config, [(t.name, t.adapter, t.layer.r[t.adapter]) for t in targets]))
    if dist.is_initialized() and dist.get_world_size() > 1:
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, own)
        differing = [rank for rank, other in enumerate(found) if other != found[0]]
        if differing:
            raise ValueError(f"ranks {differing} have another configuration or other adapters than rank 0")


def _groups(targets: Sequence[_Target], size: int | None) -> Iterator[list[_Target]]:
    """Split the adapters into consecutive groups; the gradients of one group are held at the same time."""
    if size is not None:
        for start in range(0, len(targets), size):
            yield list(targets[start : start + size])
        return
    for _, group in itertools.groupby(targets, lambda target: _block_of(target.name)):
        yield list(group)


def _block_of(name: str) -> str:
    """Return the numbered block of a module: ``model.layers.3`` for ``model.layers.3.self_attn.q_proj``.

    A module outside such blocks is a block of its own.
    """
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _communicator(model: nn.Module) -> Communicator:
    device = next(model.parameters()).device
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    return Communicator(dist.group.WORLD if distributed else None, device)


def _weights(
    model: nn.Module, owners: dict[str, Owner], group: Sequence[_Target]
) -> Iterator[tuple[_Target, Tensor, Communicator]]:
    """Yield this rank's rows of every weight, and the communicator of the ranks that hold its other rows."""
    names = {(id(module), attribute): name for name, (module, attribute) in owners.items()}
    whole = {}
    for target in group:
        base = target.layer.get_base_layer()
        name, weight = names[id(base), "weight"], base.weight
        assert isinstance(weight, Tensor)
        if isinstance(weight.data, DTensor) and weight.data.placements == (Shard(0),):
            rows = weight.data.to_local().detach()
            comm = Communicator(weight.data.device_mesh.get_group(), rows.device)
            yield target, rows.to(comm.device), comm
        else:
            whole[name] = target
    comm = _communicator(model)
    parts = {
        name: tensor.detach()[row_block(tensor.shape[0], comm.rank, comm.world_size)].to(comm.device, copy=True)
        for name, tensor in gather(model, owners, whole)
    }
    for name, rows in parts.items():
        yield whole[name], rows, comm


def _svd(target: _Target, rows: Tensor, config: LoRASBConfig, comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
    r = target.layer.r[target.adapter]
    try:
        return truncated_svd(
            rows,
            r,
            sum_rows=lambda part: comm.all_reduce([part])[0],
            oversampling=max(r, _LEAST_OVERSAMPLING) if config.oversampling is None else config.oversampling,
            power_iterations=config.power_iterations,
            seed=config.seed,
        )
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}; use more batches, a lower r, or leave it out") from error


def _whole(rows: Tensor, comm: Communicator) -> Tensor:
    """Concatenate all ranks' rows ``[m_k, r]``. Communication: two all-reduces, the second of ``m * r`` float64."""
    if comm.world_size == 1:
        return rows
    counts = torch.zeros(comm.world_size, dtype=torch.int64, device=rows.device)
    counts[comm.rank] = rows.shape[0]
    sizes = comm.all_reduce([counts])[0].tolist()
    whole = rows.new_zeros(sum(sizes), rows.shape[1])
    start = sum(sizes[: comm.rank])
    whole[start : start + rows.shape[0]] = rows
    return comm.all_reduce([whole])[0]


def _model_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss
