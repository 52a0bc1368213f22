"""Put questions to saved adapters, and to their base, side by side.

python launchers/ask.py --adapter outputs/reflora --question "What does the method str.split do?"
python launchers/ask.py --adapter outputs/lora outputs/reflora --base --records held_out.jsonl --count 3
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
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

from tqdm.auto import tqdm

from reflora_dist.files.base_files import load_tokenizer
from reflora_dist.files.smollm2 import resolve_model

from .cluster.waiting import stage
from .data.forms import Record, last_exchange
from .data.records import load_records
from .data.tokenization import encode_last_question
from .evaluation.generation import base_of, generate, generation_config, load_model, own_device, tokenizer_of
from .training.recorded import recorded_template

BASE = "the base"


def load(base: str, adapter: str | None, template: str) -> tuple[Any, Any]:
    """Return the base, with the adapter on it if one is given, and the tokenizer.

    Raises:
        ValueError: the folder holds no adapter, adapter or base cannot be loaded, or the tokenizer lacks the template.
    """
    tokenizer = load_tokenizer(tokenizer_of(base, adapter))
    config = generation_config(tokenizer, template=template)
    return load_model(base, adapter, "auto", own_device(), config), tokenizer


def answers(options: argparse.Namespace, records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the answers of every model to the last question of each record, by the names that are printed.

    Decoding is greedy. The base answers to the prompt template of the first adapter. One model is in memory at a time.

    Raises:
        ValueError: an adapter or a base cannot be loaded, or the tokenizer lacks the template.
    """
    base = resolve_model(options.model) if options.model else None
    asked: list[tuple[str, str | None]] = [(Path(adapter).name, adapter) for adapter in options.adapter]
    if options.base:
        asked.insert(0, (BASE, None))
    if len({name for name, _ in asked}) < len(asked):
        asked = [(adapter or BASE, adapter) for _, adapter in asked]
    given: dict[str, list[str]] = {}
    with tqdm(total=len(asked) * len(records), desc="answers", unit="") as bar:
        for name, adapter in asked:
            like = adapter or options.adapter[0]
            template = recorded_template(like) or "plain"
            with stage(f"loading {name} on" if adapter else "loading", base or base_of(like)):
                model, tokenizer = load(base or base_of(like), adapter, template)
            given[name] = []
            for record in records:
                prompt = encode_last_question(tokenizer, record, template)
                given[name] += generate(model, tokenizer, [prompt], options.max_new_tokens)
                bar.update()
    return given


def main() -> None:
    parser = ask_parser()
    options = parser.parse_args()
    if bool(options.question) == bool(options.records):
        parser.error("give either --question or --records")
    try:
        if options.records:
            records = load_records([options.records])[: options.count]
        else:
            records = [Record(instruction=options.question, input=options.input, output="")]
        given = answers(options, records)
    except ValueError as error:
        raise SystemExit(f"ask.py: error: {error}") from error
    width = max(map(len, (*given, "reference")))
    for number, record in enumerate(records):
        question, reference = last_exchange(record)
        print(f"Q: {question}".rstrip())
        for name, texts in given.items():
            print(f"A: {texts[number]}" if len(given) == 1 else f"   {name:{width}}  {texts[number]}")
        if options.records:
            print(f"   {'reference':{width}}  {reference}")


if __name__ == "__main__":
    run_command(main)
