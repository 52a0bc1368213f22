"""Limits of a loaded model: the tokens that its embedding has rows for, and the length of its rows.

Beyond a limit an index is out of range in some later step: an IndexError on a CPU, a device assert on a GPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from reflora_dist.checkpoints.embeddings import input_embedding
from reflora_dist.collectives.ranks import is_first_rank

from .tokenization import padding_token

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a model. None means that no limit is known.

    Attributes:
        tokens: number of rows of the embedding.
        positions: size of the table of positions, learned or computed; a longer row is an error.
        advised: ``max_position_embeddings`` if there is no table; the model was not trained for longer rows.
    """

    tokens: int | None
    positions: int | None
    advised: int | None

    @classmethod
    def of(cls, model: Any) -> Limits:
        """Return the limits of a model that is not wrapped yet. Under ZeRO-3 its weights may be partitioned."""
        tokens = getattr(input_embedding(model), "num_embeddings", None)
        config = model.config.get_text_config()
        positions = min(_position_tables(model), default=None)
        if config.model_type == "mpt":
            positions = config.max_seq_len  # length of its ALiBi biases
        advised = getattr(config, "max_position_embeddings", None) if positions is None else None
        return cls(tokens, positions, advised if isinstance(advised, int) and advised > 0 else None)

    def padded_multiple(self, multiple: int = 8) -> int:
        """Return ``multiple`` if padding to it stays within the positions, else 1."""
        return 1 if self.positions is not None and self.positions % multiple else multiple

    def require_tokens(self, tokenizer: Any, ids: dict[str, Any]) -> None:
        """Refuse tokens without a row in the embedding, including those for padding and for the end of an answer.

        Args:
            tokenizer: the tokenizer that encodes them.
            ids: the highest id by place; error messages name the place.

        Raises:
            ValueError: a token has no row.
        """
        if self.tokens is None:
            return
        sizes = (
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model's embedding "
            f"{self.tokens} rows"
        )
        special = {"padding": padding_token(tokenizer), "the end of an answer": tokenizer.eos_token_id}
        for place, token in (ids | special).items():
            if token is not None and token >= self.tokens:
                raise ValueError(
                    f"{sizes}: {place} needs token {token} ({tokenizer.convert_ids_to_tokens(token)!r}); give the "
                    "--tokenizer of this model, or a model whose embedding was resized for this tokenizer"
                )
        if len(tokenizer) > self.tokens and is_first_rank():
            logger.warning("%s; no text here needs the tokens without a row", sizes)


def _position_tables(model: nn.Module) -> Iterable[int]:
    """Yield the number of positions of each table. The first rows of OPT's and RoBERTa's tables are unused."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (name == "wpe" or ("pos" in name and "rel" not in name)):
            unused = getattr(module, "offset", None)
            if unused is None:
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - unused
    for path, buffer in model.named_buffers():  # GPT-J, CodeGen, CTRL
        if path.rpartition(".")[2] in ("embed_positions", "pos_encoding") and buffer.dim() == 2:
            yield buffer.shape[0]


def check_examples(model: Any, tokenizer: Any, data: Mapping[str, Any]) -> Limits:
    """Check the training and evaluation examples against the limits of a loaded model. Return the limits.

    Args:
        model: the model, not wrapped yet.
        tokenizer: the tokenizer that encoded the examples.
        data: ``datasets.Dataset`` of examples, by the option that names them.

    Raises:
        ValueError: a token has no row in the embedding, or an example has more tokens than the model has positions.
    """
    limits = Limits.of(model)
    ids = {f"--{name}": _maximum(examples, "input_ids") for name, examples in data.items()}
    limits.require_tokens(tokenizer, ids)
    for name, examples in data.items():
        longest = _longest(examples)  # packed rows, too: masks of GPT-Neo and MPT have no more columns
        if limits.positions is not None and longest > limits.positions:
            raise ValueError(
                f"--{name}: the longest row has {longest} tokens and the model {limits.positions} positions; set "
                f"--max_length {limits.positions} or lower"
            )
        if "position_ids" in examples.column_names:
            longest = _maximum(examples, "position_ids") + 1
        if limits.advised is not None and longest > limits.advised and is_first_rank():
            logger.warning(
                "--%s: the longest example has %d tokens, and max_position_embeddings of the model is %d: it was not "
                "trained for the positions beyond. --max_length %d cuts them off",
                *(name, longest, limits.advised, limits.advised),
            )
    return limits


def _maximum(examples: Any, column: str) -> int:
    import pyarrow.compute

    chunks = examples.with_format("arrow")[:][column].chunks
    return max(pyarrow.compute.max(chunk.flatten()).as_py() for chunk in chunks)


def _longest(examples: Any) -> int:
    import pyarrow.compute

    chunks = examples.with_format("arrow")[:]["input_ids"].chunks
    return max(pyarrow.compute.max(pyarrow.compute.list_value_length(chunk)).as_py() for chunk in chunks)
