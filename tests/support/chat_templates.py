"""Chat templates in the shapes that published models have, and tokenizers with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.launchers import TOKENIZERS

_TURN = "<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_ANSWER = "<|im_start|>assistant\n{% generation %}{{ CONTENT }}<|im_end|>{% endgeneration %}\n"
# reasoning is kept in the last turn only
_LAST_REASONING = "m.content if loop.last else m.content.split('</think>')[-1].lstrip()"


def _chatml(content: str = "m.content", answer: str = _TURN) -> str:
    turn = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + _TURN + "{% endif %}"
    return ("{% for m in messages %}" + turn + "{% endfor %}" + _PROMPT).replace("CONTENT", content)


TEMPLATES = {
    "chatml": _chatml(),
    "marked": _chatml(answer=_ANSWER),
    # a start token, headers, trimmed contents
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # no system turn, users and assistants by turns, another name for the assistant
    "strict": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # no generation prompt; the end token ends an answer
    "inst": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
}
LOOKING_AHEAD = _chatml(content=_LAST_REASONING)
LOOKING_AHEAD_MARKED = _chatml(content=_LAST_REASONING, answer=_ANSWER)
ENDS = {
    "chatml": "<|im_end|>",
    "marked": "<|im_end|>",
    "headers": "<|eot_id|>",
    "strict": "<end_of_turn>",
    "inst": None,  # the tokenizer's own end token
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


def chat_tokenizer(folder: Path, template: str, kind: str = "fast") -> Any:
    """A tokenizer with a chat template and the templates' special tokens.

    Args:
        folder: where it is written.
        template: a name in TEMPLATES, or a template.
        kind: a name in TOKENIZERS.
    """
    tokenizer = TOKENIZERS[kind](folder)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.chat_template = TEMPLATES.get(template, template)
    tokenizer.save_pretrained(folder)
    return tokenizer
