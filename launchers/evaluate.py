"""Measure accuracy on the eight commonsense tasks and GSM8K, as LLM-Adapters, DoRA and RefLoRA do.

    python launchers/evaluate.py --adapter outputs/finetune --data FOLDER
    torchrun --nproc_per_node 8 launchers/evaluate.py --adapter outputs/finetune
    deepspeed --num_gpus 8 launchers/evaluate.py ...      accelerate launch --num_processes 8 launchers/evaluate.py ...

Every rank loads the whole model and answers its share of the questions. Answers are written as they come, so the same
command continues where it was stopped, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("launchers.evaluate", run_name="__main__", alter_sys=True)
    raise SystemExit

from reflora_dist.command_line.help import answer_help
from reflora_dist.command_line.parse import parse_into_dataclasses

from .evaluation.options import EvaluateOptions
from .screen.commands import begin_command, run_command

if __name__ == "__main__":
    answer_help(__doc__, {"options": EvaluateOptions})  # before torch is imported, which takes seconds
    begin_command()

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from reflora_dist.collectives.ranks import is_first_rank
from reflora_dist.files.base_files import load_tokenizer
from reflora_dist.files.local_names import require_path_or_hub_name

from .cluster.waiting import stage, told, wait_for_ranks, working_first
from .data.limits import Limits
from .data.named_model import resolve_together
from .data.tokenization import encode_questions
from .evaluation import generation
from .evaluation.answer_files import (
    SETTINGS_FILE,
    AnswerFile,
    Key,
    batches,
    check_settings,
    read_answers,
    write_settings,
)
from .evaluation.answer_rules import ANSWER_WORDS, extract_answer, is_correct
from .evaluation.questions import TASKS, Question, load_questions
from .training.batching import require_same_in_batch
from .training.options import check_output_dir
from .training.recorder import installed_versions

logger = logging.getLogger(__name__)
RESULTS_FILE = "results.json"
# As published: 32 in RefLoRA's commonsense_reasoning/evaluate.py, 256 in LLM-Adapters' evaluate.py.
MAX_NEW_TOKENS = {task: 256 if task == "gsm8k" else 32 for task in TASKS}


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int


def join_ranks() -> Ranks:
    """Join the processes of torchrun, deepspeed or accelerate, which all set the same variables.

    Ranks only wait for each other, so gloo serves on every device. A process without a launcher is the only rank.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    if world_size > 1:
        with told(f"waiting for all {world_size} ranks to join"):
            dist.init_process_group("gloo")
    return Ranks(rank, world_size, local_rank)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def main(argv: list[str] | None = None) -> None:
    try:
        with stage("looking for the model and the adapter"):
            (options,) = parse_into_dataclasses(HfArgumentParser(EvaluateOptions), argv)  # type: ignore[arg-type]
        ranks = join_ranks()
        check_output_dir(options.output_dir)
        evaluate(options, ranks)
    except ValueError as error:
        # a user can correct these errors; a traceback would hide the line
        raise SystemExit(f"evaluate.py: error: {error}") from error
    if ranks.world_size > 1:
        dist.barrier()  # the first rank may hold the store that the others still read
        dist.destroy_process_group()


def evaluate(options: EvaluateOptions, ranks: Ranks) -> None:
    """Answer the open questions, then print and write the results; every rank must call.

    Raises:
        ValueError: data, model or adapter cannot be used, or the folder holds answers of other settings.
    """
    start = time.perf_counter()
    folder = Path(options.output_dir)
    require_path_or_hub_name("model", str(options.model))
    options.model = resolve_together(str(options.model), None, ranks.local_rank)
    questions = all_questions(options, ranks)
    settings = answer_settings(options, questions)
    wanted: dict[Key, Question] = {
        (task, index): question for task in questions for index, question in enumerate(questions[task][: options.limit])
    }
    answered = read_answers(folder)
    if answered:
        check_settings(folder, settings)
    wait_for_ranks("reading the answers")  # so that all ranks divide the same remainder
    if ranks.rank == 0:
        if not answered:  # these settings are left by a run that was refused
            (folder / SETTINGS_FILE).unlink(missing_ok=True)
        write_settings(folder, settings)
    remaining = {key: question for key, question in wanted.items() if key not in answered}
    if ranks.rank == 0 and len(remaining) < len(wanted):
        print(f"{len(wanted) - len(remaining)} of {len(wanted)} questions are answered already", flush=True)
    if remaining:
        answer_share(options, ranks, remaining)
    wait_for_ranks("answering a share of the questions")
    if ranks.rank == 0:
        results = collect_results(read_answers(folder), wanted)
        results |= {"settings": settings, "limit": options.limit, "world_size": ranks.world_size}
        results |= {"seconds": round(time.perf_counter() - start, 1), "versions": installed_versions()}
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        Console(width=None if sys.stdout.isatty() else 100).print(results_table(results, options))
        print(f"results {folder / RESULTS_FILE}", flush=True)
    wait_for_ranks("writing the results")


def all_questions(options: EvaluateOptions, ranks: Ranks) -> dict[str, list[Question]]:
    """Return the questions of every task. One rank of each machine downloads those of the hub."""
    questions: dict[str, list[Question]] = {}
    with working_first(ranks.local_rank == 0, "loading the questions"):
        for entry in options.tasks:
            task, _, source = entry.partition("=")
            questions[task] = load_questions(task, source or None, options.data)
    return questions


def answer_settings(options: EvaluateOptions, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """Return the settings that decide an answer. The numbers of questions and ranks and the batch size do not."""
    return {
        "model": options.model,
        "model_files": generation.fingerprint(str(options.model)),
        "adapter": options.adapter,
        "adapter_files": generation.fingerprint(options.adapter) if options.adapter else None,
        "tokenizer": options.tokenizer,
        "model_dtype": options.model_dtype,
        "prompt_template": options.prompt_template,
        "num_beams": options.num_beams,
        "max_new_tokens": {task: options.max_new_tokens or MAX_NEW_TOKENS[task] for task in questions},
        "questions": {
            task: hashlib.sha256(json.dumps([question.texts for question in asked]).encode()).hexdigest()[:16]
            for task, asked in questions.items()
        },
    }


def answer_share(options: EvaluateOptions, ranks: Ranks, remaining: dict[Key, Question]) -> None:
    """Generate this rank's share of the remaining answers and write each as soon as its batch is done."""
    template = str(options.prompt_template)
    with stage("loading the model", str(options.model)):
        tokenizer = load_tokenizer(options.tokenizer or generation.tokenizer_of(str(options.model), options.adapter))
        model = generation.load_model(
            str(options.model),
            options.adapter,
            getattr(torch, options.model_dtype),
            generation.own_device(ranks.local_rank),
            generation.generation_config(tokenizer, options.num_beams, template),
        )
    asked = [(question.instruction, question.input) for question in remaining.values()]
    prompts = dict(zip(remaining, encode_questions(tokenizer, asked, template), strict=True))
    check_prompts(model, tokenizer, prompts, {key: question.place for key, question in remaining.items()}, options)
    if options.batch_size > 1:
        require_same_in_batch(model, max(prompts.values(), key=len))
    # a batch has prompts of similar length, and every rank has long and short ones
    tasks = list(dict.fromkeys(task for task, _ in prompts))
    order = sorted(prompts, key=lambda key: (tasks.index(key[0]), -len(prompts[key]), key[1]))
    share = order[ranks.rank :: ranks.world_size]
    hidden = options.disable_tqdm or ranks.rank != 0
    with AnswerFile(Path(options.output_dir), ranks.rank) as file, tqdm(total=len(share), disable=hidden) as bar:
        for task in tasks:
            bar.set_description(f"{task}, rank 0 of {ranks.world_size}")
            max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS[task]
            for batch in batches([key for key in share if key[0] == task], options.batch_size):
                outputs = generation.generate(model, tokenizer, [prompts[key] for key in batch], max_new_tokens)
                file.add(judged(key, out, remaining[key]) for key, out in zip(batch, outputs, strict=True))
                bar.update(len(batch))


def judged(key: Key, output: str, question: Question) -> dict[str, Any]:
    """Return one finished answer, ready to be written."""
    task, index = key
    answer = extract_answer(task, output)
    return {
        "task": task,
        "index": index,
        "output": output,
        "answer": answer,
        "reference": question.answer,
        "correct": is_correct(task, answer, question.answer),
    }


def check_prompts(
    model: Any, tokenizer: Any, prompts: dict[Key, list[int]], places: dict[Key, str], options: EvaluateOptions
) -> None:
    """Check that prompts and answers fit the limits of the model; nothing is cut.

    Raises:
        ValueError: a token has no row in the embedding, or an answer ends beyond a table of positions.
    """
    limits = Limits.of(model)
    ids = {places[key]: max(prompt) for key, prompt in prompts.items()}
    limits.require_tokens(tokenizer, ids)
    for key, prompt in prompts.items():
        new = options.max_new_tokens or MAX_NEW_TOKENS[key[0]]
        if limits.positions is not None and len(prompt) + new - 1 > limits.positions:  # the last token is not read
            raise ValueError(
                f"{places[key]}: the prompt has {len(prompt)} tokens and the answer {new}, the model "
                f"{limits.positions} positions; lower --max_new_tokens, or leave the question out"
            )
    longer = [key for key, prompt in prompts.items() if limits.advised and len(prompt) >= limits.advised]
    if longer and is_first_rank():
        count = f"{len(longer)} of {len(prompts)}"
        logger.warning("%s prompts exceed the model's %d positions", count, limits.advised)


def collect_results(answers: dict[Key, dict[str, Any]], wanted: dict[Key, Question]) -> dict[str, Any]:
    """Return accuracy by task, in percent, and the mean over the commonsense tasks.

    Raises:
        ValueError: the folder lacks answers of other ranks.
    """
    missing = sum(key not in answers for key in wanted)
    if missing:
        raise ValueError(f"{missing} of {len(wanted)} answers are not in output_dir; it must be shared by all machines")
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(task for task, _ in wanted):
        own = [answers[key] for key in wanted if key[0] == task]
        correct = sum(answer["correct"] for answer in own)
        tasks[task] = {
            "accuracy": 100 * correct / len(own),
            "n": len(own),
            "correct": correct,
            "unanswered": sum(answer["answer"] is None for answer in own),
        }
    commonsense = [entry["accuracy"] for task, entry in tasks.items() if task in ANSWER_WORDS]
    return {"tasks": tasks, "commonsense_average": sum(commonsense) / len(commonsense) if commonsense else None}


def results_table(results: dict[str, Any], options: EvaluateOptions) -> Table:
    """Return a table of accuracy, number of questions, and number of texts without an answer, by task."""
    table = Table(title=options.adapter or options.model)
    table.add_column("task")
    for name in ("accuracy (%)", "n", "without answer"):
        table.add_column(name, justify="right")
    for task, entry in results["tasks"].items():
        table.add_row(task, f"{entry['accuracy']:.2f}", f"{entry['n']:,}", f"{entry['unanswered']:,}")
    if sum(task in ANSWER_WORDS for task in results["tasks"]) > 1:
        table.add_section()
        table.add_row("mean of the commonsense tasks", f"{results['commonsense_average']:.2f}", "", "")
    return table


if __name__ == "__main__":
    run_command(main)
