"""Find the configuration files that ship with the launchers, by name."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# folder and suffix, in the order in which they are searched
_SHIPPED = (("launchers/examples", ".yaml"), ("ds_configs", ".json"), ("launchers/accelerate", ".yaml"))


def shipped_configuration(name: str) -> Path | None:
    """Return the path of a shipped configuration, or None if there is none of that name.

    Args:
        name: ``NAME`` or ``NAME.SUFFIX``, if wanted with the folder: ``zero3``, ``zero3.json``, ``ds_configs/zero3``,
            ``examples/zero3.yaml``.
    """
    asked = Path(name)
    for folder, suffix in _SHIPPED:
        path = _ROOT / folder / f"{asked.stem}{suffix}"
        in_folder = str(asked.parent) in (".", folder, Path(folder).name)
        if in_folder and asked.suffix in ("", suffix) and path.is_file():
            return path
    return None


def shipped_names(folder: str) -> list[str]:
    """Return the names of the configurations in a folder of :func:`shipped_configuration`, sorted."""
    return sorted(
        path.stem for name, suffix in _SHIPPED if name == folder for path in (_ROOT / name).glob(f"*{suffix}")
    )
