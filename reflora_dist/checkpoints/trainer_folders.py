"""Folders of HF Trainer's checkpoints: the one that it writes, the one that it resumed from, and a file in them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..engines.tall import TALL_NAME, is_tall, transposed
from ..files.safe_pickles import load_states


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that Trainer writes at this step.

    Raises:
        RuntimeError: a hyperparameter search runs, in which Trainer does not tell callbacks the folder's name.
    """
    assert args.output_dir is not None
    if state.is_hyper_param_search:
        raise RuntimeError(
            "hyperparameter_search() hides its checkpoints from callbacks: set save_strategy='no' for it"
        )
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder that Trainer resumed from: the one whose log history is that of ``state``.

    Trainer does not tell callbacks which folder it is.

    Raises:
        FileNotFoundError: it is neither the folder that the arguments name nor one in the output folder.
    """
    for folder in (Path(str(args.resume_from_checkpoint)), checkpoint_folder(args, state)):
        file = folder / "trainer_state.json"
        if file.is_file() and TrainerState.load_from_json(str(file)).log_history == state.log_history:
            return folder
    raise FileNotFoundError(
        f"{checkpoint_folder(args, state)} is not the checkpoint of step {state.global_step} that training resumes "
        "from: name it in TrainingArguments(resume_from_checkpoint=...) as well"
    )


def keep_parameters_names(folder: Path, model: nn.Module) -> None:
    """Give tall factors in FSDP2's full state dictionary their parameters' own names and shapes; for one rank.

    torch fills a full state dictionary into the parameters by their names, and does not know that TallLinear saves
    ``tall`` ``[in, r]`` as ``weight`` ``[r, in]``: such a file could not be loaded. A sharded one can.

    Args:
        folder: a checkpoint that Trainer has just written; nothing is done if it has no such file.
        model: the wrapped model.
    """
    path = folder / f"{FSDP_MODEL_NAME}.bin"
    names = [name for name, module in model.named_modules() if is_tall(module)]
    if not names or not path.is_file():
        return
    state = load_states(path)
    for name in names:
        weight = state.pop(f"{name}.weight", None)
        if weight is not None:
            state[f"{name}.{TALL_NAME}"] = transposed(weight)
    part = path.with_name(f".{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)
