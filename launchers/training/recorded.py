"""What a run has recorded of the prompt template, in the files that it left beside or above an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME

from reflora_dist.files.open_files import read_json
from reflora_dist.files.records import require_fields

from ..data.tokenization import TEMPLATE_NAMES
from .recorder import METRICS_FILE
from .run_file import RUN_FILE, is_written_by_a_run, read_mapping
from .used_folder import saved_state

_REMEDY = "give --prompt_template"


def recorded_template(adapter: str) -> str | None:
    """Return the prompt template with which an adapter or checkpoint was trained; None if no run has recorded it.

    A checkpoint's own state comes first. Then come ``metrics.json``, which a run writes at its end, and ``run.yaml``,
    which it writes at its beginning, in the folder and in the one above.

    Raises:
        ValueError: a record is damaged.
    """
    for path, settings, changes in _records(Path(adapter)):
        template = settings.get("prompt_template")
        for change in changes:
            if "prompt_template" in change:
                template = change["prompt_template"][1]  # the run was resumed with another one
        if template is not None and template not in list(TEMPLATE_NAMES):
            raise ValueError(f"{path} holds prompt_template={template!r:.60}, which is unknown: {_REMEDY}")
        return template
    return None


def _records(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any], list[Any]]]:
    """Yield the file, the settings of a run, and their changes, of each record that there is."""
    if (folder / TRAINER_STATE_NAME).is_file():
        saved = saved_state(str(folder))
        if saved.settings is not None:
            yield folder / TRAINER_STATE_NAME, saved.settings, saved.changes
    for place in (folder, folder.parent):
        if (path := place / METRICS_FILE).is_file():
            metrics = read_json(path, _REMEDY)
            if place == folder or "settings" in metrics:  # other programs write a file of this name, too
                metrics = {"settings_changed": [], **metrics}
                require_fields(metrics, {"settings": Mapping, "settings_changed": list}, path, _REMEDY)
                yield path, metrics["settings"], metrics["settings_changed"]
        if is_written_by_a_run(path := place / RUN_FILE) and not (place == folder and _is_older(folder, path)):
            yield path, read_mapping(path), []


def _is_older(folder: Path, run_file: Path) -> bool:
    """Return whether the folder's adapter is an earlier run's, since the last one was killed before its results."""
    adapter = folder / SAFETENSORS_WEIGHTS_NAME
    return adapter.is_file() and adapter.stat().st_mtime_ns < run_file.stat().st_mtime_ns
