"""Reading of configuration files; their contents tell for which library they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .values import check_sections

ACCELERATE_SECTIONS = ("fsdp_config", "deepspeed_config", "parallelism_config")
_ACCELERATE_KEYS = ("distributed_type", "compute_environment")
_LARGEST = 2**20
_MOST_VALUES = 100_000


def is_for_accelerate(config: dict[str, Any]) -> bool:
    """Return whether a file's contents are for accelerate, not for DeepSpeed."""
    return any(key in config for key in _ACCELERATE_KEYS)


def read(path: str) -> dict[str, Any]:
    """Return a file's contents.

    Raises:
        ValueError: the file cannot be read, is for neither library, has a duplicate key or no end, or the file or a
            section is not a mapping.
    """
    try:
        text = _text(Path(path))
        is_json = path.endswith(".json") or text.lstrip().startswith("{")
        config = json.loads(text, object_pairs_hook=_once) if is_json else yaml.load(text, _LoadsOnce)
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep to be a configuration") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    _check_unfolded(config)
    if not isinstance(config, dict):
        raise ValueError(f"a configuration is a mapping, this is a {type(config).__name__}")
    if config.get("distributed_type") is False:
        config["distributed_type"] = "NO"  # YAML reads NO as a boolean
    if is_for_accelerate(config):
        check_sections(config, [(name,) for name in ACCELERATE_SECTIONS])
    elif not is_json:
        raise ValueError("there is no distributed_type, which accelerate needs, and DeepSpeed reads JSON only")
    return config


def _text(path: Path) -> str:
    """Read a file, but no pipe, which could block forever, and no file too large for a configuration."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    if size > _LARGEST:
        raise ValueError(f"it has {size:,} bytes, and a configuration has less than {_LARGEST:,}")
    return path.read_text()


def _check_unfolded(config: Any) -> None:
    """YAML's aliases make a short text that has no end, or none within reach."""
    values, count = [config], 0
    while values:
        value = values.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it unfolds to more than {_MOST_VALUES:,} values")
        values.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


class _LoadsOnce(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, as the JSON reader does; yaml itself takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, _ in pairs:
        if sum(other == key for other, _ in pairs) > 1:
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)
