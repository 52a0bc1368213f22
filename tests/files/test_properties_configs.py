"""Random values of every setting: refused by the setting's name, or what is asked is what happens.

``pytest tests/files/test_properties_configs.py --examples 1000`` tries more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from launchers import finetune
from launchers.evaluate import EvaluateOptions
from launchers.export import ExportOptions
from launchers.training.glue_tasks import ClassificationOptions
from launchers.training.options import PEFT_STARTS, DataOptions, LoraOptions, ModelOptions
from reflora_dist import LoRARite, RefLoRAConfig, attach, initialize_adapters
from reflora_dist.lora_sb import METHODS as LATENT_METHODS
from reflora_dist.lora_sb import LoRASBConfig
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.oracles import GradientOracle
from tests.support.small import small_batches, small_model, train_small, trainable
from tests.support.tally import raised_by_us, tried

pytestmark = pytest.mark.slow

_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(2**63)]),
    st.floats(),
    st.sampled_from(["", "x", "11", [], [1], {}, (0.5, 0.5), ("x", 0.5)]),
)
_TEXTS = ["", "x", "-1", "0", "1", "3", "2.5", "1e-3", "nan", "inf", "-inf", "1e400", "true", "None", "[]", "../x"]
_TINY = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def _values(**valid: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the settings, each with a value that it can have, or with any."""
    # not as a union, which would be taken apart: most of what is drawn would be junk
    drawn = {n: st.sampled_from([*[values] * 9, _JUNK]).flatmap(lambda kind: kind) for n, values in valid.items()}
    return st.fixed_dictionaries({}, optional=drawn)


def _is_named(error: BaseException, names: Any) -> bool:
    return raised_by_us(error) and any(f"{name}=" in str(error) for name in names)


@given(
    values=_values(
        method=st.sampled_from(tuple(METHODS)),
        warmup_steps=st.integers(0, 3),
        interval=st.integers(1, 3),
        damping=st.floats(1e-6, 10.0),
        carry_moments=st.booleans(),
    )
)
@settings(deadline=None)
def test_the_methods_configuration(values: dict[str, Any]) -> None:
    with tried("mutated configurations") as outcome:
        try:
            config = RefLoRAConfig(**values)
        except ValueError as error:
            outcome.refused = True
            assert _is_named(error, [*values, "method"]), error
            return
        model = small_model()
        kind = METHOD_OPTIMIZERS.get(config.method, torch.optim.AdamW)
        optimizer = kind(trainable(model), lr=1e-2)
        handle = attach(model, optimizer, config)
        factors = train_small(model, optimizer, small_batches(3))
        assert all(bool(factor.isfinite().all()) for factor in factors.values())
        # reflora-s and balora act after a step, and once before the first; lora-rite and lora-muon in each
        due = [config.is_due(step) for step in range(4)]
        acted = sum(due[1:]) if config.method in ("reflora-s", "balora") else sum(due[:3])
        assert handle.report().applied_steps == acted
        if config.method in ("lora", "reflora", "scaled-gd", "lora-pro"):
            model = small_model()
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
            GradientOracle(model, optimizer, config)
            for name, factor in train_small(model, optimizer, small_batches(3)).items():
                torch.testing.assert_close(factors[name], factor, rtol=1e-6, atol=1e-8)  # as Adam amplifies roundings


@given(
    values=_values(
        lr=st.floats(0, 1),
        betas=st.just((0.9, 0.99)),
        eps=st.floats(1e-9, 1e-3),
        clip_unmagnified_grad=st.floats(0, 2),
        update_capping=st.floats(0, 2),
        update_skipping=st.floats(0, 2),
        weight_decay=st.floats(0, 0.1),
        apply_escape=st.booleans(),
        balance_param=st.booleans(),
    )
)
@settings(deadline=None)
def test_lora_rites_options(values: dict[str, Any]) -> None:
    with tried("mutated configurations") as outcome:
        model = small_model()
        try:
            optimizer = LoRARite(trainable(model), **values)
        except ValueError as error:
            outcome.refused = True
            assert _is_named(error, values), error
            return
        attach(model, optimizer, RefLoRAConfig(method="lora-rite"))
        factors = train_small(model, optimizer, small_batches(2))
        # a step of this size overflows in any optimizer
        overflows = max(values.get("lr", 0), values.get("weight_decay", 0)) > 1e3
        assert overflows or all(bool(factor.isfinite().all()) for factor in factors.values())


@given(
    values=_values(
        method=st.sampled_from(LATENT_METHODS),
        num_batches=st.integers(1, 8),
        learning_rate=st.floats(1e-6, 1.0),
        modules_per_pass=st.integers(1, 8),
        oversampling=st.integers(0, 8),
        power_iterations=st.integers(0, 8),
        seed=st.integers(0, 8),
    )
)
@settings(deadline=None)
def test_lora_sbs_configuration(values: dict[str, Any]) -> None:
    with tried("mutated configurations") as outcome:
        try:
            config = LoRASBConfig(**values)
        except ValueError as error:
            outcome.refused = True
            assert _is_named(error, values), error
            return
        for name in ("num_batches", "modules_per_pass", "oversampling", "power_iterations", "seed"):
            value = getattr(config, name)
            assert value is None or type(value) is int, name
        assert config.learning_rate is None or 0 < config.learning_rate < math.inf


def _parsed(kind: type, values: dict[str, str], **required: str) -> tuple[Any, str]:
    """The options of a command line, or None and what was said on standard error."""
    said = io.StringIO()
    arguments = [f"--{name}={value}" for name, value in {**required, **values}.items()]
    with contextlib.redirect_stderr(said):
        try:
            (options,) = HfArgumentParser(kind).parse_args_into_dataclasses(args=arguments)  # type: ignore[arg-type]
        except SystemExit:
            return None, said.getvalue()
        except ValueError as error:
            assert raised_by_us(error), error
            return None, str(error)
    return options, ""


def _texts(kind: type) -> st.SearchStrategy[dict[str, str]]:
    """Some of the options, most with their default or a choice, others with any text."""
    optional = {}
    for field in dataclasses.fields(kind):
        default = field.default if isinstance(field.default, int | float | str) else "1"
        good = field.metadata.get("choices") or [str(default)]
        optional[field.name] = st.sampled_from([good[i % len(good)] for i in range(6 * len(_TEXTS))] + _TEXTS)
    return st.fixed_dictionaries({}, optional=optional)


def _require_named(said: str, names: Any) -> None:
    assert any(name in said for name in names) and "Traceback" not in said, said


_REQUIRED: dict[type, dict[str, str]] = {
    ModelOptions: {},
    DataOptions: {},
    ClassificationOptions: {},
    EvaluateOptions: {"model": "m"},
    ExportOptions: {"adapter": "a", "output_dir": "o"},
}


@pytest.mark.parametrize("kind", _REQUIRED)
@given(data=st.data())
@settings(deadline=None)
def test_options_of_the_command_line(kind: type, data: st.DataObject) -> None:
    values = data.draw(_texts(kind))
    with tried("mutated command lines") as outcome:
        options, said = _parsed(kind, values, **{k: v for k, v in _REQUIRED[kind].items() if k not in values})
        if options is None:
            outcome.refused = True
            _require_named(said, [*values, "task"])
            return
        for field in dataclasses.fields(kind):
            value = 0 if field.name == "local_rank" else getattr(options, field.name)  # which nobody reads
            numbers = isinstance(value, int | float) and not isinstance(value, bool)
            assert not numbers or (math.isfinite(value) and value >= 0), (field.name, value)


@given(values=_texts(LoraOptions))
@settings(deadline=None)
def test_options_of_the_adapter(values: dict[str, str]) -> None:
    """From the command line to the first step."""
    with tried("mutated command lines") as outcome:
        lora, said = _parsed(LoraOptions, values)
        if lora is None:
            outcome.refused = True
            _require_named(said, values)
            return
        training = SimpleNamespace(gradient_checkpointing=False, seed=0)
        options: Any = SimpleNamespace(lora=lora, training=training, classification=SimpleNamespace(active=False))
        model = LlamaForCausalLM(_TINY)
        try:
            model = finetune.add_adapter(model, options)
            if lora.init_lora_weights not in (*PEFT_STARTS, "lora_ga"):
                initialize_adapters(model, lora.init_lora_weights)
            finetune.method_callback(options)
            kind = METHOD_OPTIMIZERS.get(lora.method, torch.optim.AdamW)
            optimizer = kind(trainable(model), lr=1e-3)
            if not lora.latent:
                attach(model, optimizer, lora.reflora_config())
        except ValueError as error:
            outcome.refused = True
            named = ("r=", "target_modules: ", "target_parameters: ")  # r= of attach, or lora_r= and others
            assert raised_by_us(error) and any(name in str(error) for name in named), error
            return
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in trainable(model))
