"""Load a saved adapter with PEFT and answer questions with it.

python launchers/ask.py --adapter outputs/reflora --question "What does the method str.split do?"
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("launchers.ask", run_name="__main__", alter_sys=True)
    raise SystemExit

from .options import ask_parser

if __name__ == "__main__":
    ask_parser().parse_args()  # --help and mistakes are answered before torch is imported, which takes seconds

from reflora_dist.files.base_files import load_tokenizer

from .data.forms import last_exchange
from .data.records import load_records
from .data.tokenization import encode_last_question, encode_questions
from .evaluation.generation import base_of, generate, generation_config, load_model, own_device, tokenizer_of
from .training.recorder import recorded_template


def load(adapter: str, template: str = "plain") -> tuple[Any, Any]:
    """Return the base that the adapter's configuration names, with the adapter on it, and the tokenizer.

    Raises:
        ValueError: the folder holds no adapter, adapter or base cannot be loaded, or the tokenizer lacks the template.
    """
    base_name = base_of(adapter)
    tokenizer = load_tokenizer(tokenizer_of(base_name, adapter))
    config = generation_config(tokenizer, template=template)
    return load_model(base_name, adapter, "auto", own_device(), config), tokenizer


def answer(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int = 64) -> str:
    """Return the model's answer to the token ids of a question, with greedy decoding."""
    return generate(model, tokenizer, [prompt], max_new_tokens)[0]


def main() -> None:
    parser = ask_parser()
    options = parser.parse_args()
    if bool(options.question) == bool(options.records):
        parser.error("give either --question or --records")
    try:
        template = recorded_template(options.adapter) or "plain"
        model, tokenizer = load(options.adapter, template)
        records = load_records([options.records])[: options.count] if options.records else []
        asked = [last_exchange(record) for record in records]
        prompts = [encode_last_question(tokenizer, record, template) for record in records]
        if options.question:
            prompts = encode_questions(tokenizer, [(options.question, options.input)], template)
    except ValueError as error:
        raise SystemExit(f"ask.py: error: {error}") from error
    if options.question:
        print(f"Q: {options.question}\nA: {answer(model, tokenizer, prompts[0])}")
    for prompt, (question, reference) in zip(prompts, asked, strict=False):
        print(f"Q: {question}\nA: {answer(model, tokenizer, prompt)}\n   reference: {reference}")


if __name__ == "__main__":
    main()
