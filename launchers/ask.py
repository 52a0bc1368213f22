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
from .screen.commands import begin_command, run_command

if __name__ == "__main__":
    ask_parser().parse_args()  # --help and mistakes are answered before torch is imported, which takes seconds
    begin_command()

from reflora_dist.files.base_files import load_tokenizer

from .cluster.waiting import stage
from .data.records import load_records
from .data.tokenization import encode_prompts, format_prompt
from .evaluation.generation import base_of, generate, generation_config, load_model, own_device, tokenizer_of
from .training.recorder import recorded_template


def load(adapter: str) -> tuple[Any, Any]:
    """Return the base that the adapter's configuration names, with the adapter on it, and the tokenizer.

    Raises:
        ValueError: the folder holds no adapter, or adapter or base cannot be loaded.
    """
    base_name = base_of(adapter)
    tokenizer = load_tokenizer(tokenizer_of(base_name, adapter))
    return load_model(base_name, adapter, "auto", own_device(), generation_config(tokenizer)), tokenizer


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64) -> str:
    """Return the model's answer with greedy decoding."""
    return generate(model, tokenizer, encode_prompts(tokenizer, [prompt]), max_new_tokens)[0]


def main() -> None:
    parser = ask_parser()
    options = parser.parse_args()
    if bool(options.question) == bool(options.records):
        parser.error("give either --question or --records")
    try:
        with stage("loading the model and the adapter"):
            model, tokenizer = load(options.adapter)
        records = load_records([options.records])[: options.count] if options.records else []
        template = recorded_template(options.adapter) or "plain"
    except ValueError as error:
        raise SystemExit(f"ask.py: error: {error}") from error
    if options.question:
        prompt = format_prompt(options.question, options.input, template)
        print(f"Q: {options.question}\nA: {answer(model, tokenizer, prompt)}")
    for record in records:
        print(f"Q: {record['instruction']} {record['input']}")
        print(f"A: {answer(model, tokenizer, format_prompt(record['instruction'], record['input'], template))}")
        print(f"   reference: {record['output']}")


if __name__ == "__main__":
    run_command(main)
