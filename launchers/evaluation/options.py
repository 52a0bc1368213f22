"""The options of evaluate.py. ``--help`` prints them before torch is imported, so functions import it."""

from __future__ import annotations

import dataclasses

from reflora_dist.command_line.fields import option

from ..data.tokenization import TEMPLATE_NAMES
from ..training.options import MODEL_DTYPES
from .answer_rules import ANSWER_WORDS
from .questions import FROM_HUB, TASKS


@dataclasses.dataclass
class EvaluateOptions:
    """The options of evaluate.py."""

    model: str | None = option(None, "Hub name or local path of the base, or smollm2. Default: the adapter's.")
    adapter: str | None = option(None, "Folder or hub name of a PEFT adapter. Default: the model as it is.")
    tokenizer: str | None = option(
        None,
        "Hub name or local path of the tokenizer. Default: the adapter's if its folder has one, else the model's.",
    )
    model_dtype: str = option(
        "auto", "dtype of the base; auto: bfloat16 on an accelerator, else float32.", choices=MODEL_DTYPES
    )
    tasks: list[str] = option(  # noqa: RUF009
        list(ANSWER_WORDS),
        f"Of {', '.join(TASKS)}. TASK=FILE names the task's file, TASK={FROM_HUB} takes it from the hub. "
        "Default: the eight commonsense tasks.",
    )
    data: str | None = option(None, "Folder with TASK/test.json or commonsense/TASK/test.json. Default: the hub.")
    prompt_template: str | None = option(
        None,
        "Default: the one that finetune.py recorded beside the adapter, else alpaca. chat: the tokenizer's chat "
        "template.",
        choices=TEMPLATE_NAMES,
    )
    num_beams: int = option(1, "1: greedy decoding. RefLoRA's published script searches with 4 beams.")
    max_new_tokens: int | None = option(None, "Tokens of an answer. Default: 32, for gsm8k 256.")
    batch_size: int = option(8, "Questions that a rank answers at once.")
    limit: int | None = option(None, "The first n questions of each task only.")
    output_dir: str = option("outputs/evaluate", "Where answers and results are written, shared by all machines.")
    disable_tqdm: bool = option(False, "No progress bar.")
    local_rank: int | None = option(None, "Set by the deepspeed launcher, and not read: LOCAL_RANK holds the same.")

    def __post_init__(self) -> None:
        from ..training.recorded import recorded_template

        if self.model is None and self.adapter is None:
            raise ValueError("give --model, --adapter or both")
        for name in ("num_beams", "max_new_tokens", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        names = [entry.partition("=")[0] for entry in self.tasks]
        for name in names:
            if name not in TASKS:
                raise ValueError(f"tasks: {name!r} is none of {', '.join(TASKS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"tasks={self.tasks}: a task is named twice")
        self._find_base()
        if self.prompt_template is None:
            self.prompt_template = (recorded_template(self.adapter) if self.adapter else None) or "alpaca"
        if self.model_dtype == "auto":
            import torch

            self.model_dtype = "bfloat16" if torch.accelerator.is_available() else "float32"

    def _find_base(self) -> None:
        """Find the base. If ``model`` is an adapter, evaluate it on the base that it names."""
        from reflora_dist.engines.bare_base import adapter_folder

        from .generation import base_of

        named = self.model is not None and self.model != "smollm2"  # which is no adapter, and on no hub
        if named and adapter_folder(str(self.model)) is not None:
            if self.adapter is not None:
                raise ValueError(
                    f"model={self.model!r} is an adapter itself, and adapter={self.adapter!r} another: merge the first "
                    "(export.py --merge) and give the merged model, or give one of them"
                )
            self.model, self.adapter = None, self.model
        if self.model is None:
            self.model = base_of(str(self.adapter))
