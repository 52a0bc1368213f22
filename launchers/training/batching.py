"""Check that a model gives an example the same logits in a batch as alone: in a packed row, and with padding.

The answer depends on the architecture, the attention implementation and the cache. So the checks run the model itself
on a few tokens, without gradients, in the dtype and under the engine of the run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..data.tokenization import Collator, pack
from ..evaluation.generation import left_padded

TRIED_TOKENS = 8
# Relative. An example that sees another one changes its logits by more (1e-4 to 1), also in small models with PyTorch's
# initial weights. Otherwise the difference is 0, except with experts, whose products depend on all tokens of the batch.
PACKING_TOLERANCE = 3e-5
# Relative. Rows of another length are summed in another order (1e-6 in fp32). A wrong position gives 1e-2 or more.
PADDING_TOLERANCE = 1e-3
# A difference counts only above this multiple of the noise, which two rows show that should give equal logits.
TIMES_NOISE = 10


class BatchingChangesExamples(ValueError):
    """The logits of an example depend on the rest of the batch."""


class PackingCheck(TrainerCallback):
    """Check before the first evaluation and step that the wrapped model keeps packed examples apart.

    Args:
        trainer: the run's trainer; callbacks get its ``model_wrapped`` in no other way.
        collator: makes batches of packed rows.
        tokens: token ids of any training example.
    """

    def __init__(self, trainer: Trainer, collator: Collator, tokens: list[int]) -> None:
        self.trainer, self.collator, self.tokens = trainer, collator, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_separate_examples(self.trainer.model_wrapped, args, self.collator, self.tokens)


def require_position_ids(model: Any) -> None:
    """Refuse packing for models without ``position_ids``, which separate the examples of a row.

    Args:
        model: the model as transformers made it.

    Raises:
        BatchingChangesExamples: the model's forward has no such argument, so Trainer would drop the column.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise BatchingChangesExamples(
            f"packing=True: {type(model).__name__} takes no position_ids, so the examples of a row would see each "
            "other; drop --packing"
        )


def require_separate_examples(model: Any, arguments: Any, collator: Collator, tokens: list[int]) -> None:
    """Refuse packing if an example's logits depend on the example before it; every rank must call.

    Args:
        model: the wrapped model; its configuration says whether it uses a cache.
        arguments: the run's training arguments.
        collator: makes batches of packed rows.
        tokens: token ids of any training example, at least one.

    Raises:
        BatchingChangesExamples: the logits depend on it.
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
    """Return how much an example's first logits change with an example before it, or 0 if that is noise.

    The change is relative. The first token should attend to itself only, so its logits behind another example are
    compared with those in front of it. A third row, whose rest differs, shows the noise of experts.

    Args:
        model: the wrapped model.
        device: the model's device.
        collator: makes batches of packed rows.
        example: token ids of the example.
        several: whether the rows form one batch.
    """
    length, other = len(example), example[::-1]
    pairs = ((other, example), (example, other), (example, example))
    rows = [pack([{"input_ids": list(ids), "labels": list(ids)} for ids in pair], 2 * length)[0] for pair in pairs]
    batches = [collator(rows)] if several else [collator([row]) for row in rows]
    with _inference(model):
        logits = torch.cat([_logits(model, batch, device) for batch in batches])
    behind, front, front_again = logits[0, length], logits[1, 0], logits[2, 0]
    change, noise = _difference(behind, front), _difference(front_again, front)
    return 0.0 if change <= max(PACKING_TOLERANCE, TIMES_NOISE * noise) else change  # change may be NaN


def require_same_in_batch(model: Any, prompt: list[int]) -> None:
    """Refuse batches for models that answer a prompt otherwise if it is padded on the left.

    Args:
        model: a model for :func:`launchers.evaluation.generation.generate`.
        prompt: token ids of any prompt; its beginning serves as a short and as a long prompt.

    Raises:
        BatchingChangesExamples: the logits of the next tokens differ between the prompt alone and in a batch.
    """
    short, long = prompt[: TRIED_TOKENS // 2], prompt[: 2 * TRIED_TOKENS]
    if len(short) == len(long):
        return
    with _inference(model):
        alone_short, alone_long, both = (_next_logits(model, prompts) for prompts in ([short], [long], [short, long]))
    noise = _difference(both[0][1], alone_long[0][0])
    difference = _difference(both[0][0], alone_short[0][0])
    if both[0][0].argmax() == alone_short[0][0].argmax():  # otherwise the second tokens follow different first tokens
        difference = max(difference, _difference(both[1][0], alone_short[1][0]))
    if not difference <= max(PADDING_TOLERANCE, TIMES_NOISE * noise):
        raise BatchingChangesExamples(
            f"batch_size: this model answers otherwise in a batch (the logits of a padded prompt change by "
            f"{difference:.2g} of their size); set --batch_size 1"
        )


def _next_logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Return the logits of the next two tokens, each ``[prompts, vocabulary]``."""
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
    """Return the difference of two vectors of logits, without their means, relative to the second one's norm.

    A constant that is added to all logits changes no probability, so it does not count.
    """
    one, other = (logits - logits.mean() for logits in (one, other))
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Run without dropout and gradients, and restore the random number generators afterwards."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
