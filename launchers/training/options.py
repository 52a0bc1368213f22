"""The command line of finetune.py: small dataclasses beside transformers' TrainingArguments.

``--help`` prints the dataclasses, so torch and transformers, whose imports take seconds, are imported in functions.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflora_dist.command_line.fields import option as _option
from reflora_dist.command_line.parse import refuse, unknown
from reflora_dist.files.cache import default_cache_dir
from reflora_dist.methods.names import DEFAULT_DAMPING, LATENT_METHODS, METHOD_NAMES

from ..data.embedded import EmbeddedSettings
from ..data.tokenization import TEMPLATE_NAMES, TokenizationSettings
from .defaults import TrainingDefaults
from .glue_tasks import ClassificationOptions

if TYPE_CHECKING:
    import torch

    from reflora_dist import RefLoRAConfig

    from .arguments import FinetuneArguments

MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")
# PEFT's own starts that leave the base alone; the others are reflora_dist.starts.initialize's.
PEFT_STARTS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


@dataclasses.dataclass
class ModelOptions:
    """The base model and how it is loaded."""

    model: str | None = _option(
        None,
        "Hub name or local path, of an adapter too, which is then trained on; smollm2: SmolLM2-135M-Instruct, from the "
        "hub or the package index. Default: the embedded model, made on this machine.",
    )
    tokenizer: str | None = _option(None, "Hub name or local path of the tokenizer. Default: the model's own.")
    model_dtype: str = _option(
        "auto",
        "dtype of the frozen base; auto: that of --bf16, --fp16 or accelerate's mixed_precision, else float32.",
        choices=MODEL_DTYPES,
    )
    load_in_4bit: bool = _option(False, "Keep the frozen base in 4 bits (NF4, double quantization), as QLoRA does.")
    attn_implementation: str | None = _option(None, "transformers' attention: eager, sdpa, flash_attention_2, ...")


@dataclasses.dataclass
class LoraOptions:
    """The adapter and the method that trains it."""

    method: str = _option(
        "reflora",
        "lora trains plainly. lora-rite and lora-muon are optimizers of their own: --optim_args sets their options, as "
        "in update_capping=1.0,balance_param=True or momentum=0.9. lora-sb and lora-xs train an r x r matrix between "
        "frozen factors.",
        choices=(*METHOD_NAMES, *LATENT_METHODS),
    )
    reflora_warmup_steps: int | None = _option(
        None,
        "Optimizer steps of plain LoRA before the method's first. Default for reflora, reflora-s and lora-pro: a tenth "
        "of the training, at most 100; 1 for balora.",
    )
    reflora_interval: int = _option(1, "Act at every n-th optimizer step after the warm-up.")
    scaled_gd_damping: float = _option(DEFAULT_DAMPING, "delta of --method scaled-gd.")
    carry_moments: bool = _option(
        False,
        "Adam's moments become those of the method's coordinates: with --method reflora those of the warm-up, once; "
        "with balora in every step.",
    )
    tall_adapters: bool = _option(
        True,
        "Under FSDP and DeepSpeed store lora_A as [in, r], so that only Grams are sent. Files are the same; a run "
        "resumes as it began.",
    )
    lora_r: int = _option(16, "LoRA rank r.")
    lora_alpha: float | None = _option(
        None, "LoRA alpha; the update is scaled by alpha / r. Default: 32, for lora-sb and lora-xs r."
    )
    lora_dropout: float = _option(0.0, "Dropout in front of lora_A.")
    target_modules: list[str] = _option(  # noqa: RUF009
        ["all-linear"],
        "Names of the layers that get an adapter; all-linear: every linear layer but the head.",
    )
    target_parameters: list[str] = _option(  # noqa: RUF009
        [],
        "Names of parameters that get an adapter, as mlp.experts.down_proj of stacked experts. all-linear reaches "
        "those of the models that PEFT knows, as Mixtral and Qwen3-MoE.",
    )
    rslora: bool = _option(False, "Rank-stabilised scaling: alpha / sqrt(r).")
    dora: bool = _option(False, "DoRA: a trained magnitude beside the factors.")
    init_lora_weights: str = _option(
        "default",
        "Start of the factors. default (B = 0), gaussian (B = 0) and orthogonal leave the base alone. pissa, "
        "pissa_niter_N, olora, lora_ga, and kaiming_both (published for --reflora_warmup_steps 0) change it.",
    )
    lora_sb_batches: int = _option(8, "Batches per rank from which lora-sb takes the first full step's gradient.")
    lora_sb_learning_rate: float | None = _option(
        None, "Learning rate of lora-sb's first full step. Default: --learning_rate / warm-up steps."
    )
    lora_ga_batches: int = _option(8, "Batches of per_device_train_batch_size from which lora_ga takes the gradient.")

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        if self.lora_ga_batches < 1:
            raise ValueError(f"lora_ga_batches={self.lora_ga_batches} must be at least 1")
        if self.lora_sb_batches < 1:
            raise ValueError(f"lora_sb_batches={self.lora_sb_batches} must be at least 1")
        for name in ("lora_alpha", "lora_sb_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0, and finite")
        if self.scaled_gd_damping != DEFAULT_DAMPING and self.method != "scaled-gd":
            raise ValueError(
                f"scaled_gd_damping={self.scaled_gd_damping} means nothing to --method {self.method}: drop it"
            )
        if self.latent:
            self._check_latent()
        elif self.lora_alpha is None:
            self.lora_alpha = 32.0
        self._check_start()
        try:
            self.reflora_config()
        except ValueError as error:
            names = {"warmup_steps": "reflora_warmup_steps", "interval": "reflora_interval"}
            names |= {"damping": "scaled_gd_damping"}
            text = re.sub(r"\b(\w+)=", lambda match: f"{names.get(match[1], match[1])}=", str(error))
            raise ValueError(text) from error

    @property
    def latent(self) -> bool:
        """Whether the method trains an r x r matrix between frozen factors, and not the factors."""
        return self.method in LATENT_METHODS

    def _check_latent(self) -> None:
        for name, default in (
            ("rslora", False),
            ("dora", False),
            ("target_parameters", []),
            ("init_lora_weights", "default"),
            ("reflora_warmup_steps", None),
            ("reflora_interval", 1),
            ("carry_moments", False),
            ("tall_adapters", True),
        ):
            if getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing to --method {self.method}: drop it")

    def _check_start(self) -> None:
        from reflora_dist.starts.recipes import check_init

        if self.init_lora_weights in PEFT_STARTS:
            return
        try:
            check_init(self.init_lora_weights)
        except ValueError as error:
            raise ValueError(f"init_lora_weights: {error}, or one of {', '.join(PEFT_STARTS)}") from error

    def reflora_config(self) -> RefLoRAConfig:
        """Return the settings that the package reads."""
        from reflora_dist import RefLoRAConfig

        return RefLoRAConfig(
            method="lora" if self.latent else self.method,
            warmup_steps=self.reflora_warmup_steps,
            interval=self.reflora_interval,
            damping=self.scaled_gd_damping,
            carry_moments=self.carry_moments,
        )


@dataclasses.dataclass
class DataOptions:
    """The records and how they become training examples."""

    dataset: list[str] = _option(  # noqa: RUF009
        [],
        "Hub names or local JSON/JSONL files of instructions, prompts with completions, or conversations. Default: the "
        "embedded records.",
    )
    dataset_split: str = _option("train", "Split of a hub data set to train on.")
    eval_dataset: list[str] = _option(  # noqa: RUF009
        [], "Records to evaluate on, as --dataset. The embedded ones bring their own."
    )
    eval_dataset_split: str = _option("test", "Split of a hub data set to evaluate on.")
    eval_fraction: float = _option(0.0, "Share of --dataset set aside for evaluation when --eval_dataset is not given.")
    max_eval_records: int | None = _option(None, "Evaluate on the first n records only.")
    max_length: int = _option(512, "Tokens of prompt and answer together; longer answers are cut.")
    packing: bool = _option(
        False, "Pack several short examples into each row. A model in which they see each other is refused."
    )
    train_on_prompt: bool = _option(False, "Learn the prompt's tokens too, not the answer's alone.")
    prompt_template: str | None = _option(
        None,
        "Text around question and answer. alpaca: as LLM-Adapters, DoRA and RefLoRA train. chat: the tokenizer's chat "
        "template, with instruction and input as the user's turn. none: no text. Default: chat if there are "
        "conversations, else plain; prompts with completions are taken as they are.",
        choices=TEMPLATE_NAMES,
    )
    cache_dir: str = _option(str(default_cache_dir()), "Where tokenized data and the embedded model are kept.")
    pretrain_steps: int = _option(EmbeddedSettings.pretrain_steps, "Pre-training steps of the embedded model.")

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2: a prompt token and an answer token")
        if self.pretrain_steps < 1:
            raise ValueError(f"pretrain_steps={self.pretrain_steps} must be at least 1")
        if self.max_eval_records is not None and self.max_eval_records < 1:
            raise ValueError(f"max_eval_records={self.max_eval_records} must be at least 1")
        if self.eval_fraction and self.eval_dataset:
            raise ValueError("give --eval_dataset or --eval_fraction, not both")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must be in [0, 1)")
        self.cache_dir = str(Path(self.cache_dir).expanduser())

    @property
    def has_eval_records(self) -> bool:
        """Whether there are records to evaluate on. The embedded records and the hub's GLUE bring their own."""
        return bool(self.eval_dataset or self.eval_fraction or not self.dataset)

    def tokenization(self, *, packing: bool) -> TokenizationSettings:
        """Return how records are encoded. Evaluation never packs, so that losses of runs can be compared."""
        return TokenizationSettings(
            max_length=self.max_length,
            train_on_prompt=self.train_on_prompt,
            packing=packing,
            prompt_template=self.prompt_template,
        )


@dataclasses.dataclass
class RunFileOptions:
    """The file that the other options may come from."""

    config: str | None = _option(
        None, "YAML file of options, which those on the command line override; or the name of one in examples/."
    )


@dataclasses.dataclass
class Options:
    """All options of one run."""

    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    training: FinetuneArguments
    classification: ClassificationOptions

    def __post_init__(self) -> None:
        from .evaluations import check_evaluations

        self._check_quantization()
        check_evaluations(self)
        self.optimizer()

    def _check_quantization(self) -> None:
        lora = self.lora
        if self.model.load_in_4bit and (lora.latent or lora.init_lora_weights not in PEFT_STARTS):
            asked = f"--method {lora.method}" if lora.latent else f"--init_lora_weights {lora.init_lora_weights}"
            raise ValueError(
                f"{asked} needs the weights of the base, or changes them, which 4 bits would round away: drop "
                "--load_in_4bit, or take another method or start"
            )
        for dtype in ("bf16", "fp16") if self.model.load_in_4bit else ():
            if getattr(self.training, f"{dtype}_full_eval") and not getattr(self.training, dtype):
                raise ValueError(
                    f"{dtype}_full_eval=True would cast the packed weights of --load_in_4bit, which are no numbers: "
                    f"give --{dtype} True, or drop --{dtype}_full_eval"
                )

    def optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Return the optimizer's class and arguments if the method is an optimizer; None for that of --optim.

        Raises:
            ValueError: --optim_args names an unknown option, or a value that it cannot have.
        """
        import torch

        from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS

        kind = METHOD_OPTIMIZERS.get(self.lora.method)
        if kind is None:
            return None
        from .arguments import FinetuneArguments
        from .evaluations import shown

        training = self.training
        plugin = getattr(training, "hf_deepspeed_config", None)  # exists under DeepSpeed only
        deepspeed_config = plugin.config if plugin is not None else {}
        if "optimizer" in deepspeed_config:
            raise ValueError(
                f"deepspeed={training.deepspeed!r} has an optimizer of its own, which would replace {kind.__name__}: "
                'take "optimizer" out, and with offload_optimizer set "zero_force_ds_cpu_optimizer": false'
            )
        has_eps = "eps" in inspect.signature(kind).parameters
        for name, remedy in (
            ("optim", "drop it"),
            ("adam_epsilon", "give --optim_args eps=..." if has_eps else "drop it"),
        ):
            if (value := getattr(training, name)) != getattr(FinetuneArguments, name):
                raise ValueError(
                    f"{name}={shown(value)} means nothing to --method {kind.method}, an optimizer: {remedy}"
                )
        arguments: dict[str, Any] = {
            "lr": training.learning_rate,
            "betas": (training.adam_beta1, training.adam_beta2),
            "weight_decay": training.weight_decay,
        }
        for entry in filter(None, (training.optim_args or "").replace(" ", "").split(",")):
            name, _, text = entry.partition("=")
            try:
                arguments[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"optim_args: {entry!r} must be name=value, a number or True or False") from error
        try:
            kind([torch.zeros(1)], **arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optim_args={training.optim_args!r}: {error}") from error
        return kind, arguments


def parse_options(argv: list[str] | None = None) -> Options:
    """Read the command line, and the file of ``--config``, whose options it overrides.

    Call this before any model is loaded. Creating the training arguments starts the process group. Under ZeRO-3 it also
    makes transformers partition the base while loading it.

    Raises:
        ValueError: an option is unknown, or its value or the file cannot be used.
    """
    from transformers import HfArgumentParser

    from .arguments import FinetuneArguments
    from .run_file import OTHER_NAMES, find_run_file, read_run_file

    classes = (ModelOptions, LoraOptions, DataOptions, FinetuneArguments, ClassificationOptions)
    parser = HfArgumentParser((*classes, RunFileOptions), allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = refuse  # type: ignore[method-assign]  # argparse would print all options
    given, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(unknown(rest[0], parser, OTHER_NAMES))
    in_file = read_run_file(find_run_file(given.config), classes) if given.config else {}
    parser.set_defaults(**in_file)
    given = parser.parse_args(argv)
    without_records = given.dataset and not given.eval_dataset and not given.eval_fraction
    if without_records and "eval_strategy" not in in_file:
        parser.set_defaults(eval_strategy="no")  # before transformers checks what needs evaluations
    *parts, _ = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    return Options(*parts)


HELP_GROUPS = {
    "file of options": RunFileOptions,
    "model": ModelOptions,
    "adapter and method": LoraOptions,
    "records": DataOptions,
    "training, with defaults of its own": TrainingDefaults,
    "classification": ClassificationOptions,
}


def trainers_options() -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the options of transformers' TrainingArguments that :data:`HELP_GROUPS` lacks, by title."""
    from .arguments import FinetuneArguments

    own = {field.name for field in dataclasses.fields(TrainingDefaults)}
    others = [field for field in dataclasses.fields(FinetuneArguments) if field.init and field.name not in own]
    return {"transformers' TrainingArguments": others}


def check_output_dir(output_dir: str) -> None:
    """Create the folder and try to write into it, before hours of training end in an error.

    Raises:
        ValueError: the folder cannot be created or written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={output_dir!r} is not writable ({error}); name another folder") from error
