"""The layout of the code: rooms import downwards only, no circle, short modules, and tests that share only helpers."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "reflora_dist"
# From bottom to top. A room may import those on floors below it; rooms on one floor know nothing of each other.
FLOORS = [
    {"files", "algebra", "command_line"},
    {"methods"},
    {"collectives"},
    {"engines"},
    {"step"},
    {"checkpoints"},
    {"starts"},
    {"callback"},
    {"lora_sb"},
    {"export"},
    {"doctor"},
    {"public"},
    {"checkpoint", "completeness"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# A room inside a room, and all that it may import of the package beside itself.
INNER = {f"{PACKAGE}.algebra.kernels": {f"{PACKAGE}.algebra.types"}}
OUTSIDE = {"launchers", "benchmarks", "tests"}
MOST_LINES = 400


class Import(NamedTuple):
    """One imported module, and the line that imports it."""

    importer: str
    imported: str
    line: str


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands: in functions and under ``TYPE_CHECKING`` too."""
    importer = _module(path, root)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            # what is imported from a package is a module of it, or a name that the package itself defines
            names = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if _exists(name, root) else origin for name in names]
        else:
            continue
        for name in names:
            yield Import(importer, name, f"{path.relative_to(root)}:{node.lineno}")


def _exists(module: str, root: Path) -> bool:
    path = root.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _imports(folder: Path, root: Path) -> list[Import]:
    return [found for path in sorted(folder.rglob("*.py")) for found in _imports_of(path, root)]


def _mistakes(root: Path) -> list[str]:
    """Every line of the package that imports what it may not."""
    imports = _imports(root / PACKAGE, root)
    wrong = [
        f"{line}: {importer} imports {imported}" for importer, imported, line in imports if _above(importer, imported)
    ]
    return [*wrong, *_circle(imports)]


def _above(importer: str, imported: str) -> bool:
    """Whether an import of the package's leaves the room for anything but a floor below it."""
    top, _, _ = imported.partition(".")
    if top != PACKAGE or importer == PACKAGE:
        return top in OUTSIDE
    if imported == PACKAGE:
        return True
    inner = next((room for room in INNER if f"{importer}.".startswith(f"{room}.")), None)
    if inner is not None:
        return not f"{imported}.".startswith(f"{inner}.") and imported not in INNER[inner]
    here, there = importer.split(".")[1], imported.split(".")[1]
    return here != there and FLOOR_OF[there] >= FLOOR_OF[here]


def _circle(imports: list[Import]) -> list[str]:
    """The lines of one circle of modules, if there is one."""
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in imports:
        graph.setdefault(importer, set()).update({imported} - {importer})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        steps = set(zip(circle[1:], circle, strict=False))
        return [f"{line}: a circle: {i} imports {m}" for i, m, line in imports if (i, m) in steps]
    return []


def test_rooms_import_downwards_only_and_in_no_circle() -> None:
    mistakes = _mistakes(ROOT)
    assert not mistakes, "\n".join(mistakes)


def test_every_room_has_a_floor_and_says_what_it_is() -> None:
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert rooms | modules == FLOOR_OF.keys()
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / PACKAGE).rglob("__init__.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("files/a.py", "from ..engines import x", "files/a.py:1: reflora_dist.files.a imports reflora_dist.engines"),
        ("files/a.py", "def f():\n    import reflora_dist.algebra", "files/a.py:2: reflora_dist.files.a imports"),
        ("step/a.py", "if TYPE_CHECKING:\n    from ..callback import C", "step/a.py:2: reflora_dist.step.a imports"),
        ("step/a.py", "from .. import attach", "step/a.py:1: reflora_dist.step.a imports reflora_dist"),
        ("step/a.py", "import tests.support", "step/a.py:1: reflora_dist.step.a imports tests.support"),
        ("step/a.py", "from ..step import b", "step/a.py:1: a circle: reflora_dist.step.a imports reflora_dist.step.b"),
        ("algebra/kernels/a.py", "from ..roots import x", "kernels/a.py:1: reflora_dist.algebra.kernels.a imports"),
        ("algebra/kernels/a.py", "from ..types import x", ""),
        ("step/a.py", "from ..engines import x\nfrom . import c\nimport torch", ""),
    ],
)
def test_an_import_that_breaks_the_rule_is_named(module: str, code: str, expected: str, tmp_path: Path) -> None:
    package = tmp_path / PACKAGE
    for name in ("files", "algebra", "algebra/kernels", "engines", "step", "callback"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").write_text("from .step import a, b\n")
    (package / "algebra" / "types.py").touch()
    (package / "algebra" / "roots.py").touch()
    (package / "step" / "b.py").write_text("def f():\n    from . import a\n")
    (package / "step" / "c.py").touch()
    (package / module).write_text(f"{code}\n")
    mistakes = _mistakes(tmp_path)
    assert bool(mistakes) == bool(expected), mistakes
    assert not expected or any(expected in mistake for mistake in mistakes), mistakes


def test_no_test_module_imports_another() -> None:
    imports = _imports(ROOT / "tests", ROOT)
    found = [i for i in imports if i.imported.startswith("tests.") and i.imported.split(".")[-1].startswith("test_")]
    assert not found
    assert any(found.imported == "tests.support.cluster" for found in imports)


def test_no_module_is_long() -> None:
    paths = [path for folder in (PACKAGE, *OUTSIDE) for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert len(lines) > 200
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}
