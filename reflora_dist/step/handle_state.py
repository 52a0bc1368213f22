"""What a checkpoint keeps of a handle, and whether it fits the run that continues."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..engines.pairs import AdapterPair
from ..files.records import require_fields
from ..methods.config import RefLoRAConfig

_VERSION = 1
_PEFT_PREFIX = "base_model.model."
_FIELDS = {"version": int, "config": Mapping, "steps": int, "applied_steps": int, "skipped_pairs": int}
_MAY_CHANGE = {"method"}  # which is refused


def handle_state(
    config: RefLoRAConfig,
    steps: int,
    applied_steps: int = 0,
    skipped_pairs: int = 0,
    pairs: Sequence[AdapterPair] | None = None,
) -> dict[str, Any]:
    """A handle's state dictionary; by itself that of a run whose steps so far were plain LoRA on unknown adapters."""
    state = {
        "version": _VERSION,
        "config": config.as_dict(),
        "steps": steps,
        "applied_steps": applied_steps,
        "skipped_pairs": skipped_pairs,
    }
    if pairs is None:
        return state
    return {**state, "adapters": describe_adapters(pairs), "stored_tall": describe_storage(pairs)}


def describe_storage(pairs: Sequence[AdapterPair]) -> list[Any]:
    """How many lora_A are stored as ``[in, r]``, and a digest of which."""
    tall = [_peft_name(pair) for pair in pairs if pair.stored_tall]
    return [len(tall), _digest(tall)]


def check_storage(state: Mapping[str, Any], pairs: Sequence[AdapterPair], saved: str = "the saved state") -> None:
    """Make sure that factors, moments and flat buffers of a run are read as they were written.

    Args:
        state: of a handle. Those of releases that stored no factor tall do not say.

    Raises:
        ValueError: they would be read transposed: in silence where an engine keeps flat buffers.
    """
    if "adapters" not in state:  # a run whose steps so far were plain LoRA on unknown adapters
        return
    before, now = state.get("stored_tall", describe_storage([])), describe_storage(pairs)
    _require_descriptions({"stored_tall": before}, saved)
    if list(before) != now:
        remedy = (
            "call reflora_dist.tall_adapters(model) before wrapping (RefLoRACallback(config, tall=True), "
            "finetune.py --tall_adapters True)"
            if before[0] > now[0]
            else "leave reflora_dist.tall_adapters out (RefLoRACallback(config, tall=False), "
            "finetune.py --tall_adapters False)"
        )
        raise ValueError(
            f"{saved} is of a run that stored {before[0]} lora_A tall, as [in, r], and this model stores {now[0]} of "
            f"{len(pairs)} so: their optimizer state would be read transposed. To continue, {remedy}; or start a new "
            "run from the adapter, whose files are the same either way (PeftModel.from_pretrained)"
        )


def describe_adapters(pairs: Sequence[AdapterPair]) -> dict[str, list[Any]]:
    """By r and scaling how many there are, and a digest of their names: all that changes when LoraConfig does."""
    names: dict[str, list[str]] = {}
    for pair in pairs:
        names.setdefault(f"r={pair.lora_rank}, scaling={pair.scaling:g}", []).append(_peft_name(pair))
    return {kind: [len(of_kind), _digest(of_kind)] for kind, of_kind in sorted(names.items())}


def check_adapters(state: Mapping[str, Any], pairs: Sequence[AdapterPair], saved: str = "the saved state") -> None:
    """Make sure that a run continues with the adapters that it had.

    Raises:
        ValueError: others, or another r or scaling (lora_alpha, use_rslora).
    """
    before, now = state.get("adapters"), describe_adapters(pairs)
    if before is None or before == now:
        return
    require_fields(state, {"adapters": Mapping}, saved)
    _require_descriptions(before, saved)
    if _listed(before) == _listed(now):
        raise ValueError(
            f"{saved} is of adapters of other layers, or with other names, than this model's ({pairs[0].name}, ...): "
            "give LoraConfig the target_modules of that run, and activate its adapters"
        )
    raise ValueError(
        f"{saved} is of {_listed(before)}, and this model has {_listed(now)}: give LoraConfig the r, lora_alpha, "
        "use_rslora and target_modules of that run"
    )


def check_state(state: Mapping[str, Any], config: RefLoRAConfig, pairs: Sequence[AdapterPair]) -> None:
    """Make sure that a handle can continue from a state.

    Raises:
        ValueError: it is no handle's, of another version or method, or of other adapters or ones stored otherwise.
    """
    if not state:
        raise ValueError("state_dict is empty: the checkpoint was saved without a handle, so leave state_dict out")
    require_fields(state, _FIELDS, "the saved state")
    if state["version"] != _VERSION:
        raise ValueError(f"version={state['version']!r} of the saved state is not {_VERSION}")
    saved = state["config"]
    require_fields(saved, {"method": str}, "config of the saved state")
    if saved["method"] != config.method:
        raise ValueError(
            f"the checkpoint was written with method={saved['method']!r}, this is {config.method!r}: continue with "
            "that method, or start a new run from the adapter (PeftModel.from_pretrained)"
        )
    check_adapters(state, pairs)
    check_storage(state, pairs)


def changed_settings(state: Mapping[str, Any], config: RefLoRAConfig) -> str:
    """What of the method's settings is not as it was in the run that goes on; empty if nothing is."""
    saved = state["config"]
    return ", ".join(
        f"{name}={value!r} in place of {saved[name]!r}"
        for name, value in config.as_dict().items()
        if name not in _MAY_CHANGE and name in saved and saved[name] != value
    )


def _peft_name(pair: AdapterPair) -> str:
    """Without modules around the PEFT model, which need not be there again."""
    return pair.name[max(0, pair.name.find(_PEFT_PREFIX)) :]


def _require_descriptions(descriptions: Mapping[str, Any], source: str) -> None:
    """Each is a number and a digest."""
    for name, value in descriptions.items():
        pair = value if isinstance(value, Sequence) and len(value) == 2 else (None, None)
        if not (isinstance(pair[0], int) and isinstance(pair[1], str)):
            raise ValueError(f"{source} is damaged ({name} is {value!r:.60}): load an earlier checkpoint")


def _listed(adapters: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{count} adapters ({kind})" for kind, (count, _) in adapters.items())


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]
