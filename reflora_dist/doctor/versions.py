"""Comparison of installed versions with the required and the tested ones."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from .findings import Findings

# A copy of constraints.txt, which is not part of the installed package; a test compares them.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "deepspeed": "0.19.8",
}


class PackageVersion(NamedTuple):
    """A package's versions.

    Attributes:
        package: its name.
        installed: the installed version; empty if there is none.
        required: the required range; empty if any version works.
        tested: the version that this release was tested with.
    """

    package: str
    installed: str
    required: str
    tested: str


def check_versions(findings: Findings, needed: set[str]) -> list[PackageVersion]:
    """Check the version of every package that matters, and return all of them.

    Args:
        findings: receives the problems.
        needed: optional packages that this run needs to start.
    """
    required = _required()
    rows = []
    for package, tested in TESTED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = ""
        row = PackageVersion(package, installed, required.get(package, ""), tested)
        rows.append(row)
        _judge(row, findings, package in needed)
    return rows


def _required() -> dict[str, str]:
    try:
        lines = metadata.requires("reflora_dist") or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


def _judge(row: PackageVersion, findings: Findings, needed: bool) -> None:
    if not row.installed:
        if needed:
            findings.error(row.package, "is not installed", f"pip install '{row.package}=={row.tested}'")
        return
    if row.required and not Requirement(f"{row.package}{row.required}").specifier.contains(row.installed, True):
        findings.error(
            row.package, f"{row.installed} is installed, {row.required} is required", f"{row.package}=={row.tested}"
        )
    elif Version(row.installed).release[:2] > Version(row.tested).release[:2]:
        findings.note(row.package, f"{row.installed} is newer than the tested {row.tested}")
    elif Version(row.installed).release[:2] < Version(row.tested).release[:2]:
        findings.note(row.package, f"{row.installed} is older than the tested {row.tested}")
