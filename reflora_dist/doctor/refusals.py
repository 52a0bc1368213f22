"""Errors and warnings of libraries in one line, with remedies."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LIBRARIES = {
    "deepspeed": "DeepSpeed",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "torch": "torch",
    "peft": "PEFT",
}
_LONGEST = 400
# What is said in every run, whatever its file says.
_ALWAYS = (
    "Gradient accumulation steps mismatch",  # Trainer accumulates by itself, and tells accelerate 1
    "Attempting to get learning rate from scheduler before it has started",
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`",  # torch looks at another optimizer
)
_DEEPSPEED_SECTIONS = ("fp16", "bf16", "zero_optimization", "optimizer", "scheduler")
# Remedies, by a part of a library's message.
_REMEDIES = {
    "train_batch_size or train_micro_batch_size_per_gpu": '"train_micro_batch_size_per_gpu": "auto"',
    "mismatch TrainingArguments": 'set these values to "auto", or give theirs: --micro_batch_size, '
    "--gradient_accumulation_steps",
    "Check batch related parameters": '"gradient_accumulation_steps": "auto"; accelerate takes 1 where it is absent',
    "accelerate config variables will be ignored": "take them out of accelerate's file",
    "DeepSpeedZeRoOffload": 'give the optimizer its "type", or remove its section',
    "zero_allow_untested_optimizer": 'set "zero_allow_untested_optimizer": true, or use AdamW',
    "untested ZeRO optimizer": 'set "zero_allow_untested_optimizer": true, or use AdamW',
    "get_last_lr": 'give the scheduler its "type" and "params", or remove its section',
    "with reduce scatter enabled": "remove prescale_gradients, or set zero_optimization.reduce_scatter to false",
    "ParallelismConfig": "dp_replicate_size x dp_shard_size has to be the number of ranks",
}


def refusal(error: BaseException) -> dict[str, str]:
    """Return the "library" that raised an error, and its message as one "sentence"."""
    frames = traceback.extract_tb(error.__traceback__)
    owners = [_library(frame.filename) for frame in frames]
    index = max((i for i, owner in enumerate(owners) if owner), default=len(frames) - 1)
    sentence = " ".join(str(error).split())
    sentence = re.sub(r" ?For further information visit \S+", "", sentence)
    if not sentence or isinstance(error, KeyError | AttributeError | TypeError | AssertionError):
        frame = frames[index]  # such a message says little without the place
        place = f"{Path(frame.filename).name}: {frame.line}" if frame.line else Path(frame.filename).name
        sentence = f"{sentence} (at {place})" if sentence else place
    sentence = f"{type(error).__name__}: {sentence}"
    return {"library": owners[index] or "Python", "sentence": sentence[:_LONGEST]}


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the libraries' warnings inside the block, each once. torch's are left out: they concern its own API."""
    found: list[str] = []

    def hear(library: str, sentence: str) -> None:
        line = f"{library}: {' '.join(sentence.removeprefix('[RANK 0] ').split())}"[:_LONGEST]
        if not any(part in line for part in _ALWAYS) and library != _LIBRARIES["torch"] and line not in found:
            found.append(line)

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: hear(_library(record.pathname), record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("deepspeed", "DeepSpeed", "transformers", "accelerate", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield found
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            for warning in caught:
                library = _library(warning.filename)
                if library and warning.category is UserWarning:
                    hear(library, str(warning.message))


def remedy(sentence: str, contents: dict[str, Any]) -> str:
    """Return the remedy for a library's message about a file with these contents."""
    for name in _DEEPSPEED_SECTIONS:
        if name in contents and not isinstance(contents[name], dict):
            return f"{name}: {contents[name]!r} is not a section of keys and values: fill it in, or remove it"
    return next((helps for part, helps in _REMEDIES.items() if part in sentence), "correct or remove that key")


def _library(file: str) -> str:
    """Return the library that a source file belongs to; empty for other files."""
    parts = Path(file).parts
    return next((_LIBRARIES[part] for part in reversed(parts) if part in _LIBRARIES), "")
