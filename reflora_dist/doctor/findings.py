"""Findings: problems of a run, with remedies."""

from __future__ import annotations

from typing import NamedTuple

LEVELS = ("error", "warning", "note")
SHARED_SEQUENCES = (
    "{}: the method is the same, since gradients are summed over the ranks of a sequence before the step. The memory "
    "of activations is estimated for whole sequences"
)


class Finding(NamedTuple):
    """One problem or remark.

    Attributes:
        level: "error": the run could not work; "warning": the run has an unintended effect; "note": a remark.
        where: the file, option or part of the machine that it is about.
        message: the problem, with the value.
        remedy: what to do; may be empty.
    """

    level: str
    where: str
    message: str
    remedy: str = ""


class Findings(list[Finding]):
    """A list of findings, in the order of their discovery."""

    def error(self, where: str, message: str, remedy: str = "") -> None:
        """Add a reason why the run could not work."""
        self.append(Finding("error", where, message, remedy))

    def warning(self, where: str, message: str, remedy: str = "") -> None:
        """Add an effect that is probably not intended."""
        self.append(Finding("warning", where, message, remedy))

    def note(self, where: str, message: str, remedy: str = "") -> None:
        """Add a remark."""
        self.append(Finding("note", where, message, remedy))

    @property
    def failed(self) -> bool:
        """Whether there is an error, so that the run could not work."""
        return any(finding.level == "error" for finding in self)
