"""What stands in the READMEs and beside the records is what the records give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.reports import matrix_factorization


def test_tables_plots_and_readmes_are_made_from_the_records() -> None:
    assert len(report.records()) >= 5
    assert list(report.outdated()) == []


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one record and one README, reports written."""
    source = next(path for path in report.records() if path.parent.name == "matrix_factorization")
    record = tmp_path / "benchmarks" / "results" / "matrix_factorization" / "toy_x_202611.json"
    record.parent.mkdir(parents=True)
    record.write_text(source.read_text())
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: matrix_factorization/toy_x_202611 -->\n<!-- end of table -->\nb\n")
    monkeypatch.setattr(report, "RESULTS", record.parents[1])
    monkeypatch.setattr(report, "READMES", (readme,))
    # reports are looked up by name in the repository itself
    monkeypatch.setattr(report, "_module", lambda content: matrix_factorization)
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    report.write(record)
    readme.write_text(report.filled(readme))
    assert list(report.outdated()) == []
    return record


def test_a_changed_figure_shows(copy: Path) -> None:
    content = json.loads(copy.read_text())
    content["results"]["problems"][0]["methods"]["lora"]["best_learning_rate"] = 0.01
    copy.write_text(json.dumps(content))
    names = {Path(name).name for name in report.outdated()}
    assert names == {"toy_x_202611.md", "toy_x_202611.png", "README.md"}


def test_an_edited_readme_shows(copy: Path) -> None:
    readme = report.READMES[0]
    readme.write_text(readme.read_text().replace("lora", "l0ra", 1))
    assert list(report.outdated()) == ["README.md"]


def test_an_edited_headline_shows(tmp_path: Path) -> None:
    first_screen, _, _ = report.READMES[0].read_text().partition("## Start")
    figure = " MiB more"
    assert figure in first_screen
    readme = tmp_path / "README.md"
    readme.write_text(first_screen.replace(figure, f"9{figure}"))
    assert report.filled(readme) == first_screen


def test_a_readme_that_names_no_record_is_refused(copy: Path) -> None:
    readme = report.READMES[0]
    readme.write_text("<!-- table: overhead/nothing -->\n<!-- end of table -->\n")
    with pytest.raises(ValueError, match="overhead/nothing"):
        report.filled(readme)
