"""The state of a handle in a checkpoint, and the checks that it fits the run that continues."""

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
_MAY_CHANGE = {"method"}  # no warning is needed: check_state refuses another method


def handle_state(
    config: RefLoRAConfig,
    steps: int,
    applied_steps: int = 0,
    skipped_pairs: int = 0,
    pairs: Sequence[AdapterPair] | None = None,
) -> dict[str, Any]:
    """Return a handle's state dictionary.

    With the defaults it is that of a run whose steps so far were plain LoRA on unknown adapters.
    """
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
    """Return how many lora_A are stored tall, as ``[in, r]``, and a digest of their names."""
    tall = [_peft_name(pair) for pair in pairs if pair.stored_tall]
    return [len(tall), _digest(tall)]


def check_storage(state: Mapping[str, Any], pairs: Sequence[AdapterPair], saved: str = "the saved state") -> None:
    """Make sure that this model stores lora_A in the form in which the run wrote factors, moments and flat buffers.

    Args:
        state: a handle's saved state. Without ``stored_tall`` (earlier releases) no factor was stored tall.
        pairs: this model's adapters.
        saved: name of the state in error messages.

    Raises:
        ValueError: lora_A would be read transposed. An engine with flat buffers would not notice.
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
            f"{saved} is of a run that stored {before[0]} lora_A tall, as [in, r], but this model stores {now[0]} "
            f"of {len(pairs)} tall: their optimizer state would be read transposed. To continue, {remedy}; or start a "
            "new run from the adapter, whose files do not depend on the storage (PeftModel.from_pretrained)"
        )


def describe_adapters(pairs: Sequence[AdapterPair]) -> dict[str, list[Any]]:
    """Return, by r and scaling, the number of adapters and a digest of their names.

    A change of LoraConfig that changes the update changes one of these.
    """
    names: dict[str, list[str]] = {}
    for pair in pairs:
        names.setdefault(f"r={pair.lora_rank}, scaling={pair.scaling:g}", []).append(_peft_name(pair))
    return {kind: [len(of_kind), _digest(of_kind)] for kind, of_kind in sorted(names.items())}


def check_adapters(state: Mapping[str, Any], pairs: Sequence[AdapterPair], saved: str = "the saved state") -> None:
    """Make sure that a run continues with the adapters that it had.

    Args:
        state: a handle's saved state.
        pairs: this model's adapters.
        saved: name of the state in error messages.

    Raises:
        ValueError: the adapters, their r or their scaling (lora_alpha, use_rslora) differ.
    """
    before, now = state.get("adapters"), describe_adapters(pairs)
    if before is None or before == now:
        return
    require_fields(state, {"adapters": Mapping}, saved)
    _require_descriptions(before, saved)
    if _listed(before) == _listed(now):
        raise ValueError(
            f"{saved} is of adapters with other layers or names than this model's ({pairs[0].name}, ...): "
            "give LoraConfig the target_modules of that run, and activate its adapters"
        )
    raise ValueError(
        f"{saved} is of {_listed(before)}, and this model has {_listed(now)}: give LoraConfig the r, lora_alpha, "
        "use_rslora and target_modules of that run"
    )


def check_state(state: Mapping[str, Any], config: RefLoRAConfig, pairs: Sequence[AdapterPair]) -> None:
    """Make sure that a handle can continue from a state.

    Raises:
        ValueError: the state is not a handle's, or its version, method, adapters or storage of lora_A differ.
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
    """Return a text that lists the settings that differ from the saved run's; empty if none does."""
    saved = state["config"]
    return ", ".join(
        f"{name}={value!r} in place of {saved[name]!r}"
        for name, value in config.as_dict().items()
        if name not in _MAY_CHANGE and name in saved and saved[name] != value
    )


def _peft_name(pair: AdapterPair) -> str:
    """Return the pair's name without modules around the PEFT model, which another run may not have."""
    return pair.name[max(0, pair.name.find(_PEFT_PREFIX)) :]


def _require_descriptions(descriptions: Mapping[str, Any], source: str) -> None:
    """Make sure that each description is a number and a digest."""
    for name, value in descriptions.items():
        pair = value if isinstance(value, Sequence) and len(value) == 2 else (None, None)
        if not (isinstance(pair[0], int) and isinstance(pair[1], str)):
            raise ValueError(f"{source} is damaged ({name} is {value!r:.60}): load an earlier checkpoint")


def _listed(adapters: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{count} adapters ({kind})" for kind, (count, _) in adapters.items())


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]
