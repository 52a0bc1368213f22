"""The words for the running program, which is a script's file or a command that the wheel installs."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that the wheel installs, and what it runs.

    Attributes:
        name: what the user typed.
        module: the module that it runs, below ``reflora_dist``.
        file: the file that runs the same in a clone; None for a module that ``python -m`` starts there too.
    """

    name: str
    module: str
    file: str | None = None


_started: list[Command] = []


def started_as(command: Command) -> None:
    """Say that this process is a command, before its module runs."""
    _started[:] = [command]


def in_own_words(text: str) -> str:
    """Return a help or an error with the command's name in the place of the file's; unchanged if a file was started."""
    if not _started:
        return text
    command = _started[0]
    module = f"reflora_dist.{command.module}"
    if command.file is None:
        return text.replace(f"python -m {module}", command.name)
    folder, _, script = command.file.rpartition("/")
    path = re.escape(command.file)
    text = re.sub(rf"python {path}", command.name, text)
    text = re.sub(rf"(?m)((?:torchrun|accelerate launch)\b.*?) {path}", rf"\1 -m {module}", text)
    text = re.sub(rf"(?m)(deepspeed\b.*?) {path}", rf"\1 --module {module}", text)
    return re.sub(rf"(?<![\w/.])(?:{folder}/)?{re.escape(script)}", command.name, text)
