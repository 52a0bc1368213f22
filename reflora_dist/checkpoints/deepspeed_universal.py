"""DeepSpeed's universal checkpoints for any number of ranks: the conversion, and the runs for which it is wrong."""

from __future__ import annotations

from pathlib import Path

from ..files.records import require_zip
from ..files.safe_pickles import load_states


def conversion(state: Path, universal: Path) -> str:
    """Return the command that converts a folder of ZeRO shards to a universal checkpoint."""
    tool = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
    return f"{tool} --input_folder {state} --output_folder {universal}"


def model_states(folder: Path) -> Path:
    """Return a file with shapes and configuration, which are the same on all ranks. ds_to_universal copies it.

    Raises:
        ValueError: the folder holds no such file.
    """
    found = sorted(folder.glob("*_model_states.pt"))
    if not found:
        raise ValueError(f"{folder} holds no *_model_states.pt, which has the shapes: the checkpoint is damaged")
    return found[0]


def is_round_robin(stage: int, round_robin_gradients: bool) -> bool:
    """Return whether flat buffers hold parameters in another order than the optimizer's groups.

    ds_to_universal and the code that loads its files expect the order of the groups (DeepSpeed 0.19).
    """
    return stage in (1, 2) and round_robin_gradients


def was_round_robin(folder: Path, trust_pickles: bool = False) -> bool:
    """Return whether the run that wrote a folder's files used round_robin_gradients.

    Args:
        folder: the folder of ZeRO shards, or of the universal checkpoint that was converted from them.
        trust_pickles: whether to unpickle any class in the file, which can run code.

    Raises:
        ValueError: as ``model_states``; or that file is damaged.
    """
    path = model_states(folder)
    require_zip(path)
    state = load_states(path, trust_pickles)
    # The order of the shapes tells, which is that of the buffers: DeepSpeed may save only the configuration's path.
    places = {name: place for place, name in enumerate(state["module"])}
    groups = [[places[name] for name in shapes if name in places] for shapes in state["param_shapes"]]
    return any(group != sorted(group) for group in groups)


def refuse_round_robin(universal: Path, remedy: str, trust_pickles: bool = False) -> None:
    """Refuse a universal checkpoint that was converted from a run with round_robin_gradients.

    Args:
        universal: the folder of the universal checkpoint.
        remedy: the end of the error message.
        trust_pickles: whether to unpickle any class in the file, which can run code.

    Raises:
        ValueError: the run used round_robin_gradients; or as ``model_states``.
    """
    if was_round_robin(universal, trust_pickles):
        raise ValueError(
            f"{universal} was converted from a run with round_robin_gradients, whose parameters ds_to_universal mixes "
            f"up: {remedy}"
        )
