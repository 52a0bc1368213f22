"""Accuracy on the eight commonsense tasks and GSM8K as LLM-Adapters, DoRA and RefLoRA evaluate them.

    python launchers/evaluate.py --adapter outputs/finetune --data FOLDER
    torchrun --nproc_per_node 8 launchers/evaluate.py --adapter outputs/finetune
    deepspeed --num_gpus 8 launchers/evaluate.py ...      accelerate launch --num_processes 8 launchers/evaluate.py ...

Every rank loads the whole model and answers its share of the questions. Answers are written as they come: the same
command goes on where it was stopped, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from launchers.data.tokenization import PROMPT_TEMPLATES, encode_prompts, format_prompt, load_tokenizer
from launchers.evaluation import generation
from launchers.evaluation.answer_files import AnswerFile, Key, batches, check_settings, read_answers, write_settings
from launchers.evaluation.answer_rules import ANSWER_WORDS, extract_answer, is_correct
from launchers.evaluation.questions import FROM_HUB, TASKS, Question, load_questions
from launchers.training.fields import option
from launchers.training.options import MODEL_DTYPES, check_output_dir
from launchers.training.recorder import installed_versions, recorded_setting

RESULTS_FILE = "results.json"
# As published: 32 in RefLoRA's commonsense_reasoning/evaluate.py, 256 in LLM-Adapters' evaluate.py.
MAX_NEW_TOKENS = {task: 256 if task == "gsm8k" else 32 for task in TASKS}
# Ranks that are done wait for the slowest.
WAIT = datetime.timedelta(days=7)


@dataclasses.dataclass
class EvaluateOptions:
    """What is evaluated, on what, and how."""

    model: str | None = option(None, "Hub name or local path of the base. Default: the one that the adapter names.")
    adapter: str | None = option(None, "Folder or hub name of a PEFT adapter. Default: the model as it is.")
    tokenizer: str | None = option(None, "Hub name or local path of the tokenizer. Default: the model's own.")
    model_dtype: str = option(
        "auto", "dtype of the base; auto: bfloat16 on an accelerator, else float32.", choices=MODEL_DTYPES
    )
    tasks: list[str] = option(  # noqa: RUF009
        list(ANSWER_WORDS),
        f"Of {', '.join(TASKS)}. TASK=FILE names the task's file, TASK={FROM_HUB} takes it from the hub. "
        "Default: the eight commonsense tasks.",
    )
    data: str | None = option(None, "Folder with TASK/test.json or commonsense/TASK/test.json. Default: the hub.")
    prompt_template: str | None = option(
        None,
        "Default: the one that finetune.py recorded beside the adapter, else alpaca.",
        choices=tuple(PROMPT_TEMPLATES),
    )
    num_beams: int = option(1, "1: greedy decoding. RefLoRA's published script searches with 4 beams.")
    max_new_tokens: int | None = option(None, "Tokens of an answer. Default: 32, for gsm8k 256.")
    batch_size: int = option(8, "Questions that a rank answers at once.")
    limit: int | None = option(None, "The first n questions of each task only.")
    output_dir: str = option("outputs/evaluate", "Where answers and results are written, shared by all machines.")
    disable_tqdm: bool = option(False, "No progress bar.")
    local_rank: int | None = option(None, "Set by the deepspeed launcher, and not read: LOCAL_RANK holds the same.")

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, --adapter or both")
        for name in ("num_beams", "max_new_tokens", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        names = [entry.partition("=")[0] for entry in self.tasks]
        for name in names:
            if name not in TASKS:
                raise ValueError(f"tasks: {name!r} is none of {', '.join(TASKS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"tasks={self.tasks}: a task is named twice")
        if self.model is None:
            self.model = generation.base_of(str(self.adapter))
        if self.prompt_template is None:
            recorded = recorded_setting(self.adapter, "prompt_template") if self.adapter else None
            self.prompt_template = recorded or "alpaca"
        if self.model_dtype == "auto":
            self.model_dtype = "bfloat16" if torch.accelerator.is_available() else "float32"


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that a launcher started; a process that was started alone is the only one."""

    rank: int
    world_size: int
    local_rank: int
    group: dist.ProcessGroup | None = None

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier(self.group)


def join_ranks() -> Ranks:
    """Join the processes of torchrun, deepspeed or accelerate, which all set the same variables.

    The ranks exchange nothing but "I am here", for which gloo serves on every device.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    ranks = Ranks(rank, world_size, local_rank)
    if ranks.world_size > 1:
        dist.init_process_group("gloo")
        # only once all are there: a process that never comes is noticed within the default time
        ranks = dataclasses.replace(ranks, group=dist.new_group(timeout=WAIT))
    return ranks


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def main(argv: list[str] | None = None) -> None:
    try:
        (options,) = HfArgumentParser(EvaluateOptions).parse_args_into_dataclasses(args=argv)  # type: ignore[arg-type]
        ranks = join_ranks()
        check_output_dir(options.output_dir)
        evaluate(options, ranks)
    except ValueError as error:
        # What a user can mend is told in one line; a traceback would hide it.
        raise SystemExit(f"evaluate.py: error: {error}") from error
    if ranks.world_size > 1:
        dist.destroy_process_group()


def evaluate(options: EvaluateOptions, ranks: Ranks) -> None:
    """Answer what is not answered yet, then print and write the results; every rank must call.

    Raises:
        ValueError: data, model or adapter cannot be used, or the folder holds answers of other settings.
    """
    start = time.perf_counter()
    folder = Path(options.output_dir)
    questions = all_questions(options, ranks)
    settings = answer_settings(options, questions)
    wanted: dict[Key, Question] = {
        (task, index): question for task in questions for index, question in enumerate(questions[task][: options.limit])
    }
    check_settings(folder, settings)
    answered = read_answers(folder)
    ranks.wait()  # everyone has read, so all divide the same remainder
    if ranks.rank == 0:
        write_settings(folder, settings)
    remaining = {key: question for key, question in wanted.items() if key not in answered}
    if ranks.rank == 0 and len(remaining) < len(wanted):
        print(f"{len(wanted) - len(remaining)} of {len(wanted)} questions are answered already", flush=True)
    if remaining:
        answer_share(options, ranks, remaining)
    ranks.wait()
    if ranks.rank == 0:
        results = collect_results(read_answers(folder), wanted)
        results |= {"settings": settings, "limit": options.limit, "world_size": ranks.world_size}
        results |= {"seconds": round(time.perf_counter() - start, 1), "versions": installed_versions()}
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        Console(width=None if sys.stdout.isatty() else 100).print(results_table(results, options))
        print(f"results {folder / RESULTS_FILE}", flush=True)
    ranks.wait()


def all_questions(options: EvaluateOptions, ranks: Ranks) -> dict[str, list[Question]]:
    """The questions of every task; what comes from the hub is downloaded by one rank of each machine."""
    questions: dict[str, list[Question]] = {}
    for turn in (True, False):
        if turn == (ranks.local_rank == 0):
            for entry in options.tasks:
                task, _, source = entry.partition("=")
                questions[task] = load_questions(task, source or None, options.data)
        ranks.wait()
    return questions


def answer_settings(options: EvaluateOptions, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """All that decides an answer. A number of questions, of ranks or of a batch does not."""
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
            task: hashlib.sha256(json.dumps([dataclasses.astuple(q) for q in asked]).encode()).hexdigest()[:16]
            for task, asked in questions.items()
        },
    }


def answer_share(options: EvaluateOptions, ranks: Ranks, remaining: dict[Key, Question]) -> None:
    """Generate this rank's share of the remaining answers and write each as soon as its batch is done."""
    tokenizer = load_tokenizer(options.tokenizer or str(options.model))
    model = generation.load_model(
        str(options.model),
        options.adapter,
        getattr(torch, options.model_dtype),
        generation.own_device(ranks.local_rank),
        generation.generation_config(tokenizer, options.num_beams),
    )
    template = str(options.prompt_template)
    texts = [format_prompt(question.instruction, question.input, template) for question in remaining.values()]
    prompts = dict(zip(remaining, encode_prompts(tokenizer, texts), strict=True))
    check_lengths(model, prompts, ranks)
    # prompts of one length in a batch, and every rank has long and short ones
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
    """One finished answer as it is written."""
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


def check_lengths(model: Any, prompts: dict[Key, list[int]], ranks: Ranks) -> None:
    """Say so where prompts are longer than what the model was made for; nothing is cut."""
    positions = getattr(model.config, "max_position_embeddings", None)
    longer = [key for key, prompt in prompts.items() if positions and len(prompt) >= positions]
    if longer and ranks.rank == 0:
        print(f"warning: {len(longer)} of {len(prompts)} prompts exceed the model's {positions} positions", flush=True)


def collect_results(answers: dict[Key, dict[str, Any]], wanted: dict[Key, Question]) -> dict[str, Any]:
    """Accuracy by task, in percent, and the mean over the commonsense tasks.

    Raises:
        ValueError: answers of other ranks are not in the folder.
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
    """Task, accuracy, number of questions, and how many answers named no choice."""
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
    main()
