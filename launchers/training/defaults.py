"""finetune.py's own defaults of options that transformers' TrainingArguments defines. Nothing is imported for them."""

from __future__ import annotations

import dataclasses

from reflora_dist.command_line.fields import option as _option


@dataclasses.dataclass
class TrainingDefaults:
    """The options of transformers' TrainingArguments that have another default here."""

    output_dir: str = _option("outputs/finetune", "Where checkpoints, adapter, metrics and plot are written.")
    learning_rate: float = _option(3e-4, "Peak learning rate.")
    logging_steps: float = _option(10, "Log the training loss every n steps.")
    eval_strategy: str = _option("steps", "When to evaluate. Default where there are no records to evaluate on: no.")
    eval_steps: float | None = _option(50, "Evaluate every n steps.")
    ddp_find_unused_parameters: bool | None = _option(False, "Every adapter is used in every step.")
    label_names: list[str] | None = _option(  # noqa: RUF009
        ["labels"], "Columns of the records that hold labels."
    )
    resume_from_checkpoint: str | None = _option(
        None, "A checkpoint folder, or auto: the last complete one in output_dir, from the start if there is none."
    )
