"""Whether a model gives an example the same logits in a batch as alone: behind others in a packed row, and padded.

Architectures differ in it, and so do attention implementations and caches, so the model itself is asked, as it is about
to be used: a few tokens, no gradient, in the dtype and under the engine of the run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from launchers.data.tokenization import Collator, pack
from launchers.evaluation.generation import left_padded

TRIED_TOKENS = 8
# Relative. What an example sees of another one changes its logits by more, also in small models with PyTorch's start
# (1e-4 to 1). With nothing seen the difference is 0, but for experts: their products depend on all tokens of the batch.
PACKING_TOLERANCE = 3e-5
# Relative. Rows of another length are summed up in another order: 1e-6 in fp32. A wrong position is 1e-2 and more.
PADDING_TOLERANCE = 1e-3
# How much of the difference may be noise, which another pair of rows shows that differs in nothing that counts.
TIMES_NOISE = 10


class BatchingChangesExamples(ValueError):
    """A model's logits of an example depend on what else is in the batch."""


class PackingCheck(TrainerCallback):
    """Asks the wrapped model whether it keeps packed examples apart, before the first evaluation and step.

    Args:
        trainer: of the training, whose ``model_wrapped`` callbacks are not told.
        collator: makes batches of packed rows.
        tokens: of any training example.
    """

    def __init__(self, trainer: Trainer, collator: Collator, tokens: list[int]) -> None:
        self.trainer, self.collator, self.tokens = trainer, collator, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_separate_examples(self.trainer.model_wrapped, args, self.collator, self.tokens)


def require_position_ids(model: Any) -> None:
    """Refuse packing for models that take no ``position_ids``, by which rows are taken apart.

    Args:
        model: as transformers made it.

    Raises:
        BatchingChangesExamples: its forward has no such argument; Trainer would leave the column out.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise BatchingChangesExamples(
            f"packing=True: {type(model).__name__} takes no position_ids, so the examples of a row would see each "
            "other; drop --packing"
        )


def require_separate_examples(model: Any, arguments: Any, collator: Collator, tokens: list[int]) -> None:
    """Refuse packing if an example's logits depend on the example before it; every rank must call.

    Args:
        model: wrapped, with a configuration that says whether it caches.
        arguments: of the training.
        collator: makes batches of packed rows.
        tokens: of any training example, at least one.

    Raises:
        BatchingChangesExamples: they do.
    """
    several = arguments.per_device_train_batch_size > 1
    change = _change_behind_another(model, arguments.device, collator, tokens[:TRIED_TOKENS], several)
    if change == 0:
        return
    remedies = ["set --use_cache False"] if arguments.use_cache else []
    if several and _change_behind_another(model, arguments.device, collator, tokens[:TRIED_TOKENS], False) == 0:
        remedies.append("set --per_device_train_batch_size 1 or --attn_implementation sdpa")  # flash attention
    remedy = ", or ".join([*remedies, "drop --packing"])
    raise BatchingChangesExamples(
        "packing=True: the examples of a row see each other in this model (the logits of an example's first token "
        f"change by {change:.2g} of their size with what stands before it); {remedy}"
    )


def _change_behind_another(
    model: Any, device: torch.device, collator: Collator, example: list[int], several: bool
) -> float:
    """How much an example's first logits change with an example before it, or 0 if that is noise.

    The first token attends to nothing but itself, so it is compared behind another example and in front of it. What
    else is in the row does not count, but shows the noise of experts.

    Args:
        model: to be asked.
        device: of the model.
        collator: makes batches of packed rows.
        example: its tokens.
        several: ask with several rows in a batch.
    """
    length, other = len(example), example[::-1]
    pairs = ((other, example), (example, other), (example, example))
    rows = [pack([{"input_ids": list(ids), "labels": list(ids)} for ids in pair], 2 * length)[0] for pair in pairs]
    batches = [collator(rows)] if several else [collator([row]) for row in rows]
    with _inference(model):
        logits = torch.cat([_logits(model, batch, device) for batch in batches])
    behind, front, front_again = logits[0, length], logits[1, 0], logits[2, 0]
    change, noise = _difference(behind, front), _difference(front_again, front)
    return 0.0 if change <= max(PACKING_TOLERANCE, TIMES_NOISE * noise) else change  # which may be NaN


def require_same_in_batch(model: Any, prompt: list[int]) -> None:
    """Refuse batches for models that answer otherwise to a prompt that is padded on the left.

    Args:
        model: as :func:`launchers.evaluation.generation.generate` takes it.
        prompt: any; its first tokens are a short and a long prompt.

    Raises:
        BatchingChangesExamples: the logits of the next tokens are others alone and in a batch.
    """
    short, long = prompt[: TRIED_TOKENS // 2], prompt[: 2 * TRIED_TOKENS]
    if len(short) == len(long):
        return
    with _inference(model):
        alone_short, alone_long, both = (_next_logits(model, prompts) for prompts in ([short], [long], [short, long]))
    noise = _difference(both[0][1], alone_long[0][0])
    difference = _difference(both[0][0], alone_short[0][0])
    if both[0][0].argmax() == alone_short[0][0].argmax():  # else the second token follows on another one
        difference = max(difference, _difference(both[1][0], alone_short[1][0]))
    if not difference <= max(PADDING_TOLERANCE, TIMES_NOISE * noise):
        raise BatchingChangesExamples(
            f"batch_size: this model answers otherwise in a batch (the logits of a padded prompt change by "
            f"{difference:.2g} of their size); set --batch_size 1"
        )


def _next_logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """The logits of the next two tokens, each ``[prompts, vocabulary]``."""
    generated = model.generate(
        **left_padded(model, prompts),
        num_beams=1,
        min_new_tokens=2,
        max_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [logits.float() for logits in generated.logits]


def _logits(model: Any, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs)
    return (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).detach().float()


def _difference(one: Tensor, other: Tensor) -> float:
    """Of two vectors of logits, relative to their spread: a constant added to all changes no probability."""
    one, other = (logits - logits.mean() for logits in (one, other))
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    """No dropout, no gradient, and random numbers afterwards as before."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
