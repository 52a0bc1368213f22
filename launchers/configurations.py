"""The configuration files that come with the package: in the repository, and inside the wheel."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
# by the folder's path in the repository; in the wheel, launchers/ and ds_configs/ lie beside each other, too
_FOLDERS = {
    "ds_configs": _HERE.parent / "ds_configs",
    "launchers/accelerate": _HERE / "accelerate",
    "launchers/examples": _HERE / "examples",
}


def shipped_configuration(name: str, *, suffix: str | None = None) -> Path:
    """Return a configuration file that comes with the package.

    Args:
        name: the file's name, with or without its ending and its folder in the repository: "zero3", "zero3.json" and
            "ds_configs/zero3.json" are the same file.
        suffix: ".json" or ".yaml", to find files of that kind alone.

    Raises:
        ValueError: no file has that name, or several have; the message names what there is.
    """
    shipped = {
        f"{label}/{path.name}": path
        for label, folder in _FOLDERS.items()
        for path in sorted(folder.glob("*"))
        if path.suffix in ((".json", ".yaml") if suffix is None else (suffix,))
    }
    found = [label for label, path in shipped.items() if name in (label, path.name, path.stem)]
    if len(found) == 1:
        return shipped[found[0]]
    if found:
        raise ValueError(f"{name!r} is ambiguous: give {' or '.join(found)}")
    raise ValueError(f"{name!r} is no configuration of this package: it has {', '.join(shipped)}")
