"""The GLUE tasks, and the options of a classifier's training."""

from __future__ import annotations

import dataclasses

from reflora_dist.command_line.fields import option


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Fields, labels and metrics of a task, as on gluebenchmark.com.

    ``num_labels`` is None if the label is a number from 0 to 5.
    """

    fields: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    num_labels: int | None = 2
    validation: str = "validation"


GLUE = {
    "cola": GlueTask(("sentence",), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearman"), num_labels=None),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "mnli": GlueTask(("premise", "hypothesis"), num_labels=3, validation="validation_matched"),
    "qnli": GlueTask(("question", "sentence")),
    "rte": GlueTask(("sentence1", "sentence2")),
}


@dataclasses.dataclass
class ClassificationOptions:
    """The task: continuing texts or classifying them."""

    task: str = option(
        "causal-lm", "seq-cls: classify sentences, with a new head on the model.", choices=("causal-lm", "seq-cls")
    )
    glue_task: str | None = option(
        None,
        "seq-cls: the task, and with it fields, labels and metrics. --dataset and --eval_dataset are files with its "
        "fields and label; default: the hub's.",
        choices=tuple(GLUE),
    )
    cls_dropout: float | None = option(None, "seq-cls: dropout in front of the classifier. Default: the model's.")
    mismatched_dataset: list[str] = option(  # noqa: RUF009
        [], "seq-cls, mnli: files of the mismatched validation set, evaluated after training. From the hub by itself."
    )

    def __post_init__(self) -> None:
        if self.active:
            if self.glue_task is None:
                raise ValueError(f"task=seq-cls needs --glue_task, one of {', '.join(GLUE)}")
            if self.cls_dropout is not None and not 0 <= self.cls_dropout < 1:
                raise ValueError(f"cls_dropout={self.cls_dropout} must be in [0, 1)")
            if self.mismatched_dataset and self.glue_task != "mnli":
                raise ValueError(f"mismatched_dataset={self.mismatched_dataset} is for mnli, not {self.glue_task}")
            return
        for name in ("glue_task", "cls_dropout", "mismatched_dataset"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing without --task seq-cls: drop it")

    @property
    def active(self) -> bool:
        """Whether sequences are classified."""
        return self.task == "seq-cls"

    @property
    def glue(self) -> GlueTask:
        return GLUE[str(self.glue_task)]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that an evaluation yields beside the loss."""
        return self.glue.metrics if self.active else ()
