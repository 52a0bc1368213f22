"""What the documents say: links lead somewhere, what they name exists, snippets run as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tests.support.cluster import run_ranks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "reflora_dist"
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FOLDERS = "launchers|ds_configs|tests|benchmarks|reflora_dist|docs|" + "|".join(
    path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")
)


def _pages() -> dict[str, str]:
    """Every document by its path; reports made from records are left to ``report.py --check``."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    pages = [
        *ROOT.glob("*.md"),
        *(page for folder in folders for page in [*folder.glob("*.md"), *folder.glob("*/*.md")]),
    ]
    return {str(page.relative_to(ROOT)): page.read_text() for page in sorted(pages)}


PAGES = _pages()


def _snippet(title: str) -> str:
    """The Python snippet with this title, of whatever document."""
    wanted = f"python title={title}"
    (found,) = [code for page in PAGES.values() for info, code in _FENCE.findall(page) if info == wanted]
    return found


def test_the_readme_is_short() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_the_readme_links_every_document() -> None:
    assert {page for page in PAGES if "/" in page} <= {target for _, target in _links("README.md")}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for anchor, target in _links(page):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links {target}"
        if anchor:
            assert anchor in _anchors(path.read_text()), f"{page} links {target}#{anchor}"


def _links(page: str) -> Iterator[tuple[str, str]]:
    """Anchor and target of every link that does not leave the repository."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", PAGES[page]))
    # a link's text may itself have been code
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"\w+:", link):
            target, _, anchor = link.partition("#")
            yield anchor, target


def _anchors(page: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_named_tests_exist() -> None:
    """A cell of the support matrix names the test that backs it."""
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= {path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"\b(test_\w+)", PAGES["docs/support.md"]))
    assert len(named) > 40
    named |= {name for page in PAGES.values() for name in re.findall(r"\b(test_\w+)", page)}
    assert named <= defined, named - defined


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"CHANGELOG.md"}))  # which names what no longer exists, too
def test_named_files_exist(page: str) -> None:
    """Seen from the repository, from the package, or from the document's own folder; ``*`` may stand for more."""
    text = re.sub(r"\]\([^)]*\)", "]", PAGES[page])
    named = set(re.findall(rf"(?<![\w./-])((?:{_FOLDERS})/[\w/.*-]*[\w*])", text))
    named -= {"benchmarks/results/overhead/NAME.json"}
    roots = (ROOT, PACKAGE, (ROOT / page).parent)
    assert {name for name in named if not any(list(root.glob(name)) for root in roots)} == set()


def test_the_way_of_a_gradient_is_the_codes() -> None:
    steps = re.findall(r"^\| `([\w/]+\.py)`: `(\w+)` \|", PAGES["reflora_dist/README.md"], re.MULTILINE)
    assert len(steps) > 10
    for file, name in steps:
        assert re.search(rf"^ *(def|class) {name}\b", (PACKAGE / file).read_text(), re.MULTILINE), (file, name)
    assert "    s = symmetric(" in (PACKAGE / "algebra" / "refactorization.py").read_text()


def test_rooms_import_downwards_only() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", PAGES["reflora_dist/README.md"], re.MULTILINE)
    assert set(rooms) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for number, room in enumerate(rooms)
        for path in (PACKAGE / room).rglob("*.py")
        for imported in _imported_rooms(path)
        if imported not in rooms[number:]
    ]
    assert upwards == []


def _imported_rooms(path: Path) -> Iterator[str]:
    """Rooms, and modules beside them, that a module of a room imports, wherever in it."""
    package = ["reflora_dist", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            names = [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
        for name in names:
            if name.startswith("reflora_dist."):
                yield name.split(".")[1]


def test_examples_are_the_code() -> None:
    for title, file in (("scaled-gd", "methods/scaled_gd.py"), ("recognize", "engines/fsdp2.py")):
        code = re.sub(r' *""".*?"""\n\n?', "", (PACKAGE / file).read_text(), flags=re.DOTALL)
        assert _snippet(title) in code, title


def test_every_snippet_is_run() -> None:
    infos = [info for page in PAGES.values() for info, _ in _FENCE.findall(page) if info.startswith("python")]
    titles = sorted(info.removeprefix("python title=") for info in infos)
    assert titles == [
        "checkpoint",
        "complete-checkpoints",
        "loop",
        "lora-muon",
        "lora-rite",
        "lora-sb",
        "recognize",
        "scaled-gd",
        "trainer",
    ]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))


def _run_loop_and_checkpoint_snippets(rank: int, world_size: int, folder: str) -> str:
    import os

    names = {"base_model": _model()}
    exec(_snippet("loop"), names)
    model, optimizer, handle = (names[key] for key in ("model", "optimizer", "handle"))
    tokens = torch.arange(32).view(1, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    os.chdir(folder)
    handle.detach()
    exec(_snippet("checkpoint"), names)
    assert names["state"] == handle.state_dict()
    _run_method_snippets(names)
    return handle.report().engine


def _run_method_snippets(names: dict) -> None:
    model, tokens = names["model"], torch.arange(32).view(1, 32)
    for method in ("lora-rite", "lora-muon"):
        exec(_snippet(method), names)
        model(input_ids=tokens, labels=tokens).loss.backward()
        names["optimizer"].step()
        assert names["handle"].report().method == method
        assert names["handle"].report().applied_steps == 1
    names |= {"base_model": _model(), "batches": [{"input_ids": tokens, "labels": tokens}] * 8}
    exec(_snippet("lora-sb"), names)
    loaded = names["PeftModel"].from_pretrained(_model(), "adapter")
    plain = names["PeftModel"].from_pretrained(_model(), "plain_lora")
    logits = [peft_model(tokens).logits for peft_model in (names["model"].eval(), loaded, plain)]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-5)


def test_loop_and_checkpoint_snippets(tmp_path: Path) -> None:
    assert run_ranks(_run_loop_and_checkpoint_snippets, 2, str(tmp_path)) == ["fsdp2", "fsdp2"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_trainer_snippets(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(), LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": list(range(16)), "labels": list(range(16))}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    names = {"peft_model": model, "args": arguments, "data": Dataset.from_list(rows)}
    exec(_snippet("trainer"), names)
    handle = next(c.handle for c in names["trainer"].callback_handler.callbacks if hasattr(c, "handle"))
    assert handle.report().steps == 2
    names["args"] = TrainingArguments(
        str(tmp_path / "complete"), max_steps=2, report_to="none", use_cpu=True, save_strategy="steps", save_steps=2
    )
    written = []
    for _ in range(2):  # the second run goes on from the end of the first, and writes nothing
        exec(_snippet("complete-checkpoints"), names)
        last = Path(names["last_complete_checkpoint"](names["args"].output_dir))
        assert last.name == "checkpoint-2"
        written.append((last / "complete.json").stat().st_mtime_ns)
    assert written[0] == written[1]
