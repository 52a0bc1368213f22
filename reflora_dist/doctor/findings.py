"""What is wrong, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

LEVELS = ("error", "warning", "note")


class Finding(NamedTuple):
    """One thing that was noticed.

    Attributes:
        level: "error": the run could not work; "warning": it would do something that is easily overlooked; "note".
        where: the file, or the part of the machine.
        message: what was found, with the value.
        remedy: what to do; may be empty.
    """

    level: str
    where: str
    message: str
    remedy: str = ""


class Findings(list[Finding]):
    """In the order in which they were made."""

    def error(self, where: str, message: str, remedy: str = "") -> None:
        """Note why the run could not work."""
        self.append(Finding("error", where, message, remedy))

    def warning(self, where: str, message: str, remedy: str = "") -> None:
        """Note what is probably not meant."""
        self.append(Finding("warning", where, message, remedy))

    def note(self, where: str, message: str, remedy: str = "") -> None:
        """Note what is good to know."""
        self.append(Finding("note", where, message, remedy))

    @property
    def failed(self) -> bool:
        """Whether the run could not work."""
        return any(finding.level == "error" for finding in self)
