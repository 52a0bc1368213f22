"""``--config run.yaml``: options from a file, under the names that they have on the command line."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from reflora_dist.command_line.parse import resembling

from ..configurations import shipped_configuration, shipped_names

# What users of other scripts type, and the option that they mean.
OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "data": "dataset",
    "data_path": "dataset",
    "train_file": "dataset",
    "dataset_name": "dataset",
    "validation_file": "eval_dataset",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
}
RUN_FILE = "run.yaml"
RUN_FILE_HEAD = "# The settings of the run in this folder"
EXAMPLES = "launchers/examples"
_LARGEST = 2**20
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys and values"}


def find_run_file(name: str) -> Path:
    """Return the file of ``--config``: a path, or the name of a shipped example.

    Raises:
        ValueError: there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    try:
        return shipped_configuration(f"{EXAMPLES}/{name}.yaml")
    except ValueError:
        examples = ", ".join(shipped_names(EXAMPLES))
        raise ValueError(
            f"config={name!r}: no such file; give a YAML file, or the name of an example: {examples}"
        ) from None


def read_run_file(path: Path, option_classes: Iterable[Any]) -> dict[str, Any]:
    """Return the options that a file sets.

    Args:
        path: a YAML file of keys and values.
        option_classes: the dataclasses whose fields are the options.

    Raises:
        ValueError: the file cannot be read or holds no mapping, or a key is unknown, there twice, or has a value of
            the wrong type; the message names file, key and value.
    """
    fields: dict[str, dataclasses.Field[Any]] = {}
    hints: dict[str, Any] = {}
    for cls in option_classes:
        fields |= {field.name: field for field in dataclasses.fields(cls) if field.init}
        hints |= typing.get_type_hints(cls)
    values = {}
    for name, value in read_mapping(path).items():
        if name not in fields:
            near = " or ".join(resembling(str(name), list(fields), OTHER_NAMES))
            raise ValueError(f"{path}: there is no option {name}" + (f"; did you mean {near}?" if near else ""))
        try:
            values[name] = _checked(value, hints[name], fields[name].metadata.get("choices"))
        except ValueError as error:
            raise ValueError(f"{path}: {name}={value!r:.80} {error}") from error
    return values


def run_file_text(comments: Iterable[str], options: Mapping[str, Any]) -> str:
    """Return the content of a file of these options, which :func:`read_run_file` reads, below lines of comments."""
    return "\n".join(comments) + "\n" + yaml.dump(dict(options), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_written_by_a_run(path: Path) -> bool:
    """Return whether a file is the ``run.yaml`` of a run, by its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline(len(RUN_FILE_HEAD)) == RUN_FILE_HEAD
    except (OSError, ValueError):
        return False


def read_mapping(path: Path) -> Mapping[Any, Any]:
    """Return the keys and values of a YAML file, unchecked.

    Raises:
        ValueError: the file cannot be read, or holds no mapping.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config {path} cannot be read: {cause:.300}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"config {path} holds {content!r:.40} where options and their values are wanted: `option: value`"
        )
    return content


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's plain values: ``no`` is text, ``3e-4`` a number. Keys may not be there twice."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # none of YAML 1.1's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"*{event.anchor} in line {event.start_mark.line + 1} refers to another value: write it out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes a text with quotes where :class:`_Loader` would read a number, as in ``12e45``."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_FLOAT = r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)"),
    ("float", rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _checked(value: Any, hint: Any, choices: Iterable[Any] | None) -> Any:
    """Return a value in the form in which the command line would give it.

    Raises:
        ValueError: it is of another type than the option, or none of its choices; the message is the end of a sentence.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and list[str] in kinds and str not in kinds:
        value = [value]  # the command line takes one word for a list, too
    if not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"must be {' or '.join(dict.fromkeys(map(_named, kinds)))}")
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    choices = list(choices or [member.value for kind in enums for member in kind])
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(map(str, choices))}")
    return float(value) if float in kinds and not isinstance(value, str) else value


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if origin is float:
        return type(value) in (int, float)
    if origin in (bool, int, dict):
        return type(value) is origin
    return isinstance(value, str) and isinstance(origin, type) and issubclass(origin, str | enum.Enum)


def _named(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is list:
        return "a list of texts"
    if origin is type(None):
        return "null"
    return _KINDS.get(origin, "text" if isinstance(origin, type) and issubclass(origin, enum.Enum) else str(kind))
