"""Where HF Trainer writes a checkpoint, and which one it resumed from."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that Trainer writes at this step.

    Raises:
        RuntimeError: a search over hyperparameters is under way, in which it has a name that callbacks are not told.
    """
    assert args.output_dir is not None
    if state.is_hyper_param_search:
        raise RuntimeError(
            "hyperparameter_search() hides its checkpoints from callbacks: set save_strategy='no' for it"
        )
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that Trainer resumed from, which it tells nobody: the one whose history is that of ``state``.

    Raises:
        FileNotFoundError: it is neither what the arguments name nor in the output folder.
    """
    for folder in (Path(str(args.resume_from_checkpoint)), checkpoint_folder(args, state)):
        file = folder / "trainer_state.json"
        if file.is_file() and TrainerState.load_from_json(str(file)).log_history == state.log_history:
            return folder
    raise FileNotFoundError(
        f"{checkpoint_folder(args, state)} is not the checkpoint of step {state.global_step} that training resumes "
        "from: name it in TrainingArguments(resume_from_checkpoint=...) as well"
    )
