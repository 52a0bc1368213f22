"""The folders of HF Trainer's checkpoints: the one that it writes, and the one that it resumed from."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments


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
