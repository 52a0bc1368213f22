"""The options of scripts without a room of their own. They are known before torch is imported."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import field
from pathlib import Path

from reflora_dist.command_line.parse import OneLineParser

from .training.options import MODEL_DTYPES


@dataclasses.dataclass
class ExportOptions:
    """The options of export.py."""

    adapter: str = field(metadata={"help": "Folder of an adapter in PEFT's format, or a sharded checkpoint."})
    output_dir: str = field(metadata={"help": "Where to write; must not exist, or be empty."})
    adapter_name: str = field(
        default="default", metadata={"help": "The adapter's name in a sharded checkpoint, where there are several."}
    )
    merge: bool = field(
        default=False, metadata={"help": "Merge the adapter into its base: a model that needs no PEFT."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Base to merge into, path or hub name. Default: the adapter's own."}
    )
    model_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the merged model; auto: that in which the base is stored.",
            "choices": MODEL_DTYPES,
        },
    )
    from_state: bool = field(
        default=False,
        metadata={
            "help": "Read the sharded state (under DeepSpeed fp32 masters) even where an adapter's file lies beside it."
        },
    )
    trust_pickles: bool = field(
        default=False,
        metadata={"help": "Unpickle whatever a sharded state holds, which can run code; only for what you trust."},
    )
    adapter_config: str | None = field(
        default=None,
        metadata={"help": "adapter_config.json of a sharded checkpoint, or its folder. Default: in it, or above it."},
    )

    def __post_init__(self) -> None:
        for name, default in (("model", None), ("model_dtype", "auto")):
            if not self.merge and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing without --merge: add it or drop this")


def ask_parser() -> argparse.ArgumentParser:
    """Return the parser of ask.py."""
    parser = OneLineParser(prog="ask.py", description="Answer questions with a saved adapter.")
    parser.add_argument("--adapter", required=True, help="folder with adapter_model.safetensors")
    parser.add_argument("--question", help="one question")
    parser.add_argument("--input", default="", help="further input to the question")
    parser.add_argument("--records", help="instead: ask the first questions of this file, show the reference too")
    parser.add_argument("--count", type=int, default=3, help="how many records to ask")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of compare.py."""
    parser = OneLineParser(prog="compare.py", description="Compare finished fine-tuning runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finetune.py")
    parser.add_argument("--plot", type=Path, default=Path("outputs/comparison.png"), help="file of the plot")
    return parser


def meeting_parser() -> argparse.ArgumentParser:
    """Return the parser of cluster/meeting.py."""
    parser = OneLineParser(prog="meeting.py", description="Make machines meet before a launch, and compare them.")
    parser.add_argument("--nodes", type=int, required=True, help="number of machines")
    parser.add_argument("--node_rank", type=int, required=True, help="this machine's number; 0 has the head's address")
    parser.add_argument("--head", required=True, help="address of machine 0, as all machines reach it")
    parser.add_argument("--port", type=int, required=True, help="the launcher's; the machines meet at the one after it")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds until all have to be there")
    parser.add_argument("facts", nargs="*", help="NAME=VALUE, to be the same on all machines")
    return parser
