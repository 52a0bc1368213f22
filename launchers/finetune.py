"""Fine-tune a language model or a classifier with LoRA, under any launcher and engine.

    python launchers/finetune.py                        # one process, embedded model and data
    python launchers/finetune.py --config run.yaml --max_steps 20   # options from a file, which flags override
    torchrun --nproc_per_node 2 launchers/finetune.py --model NAME --dataset records.jsonl
    deepspeed --num_gpus 2 launchers/finetune.py --deepspeed ds_configs/zero3.json ...
    accelerate launch --config_file launchers/accelerate/fsdp2.yaml launchers/finetune.py ...

Every option of transformers' TrainingArguments works too.
"""

from __future__ import annotations

import contextlib
import math
import runpy
import sys
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("launchers.finetune", run_name="__main__", alter_sys=True)
    raise SystemExit

from reflora_dist.command_line.help import answer_help

from .screen.commands import begin_command, run_command
from .training.options import HELP_GROUPS, trainers_options

if __name__ == "__main__":
    answer_help(__doc__, HELP_GROUPS, further=trainers_options)  # before torch is imported, which takes seconds
    begin_command()

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from reflora_dist import RefLoRACallback, export_adapter
from reflora_dist.checkpoints.complete import CompleteCheckpoints
from reflora_dist.files.base_files import load_base, load_tokenizer, require_no_missing
from reflora_dist.files.local_names import require_path_or_hub_name
from reflora_dist.files.open_files import cause_of
from reflora_dist.lora_sb import LoRASBCallback, LoRASBConfig, LoraXSConfig

from .cluster.waiting import stage, working_first
from .data import embedded
from .data.limits import check_examples
from .data.named_model import resolve_together
from .data.records import Record, load_records, split_records
from .data.tokenization import Collator, cached_examples, choose_template, padding_token
from .training import card, classification, plots, recorder
from .training.batching import BatchingChangesExamples, PackingCheck, require_position_ids
from .training.beginning import Beginning
from .training.continued import continued_adapter
from .training.evaluations import EvaluationsToCome, NoEvaluations
from .training.failures import named_failures
from .training.interruptions import StopOnSignal
from .training.options import PEFT_STARTS, Options, parse_options
from .training.quantized import keep_weight_layout, quantization_config
from .training.run_file import RUN_FILE
from .training.sequences import check_shared_sequences, ranks_of_a_sequence
from .training.settings import LearningRateStays, RunSettings, settings_of, tell_differences
from .training.starts import start_adapter
from .training.targets import adapter_targets
from .training.used_folder import (
    SavedRun,
    earlier_run,
    require_training_state,
    results_are_there,
    steps_are_done,
    tell,
    train,
)


def main(argv: list[str] | None = None) -> None:
    mistakes = (ValueError, RuntimeError)
    try:
        options = parse_options(argv)  # which also joins the ranks
    except mistakes as error:
        raise SystemExit(f"finetune.py: error: {error}") from error
    with named_failures(options.training.output_dir, mistakes=mistakes):
        saved = earlier_run(options)
        if saved and steps_are_done(saved, options.training) and results_are_there(saved, options.training.output_dir):
            tell(f"all {saved.step} steps are done, nothing is trained; {options.training.output_dir} has the results")
            return leave()
        if saved:
            require_training_state(saved)
        trainer, run_recorder, run_settings = prepare(options, saved)
    stop, beginning = StopOnSignal(), Beginning(options.lora.method)
    # the last one reads whether the one before wants a checkpoint
    for callback in (EvaluationsToCome(), beginning, stop, CompleteCheckpoints()):
        trainer.add_callback(callback)
    found_late = (NoEvaluations, BatchingChangesExamples, LearningRateStays)
    with named_failures(options.training.output_dir, mistakes=found_late), contextlib.closing(stop), beginning:
        train(trainer, options, saved)
        exit_code = stop.exit_code()
        if not exit_code:
            finish(trainer, run_recorder, run_settings, options)
    leave()
    if exit_code:
        raise SystemExit(exit_code)


def prepare(options: Options, saved: SavedRun | None = None) -> tuple[Trainer, recorder.RunRecorder, RunSettings]:
    """Return the trainer, ready to train. Every mistake that can be found before training is found here.

    Args:
        options: the run's options.
        saved: the run that is resumed, or None.

    Raises:
        ValueError, RuntimeError: an option, a file or a record cannot be used; the message names it.
    """
    check_shared_sequences(options)
    callback, has_warmup = method_callback(options)
    settings = settings_of(options)  # with the model's name as it was given
    arguments = options.training
    classifies = options.classification.active
    if options.model.model is not None:
        require_path_or_hub_name("model", options.model.model)
        cache_dir = Path(options.data.cache_dir)
        options.model.model = resolve_together(options.model.model, cache_dir, arguments.local_process_index)
    records = (classification.choose_records if classifies else choose_records)(options)
    settings["prompt_template"] = options.data.prompt_template  # the records decide on it if the user does not
    run_settings = RunSettings(settings, callback if has_warmup else None, saved)
    if saved:
        tell_differences(run_settings, saved)
    with stage("looking for the model", options.model.model):
        adapter = continued_adapter(options)
    if adapter is not None:
        model_path = adapter.base
    else:
        model_path = options.model.model or shared_once(arguments, "pre-training the model", embedded_model, options)
    tokenizer_path = options.model.tokenizer or (adapter.tokenizer if adapter else model_path)
    with stage("loading the tokenizer", tokenizer_path):
        tokenizer = load_tokenizer(tokenizer_path)
    data = examples(options, tokenizer, *records)
    set_seed(arguments.seed)
    with stage("loading the model", model_path):
        base = load_model(model_path, options)
    if adapter is not None:
        adapter.resize(base)
    limits = check_examples(base, tokenizer, data)
    if options.data.packing:
        require_position_ids(base)
    shared = ranks_of_a_sequence(arguments)
    multiple = limits.padded_multiple(math.lcm(8, shared))
    if shared > 1 and multiple == 1:
        raise ValueError(f"{shared} ranks share each sequence, but {limits.positions} positions do not divide by them")
    collator: Any = Collator(pad_token_id=padding_token(tokenizer), multiple_of=multiple, positions=shared > 1)
    if classifies:
        collator = classification.collator(tokenizer, base, multiple)
    model = add_adapter(base, options)
    if adapter is not None:
        adapter.load(model)
        if arguments.process_index == 0:
            print(f"training goes on from the adapter in {adapter.folder}, on {adapter.base}", flush=True)
    checkpoint = saved.folder if saved else None
    with stage(f"making the factors' start {options.lora.init_lora_weights}"):
        start_adapter(model, lambda: load_model(model_path, options), data["dataset"], collator, options, checkpoint)
    run_recorder = recorder.RunRecorder(callback, has_warmup)
    run_recorder.further_data = {name: rows for name, rows in data.items() if name not in ("dataset", "eval_dataset")}
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["dataset"],
        eval_dataset=data.get("eval_dataset"),
        data_collator=collator,
        processing_class=tokenizer,  # so that checkpoints hold it, with its chat template
        compute_metrics=classification.metrics_of(options) if classifies else None,
        callbacks=[callback, run_settings, run_recorder],
        optimizer_cls_and_kwargs=options.optimizer(),
    )
    base.config.get_text_config().use_cache = arguments.use_cache  # Trainer sets it on the outermost configuration
    if options.data.packing:
        trainer.add_callback(PackingCheck(trainer, collator, data["dataset"][0]["input_ids"]))
    return trainer, run_recorder, run_settings


def examples(options: Options, tokenizer: Any, train: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """Return encoded records by the option that names them: ``dataset``, perhaps ``eval_dataset``, further sets."""
    encode = classification.encoded if options.classification.active else tokenized

    def tokens(records: list[Any], **settings: Any) -> Any:
        return shared_once(options.training, "tokenizing the records", encode, options, tokenizer, records, **settings)

    data = {"dataset": tokens(train, packing=options.data.packing)}
    further = classification.further_records(options) if options.classification.active else {}
    return data | {name: tokens(records) for name, records in ({"eval_dataset": held_out} | further).items() if records}


def method_callback(options: Options) -> tuple[TrainerCallback, bool]:
    """Return the callback that applies the method, and whether its first step comes after a warm-up of plain LoRA."""
    lora = options.lora
    if lora.latent:
        config = LoRASBConfig(
            method=lora.method,
            num_batches=lora.lora_sb_batches,
            learning_rate=lora.lora_sb_learning_rate,
            seed=options.training.seed,
        )
        return LoRASBCallback(config), False
    return RefLoRACallback(lora.reflora_config(), tall=None if lora.tall_adapters else False), lora.method != "lora"


def shared_once(arguments: Any, what: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``make`` with ``build=True`` on one rank of each machine, then on the others, which find its files."""
    build = arguments.local_process_index == 0
    with working_first(build, what):
        return make(*args, build=build, **kwargs)


def embedded_model(options: Options, *, build: bool) -> str:
    settings = embedded.EmbeddedSettings(pretrain_steps=options.data.pretrain_steps)
    return str(embedded.ensure_model(Path(options.data.cache_dir), settings, build=build))


def choose_records(options: Options) -> tuple[list[Record], list[Record]]:
    """Return training and evaluation records: those of the options, or the embedded ones.

    Raises:
        ValueError: see :func:`launchers.data.records.load_records`.
    """
    data, arguments = options.data, options.training
    train_sources, eval_sources = data.dataset, data.eval_dataset
    if not train_sources:
        cache_dir = Path(data.cache_dir)
        train_path, held_out_path = shared_once(arguments, "making records", embedded.ensure_records, cache_dir)
        train_sources, eval_sources = [str(train_path)], eval_sources or [str(held_out_path)]
    with working_first(arguments.local_process_index == 0, "loading the records"):
        train_records = load_records(train_sources, data.dataset_split)
        eval_records = load_records(eval_sources, data.eval_dataset_split)
    # decided here, so that training, evaluation and the recorded settings agree
    data.prompt_template = choose_template(data.prompt_template, train_records + eval_records)
    if data.eval_fraction:
        train_records, eval_records = split_records(train_records, data.eval_fraction, arguments.seed)
    return train_records, eval_records[: data.max_eval_records]


def tokenized(options: Options, tokenizer: Any, records: list[Record], *, build: bool, packing: bool = False) -> Any:
    settings = options.data.tokenization(packing=packing)
    return cached_examples(tokenizer, records, settings, Path(options.data.cache_dir), build=build)


def load_model(name: str, options: Options) -> Any:
    """Load the base model in the dtype of the options. Under ZeRO-3 each rank keeps only its partition.

    Raises:
        ValueError: the model cannot be found or read.
    """
    arguments, dtype = options.training, options.model.model_dtype
    if dtype == "auto":
        dtype = computed_dtype(arguments) or "float32"
    if options.classification.active:
        return classification.load_model(name, options, getattr(torch, dtype))
    settings: dict[str, Any] = {}
    if options.model.load_in_4bit:
        settings["quantization_config"] = quantization_config(getattr(torch, computed_dtype(arguments) or dtype))
    model, missing = load_base(
        AutoModelForCausalLM,
        name,
        dtype=getattr(torch, dtype),
        attn_implementation=options.model.attn_implementation,
        **settings,
    )
    require_no_missing(name, missing)
    keep_weight_layout(model)
    return model


def computed_dtype(arguments: Any) -> str | None:
    """Return the 16-bit dtype of training, from --bf16, --fp16 or accelerate's configuration; None for fp32."""
    if arguments.deepspeed and not (arguments.bf16 or arguments.fp16):
        return None  # transformers fills in DeepSpeed's file by these options alone
    return {"bf16": "bfloat16", "fp16": "float16"}.get(arguments.mixed_precision)


def add_adapter(model: Any, options: Options) -> Any:
    """Freeze the base and add the LoRA factors.

    Raises:
        ValueError: no layer has one of the target names, or PEFT cannot adapt it.
    """
    targets = adapter_targets(model, options.lora.target_modules, options.lora.target_parameters)
    try:
        return _with_adapter(model, targets, options)
    except Exception as error:  # PEFT prints the whole model, over many lines
        names = ("lora_r", "lora_alpha", "target_modules", "target_parameters", "init_lora_weights")
        asked = ", ".join(f"{name}={getattr(options.lora, name)!r}" for name in names)
        raise ValueError(f"PEFT makes no adapter of {asked} ({cause_of(error)}): correct these options") from error


def _with_adapter(model: Any, targets: dict[str, Any], options: Options) -> Any:
    lora = options.lora
    training = options.training  # transformers 5.17 knows only the older name, later versions deprecate it
    if getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing:
        model.enable_input_require_grads()  # reentrant checkpointing drops gradients of frozen inputs
    if lora.latent:
        latent = LoraXSConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            **targets,
        )
        try:
            return get_peft_model(model, latent)
        except TypeError as error:  # some layers are quantized, or no linear ones
            raise ValueError(f"method={lora.method!r}: {error}, or take another --method") from error
    classifies = options.classification.active
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        modules_to_save=model.new_heads if classifies else None,  # PEFT adds the classifier
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts fractions
        lora_dropout=lora.lora_dropout,
        **targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # start_adapter makes a start that changes the base, the same on every rank and under every engine
        init_lora_weights=PEFT_STARTS.get(lora.init_lora_weights, True),  # type: ignore[arg-type]
    )
    return _with_heads(model, config) if classifies else get_peft_model(model, config)


def _with_heads(model: Any, config: LoraConfig) -> Any:
    """Add factors and fully trained heads in one dtype, which FSDP1 and ZeRO-3 demand.

    ZeRO-3 keeps fp32 masters of both. Elsewhere both are fp32, because bf16 would round small updates away.
    """
    if is_deepspeed_zero3_enabled():
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def finish(trainer: Trainer, run_recorder: recorder.RunRecorder, run_settings: RunSettings, options: Options) -> None:
    """Write the adapter, evaluate, and write metrics, plot, card and summary; every rank must call."""
    output_dir = options.training.output_dir
    # before an evaluation, which may fail, and with --bf16_full_eval or --fp16_full_eval casts the model in place
    export_adapter(trainer.model_wrapped, output_dir)
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(output_dir)  # type: ignore[union-attr]  # prepare gave it
    history = trainer.state.log_history
    evaluated = any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history)
    if trainer.eval_dataset is not None and not evaluated:
        trainer.evaluate()
    for name, data in run_recorder.further_data.items():
        trainer.evaluate(data, metric_key_prefix=name)
    metrics = recorder.collect_metrics(trainer, run_recorder, run_settings.for_metrics(options))
    metrics["settings_changed"] = run_settings.changes
    if options.classification.active:
        metrics["held_out_metrics"] = classification.held_out_metrics(history, options)
    if trainer.is_world_process_zero():
        plot_path = plots.plot_run(metrics, Path(output_dir))
        plots.plot_method(metrics, Path(output_dir))
        card.write_card(metrics, options, Path(output_dir))
        recorder.write_metrics(metrics, output_dir)  # the last one: with it the run has its results
        print(summary(metrics, output_dir, plot_path), flush=True)


def summary(metrics: dict[str, Any], output_dir: str, plot_path: Path | None) -> str:
    """Return the results as text."""
    losses = [f"{point['loss']:.4f}" for point in metrics["held_out_loss"]]
    loss = f"held-out loss {' -> '.join(losses[:: len(losses) - 1] if losses[1:] else losses)}, " if losses else ""
    seconds = metrics["step_seconds_median"]  # None if the checkpoint had every step
    cost = (
        f"{1e3 * seconds:.0f} ms per step (median), {metrics['bytes_per_step']:,} bytes per step, " if seconds else ""
    )
    peak_gib = metrics["peak_memory_bytes"] / 2**30
    scores = "".join(map(classification.describe, metrics.get("held_out_metrics", [])))
    return (
        f"{metrics['method']}: {metrics['steps']} steps, {loss}{cost}peak {peak_gib:.2f} GiB per process "
        f"({metrics['peak_memory_kind']})\n{scores}adapter   {output_dir}\nsettings  {output_dir}/{RUN_FILE}"
        + (f"\nplot      {plot_path}" if plot_path else "")
    )


def leave() -> None:
    """Leave the process group together: a gloo worker that exits early can take the others down."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(record(main))  # record: so that torchrun's summary has the exception
