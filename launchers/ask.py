"""Load a saved adapter with PEFT and answer questions with it.

python launchers/ask.py --adapter outputs/reflora --question "What does the method str.split do?"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from launchers.records import load_records
from launchers.tokenization import encode_prompts, format_prompt
from reflora_dist import lora_sb  # noqa: F401  (adapters that PEFT does not know by itself)


def load(adapter: str) -> tuple[Any, Any]:
    """The base named in the adapter's configuration with the adapter on it, and its tokenizer.

    Raises:
        ValueError: the folder holds no adapter.
    """
    try:
        base_name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter={adapter!r} holds no adapter_config.json ({error})") from error
    base = AutoModelForCausalLM.from_pretrained(base_name)
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(base_name)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, further_input: str = "", max_new_tokens: int = 64) -> str:
    """The model's most likely answer, token by token."""
    prompt = torch.tensor(encode_prompts(tokenizer, [format_prompt(question, further_input)]))
    generated = model.generate(
        input_ids=prompt.to(model.device),
        attention_mask=torch.ones_like(prompt, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer questions with a saved adapter.")
    parser.add_argument("--adapter", required=True, help="folder with adapter_model.safetensors")
    parser.add_argument("--question", help="one question")
    parser.add_argument("--input", default="", help="further input to the question")
    parser.add_argument("--records", help="instead: ask the first questions of this file, show the reference too")
    parser.add_argument("--count", type=int, default=3, help="how many records to ask")
    options = parser.parse_args()
    if bool(options.question) == bool(options.records):
        parser.error("give either --question or --records")
    try:
        model, tokenizer = load(options.adapter)
        records = load_records([options.records])[: options.count] if options.records else []
    except ValueError as error:
        raise SystemExit(f"ask.py: error: {error}") from error
    if options.question:
        print(f"Q: {options.question}\nA: {answer(model, tokenizer, options.question, options.input)}")
    for record in records:
        print(f"Q: {record['instruction']} {record['input']}")
        print(f"A: {answer(model, tokenizer, record['instruction'], record['input'])}")
        print(f"   reference: {record['output']}")


if __name__ == "__main__":
    main()
