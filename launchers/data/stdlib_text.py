"""English and Python text from the standard library of the running interpreter.

Nothing is downloaded. Docstrings and signatures of Python modules come from their parsed source, without an import;
those of built-in modules come from introspection. For one interpreter the result is always the same.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

# Test suites, vendored wheels and third-party packages below the standard library's folder.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
    | {"test", "tests", "turtledemo"}
)
# Extension modules that are safe to import on every platform. sys is not among them, because programs replace its
# hooks, and its content would depend on the program.
INTROSPECTED_MODULES = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "time",
    "gc",
    "zlib",
    "array",
    "binascii",
)

ANSWER_CHARS = (15, 320)  # shorter first paragraphs are no answers, longer ones would be cut at 128 tokens
HELD_OUT_PERCENT = 8
_KINDS = {ast.Module: "module", ast.ClassDef: "class"}
_QUESTIONS = {
    "module": "What is the module {name} for?",
    "class": "What is the class {name}?",
    "function": "What does the function {name} do?",
    "method": "What does the method {name} do?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentedObject:
    """One public module, class, function or method of the standard library and its docstring."""

    name: str
    kind: str
    signature: str
    doc: str

    @property
    def summary(self) -> str:
        """The docstring's first paragraph on one line."""
        return re.sub(r"\s+", " ", self.doc.strip().split("\n\n")[0]).strip()

    @property
    def record(self) -> dict[str, str]:
        """The object as an instruction record: a question, the signature as input, the summary as the answer."""
        question = _QUESTIONS[self.kind].format(name=self.name)
        return {"instruction": question, "input": self.signature, "output": self.summary}

    @property
    def source_text(self) -> str:
        """The object as Python text: its header line and docstring."""
        header = {"module": f"# module {self.name}", "class": f"class {self.name}:"}
        first_line = header.get(self.kind, f"def {self.signature or self.name + '(...)'}:")
        return f'{first_line}\n    """{self.doc}"""'

    def is_held_out(self) -> bool:
        """Return whether the object belongs to the held-out split, a fixed pseudo-random choice by its name."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


@dataclasses.dataclass(frozen=True)
class StandardLibraryText:
    """The texts from which the embedded model and data are made.

    Attributes:
        documents: pre-training texts, without the docstrings of held-out objects.
        train_records: instruction records to fine-tune on.
        held_out_records: instruction records of objects that neither training sees.
    """

    documents: list[str]
    train_records: list[dict[str, str]]
    held_out_records: list[dict[str, str]]

    def digest(self) -> str:
        """Return a fingerprint of all texts, for cache keys."""
        parts = [*self.documents, *(str(r) for r in (*self.train_records, *self.held_out_records))]
        return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def collect() -> StandardLibraryText:
    """Read the running interpreter's standard library and split it by object.

    Raises:
        RuntimeError: fewer than 500 documented objects were found (a stripped or zipped installation).
    """
    objects = _unique_by_summary([*_parsed_objects(), *_introspected_objects()])
    usable = [o for o in objects if ANSWER_CHARS[0] <= len(o.summary) <= ANSWER_CHARS[1]]
    if len(usable) < 500:
        raise RuntimeError(
            f"only {len(usable)} documented objects found below {sysconfig.get_path('stdlib')!r}: this "
            "Python has no readable standard library sources; use another one or give --model and --dataset"
        )
    held_out = [o for o in usable if o.is_held_out()]
    held_out_names = {o.name for o in held_out}
    documents = [o.source_text for o in objects if o.name not in held_out_names]
    return StandardLibraryText(
        documents=[*_language_reference(), *documents],
        train_records=[o.record for o in usable if o.name not in held_out_names],
        held_out_records=[o.record for o in held_out],
    )


def _unique_by_summary(objects: list[DocumentedObject]) -> list[DocumentedObject]:
    """Keep the first object of each name and each summary, so that no held-out answer is also trained on."""
    seen: set[str] = set()
    unique = []
    for candidate in sorted(objects, key=lambda o: (o.name, o.doc)):
        keys = {candidate.name, candidate.summary.lower()}
        if candidate.summary and not keys & seen:
            unique.append(candidate)
        seen |= keys
    return unique


def _language_reference() -> list[str]:
    """Return the texts of ``help('topic')``, one per topic. The list is empty if a distribution leaves them out."""
    try:
        from pydoc_data import topics
    except ImportError:
        return []
    return [topics.topics[name] for name in sorted(topics.topics)]


def _parsed_objects() -> Iterator[DocumentedObject]:
    """Yield documented public objects of the modules that are written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or parts[0] not in sys.stdlib_module_names:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not _is_public(name):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a data file with a .py name; the standard library has a few
        yield from _walk(tree, name)


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, inside: str = ""
) -> Iterator[DocumentedObject]:
    doc = ast.get_docstring(node)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if doc:
            kind = "method" if inside == "class" else "function"
            signature = f"{node.name}({ast.unparse(node.args)})"
            yield DocumentedObject(name=name, kind=kind, signature=signature, doc=doc)
        return
    if doc:
        yield DocumentedObject(name=name, kind=_KINDS[type(node)], signature="", doc=doc)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and _is_public(child.name):
            yield from _walk(child, f"{name}.{child.name}", inside=_KINDS[type(node)])


def _introspected_objects() -> Iterator[DocumentedObject]:
    """Yield documented public objects of built-in modules, whose source is C."""
    for module_name in INTROSPECTED_MODULES:
        module = import_module(module_name)
        for name, value in sorted(vars(module).items()):
            # objects that a program (or site, or a test runner) adds to builtins are not written in C
            if _is_public(name) and (inspect.isbuiltin(value) or inspect.isclass(value)):
                qualified = name if module_name == "builtins" else f"{module_name}.{name}"
                yield from _introspect(value, qualified, "class" if inspect.isclass(value) else "function")


def _introspect(value: object, name: str, kind: str) -> Iterator[DocumentedObject]:
    doc = inspect.getdoc(value)
    if doc:
        yield DocumentedObject(name=name, kind=kind, signature=_signature_of(value, name), doc=doc)
    if kind == "class":
        for member_name, member in sorted(vars(value).items()):
            if _is_public(member_name) and inspect.isroutine(member):
                yield from _introspect(member, f"{name}.{member_name}", "method")


def _signature_of(value: object, name: str) -> str:
    if inspect.isclass(value):
        return ""
    try:
        signature = name.rsplit(".", 1)[-1] + str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""  # many C functions have no introspectable signature
    return "" if " at 0x" in signature else signature  # an address would differ from run to run


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))
