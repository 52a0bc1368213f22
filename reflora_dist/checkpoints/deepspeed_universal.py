"""DeepSpeed's universal checkpoints, for any number of ranks: the command that makes one, and which are mixed up."""

from __future__ import annotations

from pathlib import Path

from ..files.records import require_zip
from ..files.safe_pickles import load_states


def conversion(state: Path, universal: Path) -> str:
    """The command that converts a folder of ZeRO's shards."""
    tool = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
    return f"{tool} --input_folder {state} --output_folder {universal}"


def model_states(folder: Path) -> Path:
    """A file with what ranks have in common: shapes, the configuration; ds_to_universal copies it.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob("*_model_states.pt"))
    if not found:
        raise ValueError(f"{folder} holds no *_model_states.pt, which has the shapes: the checkpoint is damaged")
    return found[0]


def is_round_robin(stage: int, round_robin_gradients: bool) -> bool:
    """Whether flat buffers hold parameters in another order than the optimizer's groups.

    ds_to_universal, and what loads its files, look for them in the order of the groups (DeepSpeed 0.19).
    """
    return stage in (1, 2) and round_robin_gradients


def was_round_robin(folder: Path, trust_pickles: bool = False) -> bool:
    """Likewise, of the run that wrote these shards of ZeRO's, or those that were converted.

    Raises:
        ValueError: as ``model_states``; or that file is damaged.
    """
    path = model_states(folder)
    require_zip(path)
    state = load_states(path, trust_pickles)
    # the shapes are in the order of the buffers; of the configuration DeepSpeed may have kept a path only
    places = {name: place for place, name in enumerate(state["module"])}
    groups = [[places[name] for name in shapes if name in places] for shapes in state["param_shapes"]]
    return any(group != sorted(group) for group in groups)


def refuse_round_robin(universal: Path, remedy: str, trust_pickles: bool = False) -> None:
    """Refuse what ds_to_universal made of a round-robin run.

    Raises:
        ValueError: it did; or as ``model_states``.
    """
    if was_round_robin(universal, trust_pickles):
        raise ValueError(
            f"{universal} was converted from a run with round_robin_gradients, whose parameters ds_to_universal mixes "
            f"up: {remedy}"
        )
