"""finetune.py's own defaults of options that transformers' TrainingArguments defines. Nothing is imported for them."""

from __future__ import annotations

import dataclasses

from reflora_dist.command_line.fields import option as _option


@dataclasses.dataclass
class TrainingDefaults:
    """The options of transformers' TrainingArguments that have another default here, and one that it no longer has."""

    output_dir: str = _option("outputs/finetune", "Where checkpoints, adapter, metrics and plot are written.")
    learning_rate: float = _option(3e-4, "Peak learning rate.")
    bf16: bool | None = _option(  # None until the arguments' __post_init__ has chosen, as for eval_on_start
        None,
        "Train in bf16. Default: on a GPU that has it, unless --fp16, accelerate or DeepSpeed's file say otherwise.",
        nargs="?",
        const=True,
    )
    logging_steps: float = _option(10, "Log the training loss every n steps, and at the last one.")
    logging_first_step: bool = _option(True, "Log the training loss of the first step.")
    eval_strategy: str = _option("steps", "When to evaluate. Default where there are no records to evaluate on: no.")
    eval_steps: float | None = _option(50, "Evaluate every n steps.")
    eval_on_start: bool | None = _option(
        None, "Evaluate before the first step. Default: in a new run that evaluates.", nargs="?", const=True
    )
    save_total_limit: int | None = _option(2, "Keep the last n checkpoints, and the best one; 0 keeps all.")
    ddp_find_unused_parameters: bool | None = _option(False, "Every adapter is used in every step.")
    label_names: list[str] | None = _option(  # noqa: RUF009
        ["labels"], "Columns of the records that hold labels."
    )
    resume_from_checkpoint: str | None = _option(
        None, "A checkpoint folder, or auto: the last complete one in output_dir, from the start if there is none."
    )
    overwrite_output_dir: bool = _option(
        False, "Start anew in an output_dir that has checkpoints, and remove them when training begins."
    )
