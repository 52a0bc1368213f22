"""LoRA-SB and LoRA-XS without ranks: the SVD, what the initialization means, and the adapter in PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reflora_dist import convert_adapter
from reflora_dist.lora_sb import (
    LoRASBConfig,
    LoraXSConfig,
    LoraXSLinear,
    initialize_lora_sb,
    initialize_lora_xs,
    truncated_svd,
)
from tests.support.cluster import run_ranks
from tests.support.lora_xs import CONFIG, LEARNING_RATE, R, base_model, full_gradients, local_batches, xs_model
from tests.support.workloads import LINEARS, synthetic_workload

ENERGY = 0.99
WORLD_SIZE_TOLERANCE = 1e-5
FLOAT32_TOLERANCE = 1e-5  # factors are stored in float32, and their product is formed in it

# --- the SVD ---


def _matrix(kind: str, m: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator)
    if kind == "sign of noise":  # the slowest decay that a sign matrix can have
        return noise.sign()
    if kind == "sign of low rank":
        low = torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator)
        return (low + 0.5 * noise).sign()
    if kind == "orthogonal":  # all singular values equal
        return torch.linalg.qr(noise if m >= n else noise.T)[0]
    return torch.outer(torch.arange(1.0, m + 1), torch.ones(n)) + 1e-3 * noise  # nearly of rank one


KINDS = ("sign of noise", "sign of low rank", "orthogonal", "nearly of rank one")


def _svd(rows: Tensor, rank: int, sum_rows: Any = lambda part: part) -> tuple[Tensor, Tensor, Tensor]:
    config = LoRASBConfig()
    return truncated_svd(
        rows,
        rank,
        sum_rows=sum_rows,
        oversampling=max(rank, 16),
        power_iterations=config.power_iterations,
        seed=config.seed,
    )


def _captured(matrix: Tensor, rank: int, found: tuple[Tensor, Tensor, Tensor]) -> float:
    """Energy of the projection on the subspaces found, beside that of the best of this rank."""
    left, _, right = found
    wide = matrix.double()
    best = torch.linalg.svdvals(wide)[:rank].square().sum()
    return ((left.T @ wide @ right.T).square().sum() / best).item()


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(2, 300),
    n=st.integers(2, 300),
    rank=st.integers(1, 24),
    seed=st.integers(0, 2**16),
)
def test_svd_captures_the_energy_of_the_exact_one(kind: str, m: int, n: int, rank: int, seed: int) -> None:
    """99 % at least, with orthonormal factors that diagonalize the matrix and the sign convention kept."""
    matrix = _matrix(kind, m, n, seed)
    rank = min(rank, *matrix.shape, int(torch.linalg.matrix_rank(matrix.double())))
    left, values, right = found = _svd(matrix, rank)
    assert _captured(matrix, rank, found) >= ENERGY
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(left.T @ left, identity, atol=1e-9)
    assert torch.allclose(right @ right.T, identity, atol=1e-9)
    assert torch.allclose(left.T @ matrix.double() @ right.T, torch.diag(values), atol=1e-7 * values[0].item())
    assert bool((values.diff() <= 0).all())
    largest = right.abs().amax(dim=1)
    assert all(row[(row.abs() > 0.9 * top).nonzero()[0]] > 0 for row, top in zip(right, largest, strict=True))


@pytest.mark.parametrize(("m", "n", "rank"), [(512, 512, 16), (1376, 512, 16), (512, 1376, 64), (1024, 1024, 8)])
@pytest.mark.parametrize("kind", ["sign of noise", "sign of low rank"])
def test_svd_of_larger_matrices(kind: str, m: int, n: int, rank: int) -> None:
    """The energy holds where the spectrum is flat over hundreds of singular values."""
    matrix = _matrix(kind, m, n, seed=0)
    assert _captured(matrix, rank, _svd(matrix, rank)) >= ENERGY


def test_svd_is_exact_where_the_rank_is() -> None:
    """A matrix of rank r comes back."""
    generator = torch.Generator().manual_seed(0)
    tall, wide = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((90, 5), (5, 70)))
    matrix = tall @ wide
    left, values, right = _svd(matrix, 5)
    assert ((left * values @ right - matrix).norm() / matrix.norm()).item() <= 1e-6
    with pytest.raises(ValueError, match="less than rank=6 singular values"):
        _svd(matrix, 6)
    with pytest.raises(ValueError, match="less than rank=1 singular values"):
        _svd(torch.zeros(4, 4), 1)


# how many of 90 rows each rank holds: even, uneven, with empty ranks
SPLITS = [(90,), (45, 45), (1, 89), (30, 30, 30), (0, 90, 0), (23, 23, 22, 22), (88, 0, 1, 1)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "orthogonal"])  # of which any basis is singular
def test_svd_does_not_depend_on_the_number_of_ranks(kind: str) -> None:
    """1 to 4 ranks and any distribution of rows give the same factors, with the subspaces of the flat spectrum."""
    outcomes = {split: run_ranks(_svd_on_ranks, len(split), kind, split) for split in SPLITS}
    expected = outcomes[(90,)][0]
    for split, parts in outcomes.items():
        left = torch.cat([part[0] for part in parts])
        assert (left - expected[0]).abs().max().item() <= WORLD_SIZE_TOLERANCE, split
        for _, values, right in parts:
            assert torch.allclose(values, expected[1], rtol=WORLD_SIZE_TOLERANCE)
            assert (right - expected[2]).abs().max().item() <= WORLD_SIZE_TOLERANCE, split
            assert torch.equal(right, parts[0][2])


def _svd_on_ranks(rank: int, world_size: int, kind: str, split: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    import torch.distributed as dist

    from reflora_dist.collectives.communicator import Communicator

    comm = Communicator(dist.group.WORLD if world_size > 1 else None, torch.device("cpu"))
    rows = _matrix(kind, 90, 64, seed=3).split(split)[rank]
    return _svd(rows, 6, lambda part: comm.all_reduce([part])[0])


# --- what the initialization is ---


@pytest.mark.parametrize("alpha", [None, 2 * R])
@pytest.mark.parametrize("modules_per_pass", [None, 3])
def test_the_adapter_is_the_best_approximation_of_the_first_step(alpha: int | None, modules_per_pass: Any) -> None:
    """``s B R A`` is the truncated SVD of ``-lr sign(G)``, G by autograd, whatever s and the modules per pass are."""
    workload = synthetic_workload(steps=6)
    # the exact SVD's gap behind rank r is small: more iterations, so that the subspaces converge
    config = LoRASBConfig(num_batches=2, learning_rate=LEARNING_RATE, power_iterations=300, **_per(modules_per_pass))
    model = _initialized(workload, config, lora_alpha=alpha)
    gradients = full_gradients(workload)
    for name, layer in _layers(model).items():
        step = -LEARNING_RATE * gradients[name].double().sign()
        left, values, right = torch.linalg.svd(step, full_matrices=False)
        best = left[:, :R] * values[:R] @ right[:R]
        delta = layer.get_delta_weight("default").double()
        # entries of G near zero may have the other sign, since fp32 sums in another order
        assert ((delta - best).norm() / best.norm()).item() <= 1e-2, name
        b, r, a = layer.factors("default")
        assert torch.allclose(b.T @ b, torch.eye(R), atol=FLOAT32_TOLERANCE)
        assert torch.allclose(a @ a.T, torch.eye(R), atol=FLOAT32_TOLERANCE)
        assert torch.equal(r, torch.diag(r.diagonal()))


def _per(modules: int | None) -> dict[str, Any]:
    return {"modules_per_pass": modules}


def test_a_step_on_r_is_the_projected_full_step() -> None:
    """The paper's theorem: ``grad_R = s B^T G A^T``, so that with B and A orthonormal a step of SGD on R moves W by
    ``-lr s^2 B B^T G A^T A``, the projection of the full step times s^2; with s = 1 the best there is.
    """
    workload = synthetic_workload(steps=6)
    for alpha in (None, 3 * R):
        model = _initialized(workload, CONFIG, lora_alpha=alpha)
        layers = _layers(model)
        deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
        gradients = _gradients_at(model, workload)
        batch = workload.batches[3]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        for name, layer in layers.items():
            b, _, a = (factor.detach().double() for factor in layer.factors("default"))
            s = layer.scaling["default"]
            expected = s * b.T @ gradients[name].double() @ a.T
            found = layer.factors("default")[1].grad
            assert found is not None
            assert ((found - expected).norm() / expected.norm()).item() <= FLOAT32_TOLERANCE, name
            moved = layer.get_delta_weight("default").double() - deltas[name].double()
            projected = -0.1 * s**2 * (b @ b.T) @ gradients[name].double() @ (a.T @ a)
            assert ((moved - projected).norm() / projected.norm()).item() <= 1e-3, name  # a difference of floats


def _gradients_at(model: PeftModel, workload: Any) -> dict[str, Tensor]:
    """The full gradient at the weights with the adapters merged."""
    merged = base_model(workload)
    weights = {name: layer for name, layer in merged.named_modules() if name.endswith(LINEARS)}
    with torch.no_grad():
        for name, layer in _layers(model).items():
            weights[name].weight += layer.get_delta_weight("default")
    batch = workload.batches[3]
    merged(input_ids=batch, labels=batch).loss.backward()
    return {name: module.weight.grad for name, module in weights.items()}


def test_lora_xs_spans_the_pretrained_weights() -> None:
    """B = U, A = S V^T of W, and R small: the function is the base's but for 1e-5."""
    workload = synthetic_workload(steps=1)
    model = xs_model(workload)
    initialize_lora_xs(model, _optimizer(model), LoRASBConfig(method="lora-xs", power_iterations=300))
    for name, layer in _layers(model).items():
        weight = layer.get_base_layer().weight
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        b, r, a = (factor.detach().double() for factor in layer.factors("default"))
        best = left[:, :R] * values[:R] @ right[:R]
        assert ((b @ a - best).norm() / best.norm()).item() <= 1e-3, name
        assert torch.allclose(a.norm(dim=1), values[:R], rtol=1e-4), name
        assert 0 < r.abs().max().item() <= 6e-5


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _layers(model: nn.Module) -> dict[str, LoraXSLinear]:
    named = {name: module for name, module in model.named_modules() if isinstance(module, LoraXSLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in named.items()}


def _initialized(workload: Any, config: LoRASBConfig, **adapter: Any) -> PeftModel:
    model = xs_model(workload, **adapter)
    initialize_lora_sb(model, _optimizer(model), local_batches(workload, 0, 1), config)
    return model


# --- in PEFT ---


@pytest.fixture
def trained() -> PeftModel:
    """An adapter whose R is no longer diagonal, with another r in one layer."""
    model = _initialized(synthetic_workload(steps=6), CONFIG, rank_pattern={"o_proj": 2}, lora_dropout=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_xs_R" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model.eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=synthetic_workload(steps=1).batches[0][:2]).logits


def test_only_r_is_trained(trained: PeftModel) -> None:
    """Also after the adapter was switched off and on, and after loading to train on."""
    trained.set_adapter("default")
    with trained.disable_adapter():
        pass
    names = {name.split(".")[-3] for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names == {"lora_xs_R"}


def test_merging_disabling_and_reloading_keep_the_function(trained: PeftModel, tmp_path: Path) -> None:
    """Merged, unmerged, merged for good, saved and loaded: the same logits; disabled: the base's."""
    workload = synthetic_workload(steps=1)
    expected, base = _logits(trained), _logits(base_model(workload))
    assert (expected - base).abs().max().item() > 1e-2
    trained.save_pretrained(tmp_path)
    with trained.disable_adapter():
        assert torch.equal(_logits(trained), base)
    trained.merge_adapter(safe_merge=True)
    assert torch.allclose(_logits(trained), expected, atol=FLOAT32_TOLERANCE)
    trained.unmerge_adapter()
    assert torch.allclose(_logits(trained), expected, atol=FLOAT32_TOLERANCE)
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in _layers(trained).items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in _layers(trained).items()}
    for name, layer in _layers(trained).items():
        b, r, a = layer.factors("default")
        assert torch.allclose(deltas[name], layer.scaling["default"] * b @ r @ a, atol=1e-6)
    merged = trained.merge_and_unload()
    for name, module in merged.named_modules():
        if name in weights:
            assert torch.allclose(module.weight, weights[name] + deltas[name], atol=1e-7)
    assert torch.allclose(_logits(merged), expected, atol=FLOAT32_TOLERANCE)
    assert torch.equal(_logits(PeftModel.from_pretrained(base_model(workload), tmp_path).eval()), expected)


def test_a_converted_adapter_is_plain_lora(trained: PeftModel, tmp_path: Path) -> None:
    """PEFT without this package loads it and computes the same; the original stops PEFT, naming this package."""
    trained.save_pretrained(tmp_path / "xs")
    convert_adapter(tmp_path / "xs", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base_model(synthetic_workload(steps=1)), tmp_path / "lora").eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert torch.allclose(_logits(loaded), _logits(trained), atol=FLOAT32_TOLERANCE)
    script = (
        "import sys, torch; from peft import PeftModel; PeftModel.from_pretrained(torch.nn.Linear(2, 2), sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "xs")]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode != 0 and "REFLORA_DIST_LORA_XS" in outcome.stderr
    with pytest.raises(ValueError, match="own folder"):
        convert_adapter(tmp_path / "xs", tmp_path / "xs")
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_adapter(tmp_path / "lora", tmp_path / "other")


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 20.0}},
        {"rank_pattern": {"self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 20.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*.q_proj": 20.0}, "lora_alpha": 6},
    ],
    ids=["s=1, longer alpha key", "s=1, longer r key", "alpha"],
)
def test_a_converted_adapter_keeps_each_modules_r_and_scale(patterns: dict[str, Any], tmp_path: Path) -> None:
    """Also of a module that gets its r by one pattern and its alpha by another."""
    workload = synthetic_workload(steps=6)
    model = _initialized(workload, CONFIG, **patterns).eval()
    model.save_pretrained(tmp_path / "xs")
    convert_adapter(tmp_path / "xs", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base_model(workload), tmp_path / "lora")
    converted: dict[str, Any] = dict(loaded.base_model.model.named_modules())
    for name, layer in _layers(model).items():
        expected = (layer.r["default"], layer.scaling["default"])
        assert (converted[name].r["default"], converted[name].scaling["default"]) == expected
        own, plain = layer.get_delta_weight("default"), converted[name].get_delta_weight("default")
        assert (plain - own).norm() <= 1e-5 * own.norm()


# --- what is refused ---


def test_mistakes_are_refused() -> None:
    """Each with what to do instead."""
    workload = synthetic_workload(steps=6)
    model = xs_model(workload)
    optimizer, batches = _optimizer(model), local_batches(workload, 0, 1)
    with pytest.raises(ValueError, match="learning_rate=None: give"):
        initialize_lora_sb(model, optimizer, batches, LoRASBConfig(num_batches=1))
    with pytest.raises(ValueError, match="num_batches=9, but there are only 2"):
        initialize_lora_sb(model, optimizer, batches, LoRASBConfig(num_batches=9, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"q_proj: the matrix has less than rank=4 .* use more batches"):
        initialize_lora_sb(model, optimizer, batches, CONFIG, loss=lambda model, batch: torch.zeros(()))
    with pytest.raises(ValueError, match="the loss of a batch is None: give batches with labels, or loss="):
        initialize_lora_sb(model, optimizer, batches, CONFIG, loss=lambda model, batch: None)  # type: ignore[arg-type, return-value]
    assert all(p.requires_grad == ("lora_xs_R" in n) for n, p in model.named_parameters())
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged or disabled"):
        initialize_lora_xs(model, optimizer, CONFIG)
    lora = get_peft_model(base_model(workload), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no active LoRA-XS adapter"):
        initialize_lora_xs(lora, _optimizer(lora), CONFIG)
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="does not hold all that is trained"):
        initialize_lora_xs(xs_model(workload), other, CONFIG)
    with pytest.raises(ValueError, match="r=65 must be between 1 and 32"):
        xs_model(workload, r=65, target_modules=["k_proj"])
    with pytest.raises(TypeError, match="embed_tokens is a Embedding"):
        xs_model(workload, target_modules=["embed_tokens"])


def test_a_quantized_base_is_refused() -> None:
    """Weights that are not floating point cannot be approximated or merged into exactly."""
    base = nn.Sequential(nn.Linear(8, 8))
    base[0].weight = nn.Parameter(base[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="is quantized"):
        get_peft_model(base, LoraXSConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lora"}, "method='lora' is unknown"),
        ({"num_batches": 0}, "num_batches=0 must be an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"power_iterations": -1}, "power_iterations=-1"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    """When they are made."""
    with pytest.raises(ValueError, match=message):
        LoRASBConfig(**fields)
