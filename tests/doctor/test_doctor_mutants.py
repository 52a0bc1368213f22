"""The doctor's verdict on shipped configurations with something wrong in them is that of the libraries.

``pytest tests/doctor/test_doctor_mutants.py --examples 1000 -s`` tries more, and prints how many.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from reflora_dist.doctor import DoctorOptions, diagnose
from tests.support import tally
from tests.support.doctor import SHIPPED
from tests.support.doctor_oracle import refusal

pytestmark = pytest.mark.slow

# the oracle's single process cannot share sequences with ranks that do not exist
ORIGINALS = [path for path in SHIPPED if path.stem not in ("fsdp2_context_parallel", "deepspeed_zero3_ulysses")]
KIND = "mutated configuration files, in the doctor"
# Why the doctor may refuse what the libraries take: a part of its message, by the reason.
STRICTER = {
    "a key twice, of which libraries take the last": "is there twice",
    "a section that is no mapping, which accelerate passes over": "is not a section of keys and values",
    "attach refuses it": "attach refuses it",
    "another kind of parallelism, or none": "is not supported",
    "accelerate trains without FSDP on CPUs": "plain DDP instead of FSDP",
    "accelerate launch starts one process only": "starts one process",
    "a number below 1 that accelerate takes for 1": "is no whole number above 0",
    "a list of layers would be wrapped in a larger model": "cannot wrap a list of layers",
    "processes that machines do not share evenly": "every machine starts",
    "DeepSpeed and the trainer accumulate differently": "DeepSpeed makes a step of",
    "ranks that the second copy does not divide": "does not divide the",
}
VALUES: list[Any] = [
    None,
    -1,
    0,
    1.5,
    "abc",
    "yes",
    "true",
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
    "NOSUCH",
    3,
    "auto",
]
MORE: list[tuple[str, Any]] = [
    ("optimizer", {"type": "SGD", "params": {"lr": 1e-3}}),
    ("optimizer", {"type": "AdamW", "params": {"lr": -1, "torch_adam": True}}),
    ("optimizer", {"type": "AdamW", "params": {"learning_rate": 1e-3}}),
    ("optimizer", {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}),
    ("optimizer", {"params": {"lr": 1e-3}}),
    ("scheduler", {}),
    ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}),
    ("scheduler", {"type": "WarmupDecayLR", "params": {}}),
    ("scheduler", {"type": "StepLR", "params": {"step_size": 10}}),
    ("prescale_gradients", True),
    ("gradient_predivide_factor", 0),
    ("data_types", {"grad_accum_dtype": "fp31"}),
    ("communication_data_type", "fp8"),
    ("zero_allow_untested_optimizer", "abc"),
    ("sequence_parallel_size", 2),
    ("steps_per_print", None),
    ("train_batch_size", 4),
    ("dynamo_config", {"dynamo_backend": "NOSUCH"}),
    ("main_process_port", "abc"),
    ("gpu_ids", "0"),
    ("same_network", "abc"),
]


def _places(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found += [(*path, key), *(_places(value, (*path, key)) if isinstance(value, dict) else ())]
    return found


def mutant(original: Path, chance: random.Random) -> tuple[str, str]:
    """The text of a file with one thing changed, and what that is."""
    is_json = original.suffix == ".json"
    tree = copy.deepcopy(json.loads(original.read_text()) if is_json else yaml.safe_load(original.read_text()))
    what = [_change(tree, chance) for _ in range(chance.choice([1, 1, 2]))]
    text = json.dumps(tree, indent=1) if is_json else yaml.safe_dump(tree)
    if chance.random() < 0.05:
        line = chance.choice([line for line in text.splitlines() if ":" in line])
        again = line.split(":")[0] + (": null," if is_json else ": null")
        text = text.replace(line, f"{again}\n{line}", 1)
        what.append(f"{again.strip()} before {line.strip()}")
    return text, f"{original.name}: {', '.join(what)}"


def _change(tree: dict[str, Any], chance: random.Random) -> str:
    *path, key = chance.choice(_places(tree))
    section = tree
    for name in path:
        section = section[name]
    kind = chance.choice(["drop", "rename", "more", *["value"] * 4])
    name, value = key, section[key]
    if kind == "drop":
        del section[key]
    elif kind == "rename":
        name = chance.choice([key[:-1], key + "s", key.upper(), chance.choice(_places(tree))[-1]])
        section[name] = section.pop(key)
    elif kind == "more":
        name, value = chance.choice(MORE)
        tree[name] = copy.deepcopy(value)
    else:
        value = chance.choice([*VALUES, -value if isinstance(value, int) else None, [value], {key: value}])
        section[key] = copy.deepcopy(value)
    return f"{kind} {'.'.join([*path, key])} {name} {value!r}"


def _tried(path: Path, what: str) -> str:
    """The verdict on the verdict: "right, ...", "stricter: REASON" or "wrong: ..."."""
    needed = 8 if "hpz" in path.name else 1
    really = refusal(path, needed)
    findings = diagnose([str(path)], DoctorOptions(world_size=needed if path.suffix == ".json" else None)).findings
    errors = [finding.message for finding in findings if finding.level == "error"]
    if bool(errors) == bool(really):
        return "right, refused" if really else "right, taken"
    for reason, part in STRICTER.items():
        if errors and all(any(known in error for known in STRICTER.values()) for error in errors) and part in errors[0]:
            return f"stricter: {reason}"
    return f"wrong: {what}: the doctor says {errors}, the libraries {really!r}"


@pytest.mark.parametrize("path", ORIGINALS, ids=lambda path: path.stem)
def test_the_oracle_takes_what_is_shipped(path: Path) -> None:
    assert refusal(path, 8 if "hpz" in path.name else 1) is None


@pytest.mark.timeout(0)
def test_the_verdict_on_a_mutant_is_that_of_the_libraries(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    count: Counter[str] = Counter()
    for index in range(request.config.getoption("--examples") or 20):
        chance = random.Random(index)
        original = ORIGINALS[index % len(ORIGINALS)]
        text, what = mutant(original, chance)
        path = tmp_path / original.name
        path.write_text(text)
        verdict = _tried(path, f"{index} {what}")
        count[verdict] += 1
        if verdict.startswith("wrong"):
            print(verdict, flush=True)
            tally.COUNTS[KIND]["faults"] += 1
        else:
            tally.COUNTS[KIND]["right" if verdict == "right, taken" else "refused"] += 1
        if index % 100 == 99:
            print(index + 1, "tried", flush=True)
    print(
        f"\n{sum(count.values())} mutants",
        *(f"{number} {verdict}" for verdict, number in count.most_common()),
        sep="\n",
    )
    assert not [verdict for verdict in count if verdict.startswith("wrong")], count
