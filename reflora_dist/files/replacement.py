"""A folder that is replaced as a whole: at every moment one complete copy of it has a name that the next run looks for.

    NAME             the folder
    .NAME.part       its successor, while it is written; complete once the record is in it
    .NAME.previous   the folder, while its successor takes its name

What is removed was written here: a folder counts as such if it holds the record, the mark of a part, or nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from .open_files import read_json

logger = logging.getLogger(__name__)

_MARK = ".unfinished"


class Replacement:
    """The names around one folder. Local: one rank calls what changes anything.

    Args:
        folder: to be replaced; a link stays, and leads to the new folder.
        record: name of the file that is written last, and lists the folder's ``files`` (JSON).
        own: further names in the folder that are written here; all others are moved into the successor.
    """

    def __init__(self, folder: Path, record: str, own: Collection[str]) -> None:
        self.folder = folder.resolve()
        self.part = self.folder.with_name(f".{self.folder.name}.part")
        self.previous = self.folder.with_name(f".{self.folder.name}.previous")
        self._record = record
        self._own = set(own) | {record, _MARK}

    def complete_copy(self) -> Path:
        """The folder, or what is complete of it after a save was killed between two renames."""
        candidates = [path for path in (self.folder, self.part, self.previous) if self._is_complete(path)]
        if candidates and candidates[0] != self.folder:
            logger.warning("%s is not there, the last save was interrupted: using %s", self.folder, candidates[0])
        return candidates[0] if candidates else self.folder

    def begin(self) -> None:
        """Make an empty part; first finish what a killed save left undone.

        Raises:
            ValueError: one of the names is taken by something that was not written here. Nothing is changed then.
        """
        self._refuse_foreign()
        if not self._is_complete(self.folder) and (copy := self.complete_copy()) != self.folder:
            if self.folder.is_dir():
                self.folder.rmdir()  # empty, or it would have been refused
            copy.rename(self.folder)
        if self._is_complete(self.folder):
            self._retire()
        if self.part.exists():
            shutil.rmtree(self.part)
        self.part.mkdir(parents=True)
        (self.part / _MARK).touch()

    def finish(self) -> None:
        """The part, complete now, takes the folder's name."""
        (self.part / _MARK).unlink(missing_ok=True)
        if self.folder.is_dir():
            self.folder.rename(self.previous)
        self.part.rename(self.folder)
        self._retire()

    def _is_complete(self, path: Path) -> bool:
        return (path / self._record).is_file() and not path.is_symlink()

    def _refuse_foreign(self) -> None:
        for path in (self.folder, self.part, self.previous):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise ValueError(
                    f"{path} is a link or no folder, and would be replaced: remove it, or name another folder"
                )
            if path.is_dir() and any(path.iterdir()) and not self._is_complete(path) and not (path / _MARK).is_file():
                raise ValueError(
                    f"{path} holds files and is no checkpoint ({self._record} is missing): it would be replaced as a "
                    "whole; name a folder that does not exist, or an earlier checkpoint"
                )

    def _retire(self) -> None:
        """Remove the previous folder, but for what others have put into it."""
        if not self.previous.is_dir():
            return
        own = self._own | self._listed(self.previous)
        for path in self.previous.iterdir():
            target = self.folder / path.name
            if path.name not in own and not target.exists():
                path.rename(target)
        shutil.rmtree(self.previous)

    def _listed(self, folder: Path) -> set[str]:
        """The top of every name in the record."""
        try:
            return {name.split("/")[0] for name in read_json(folder / self._record)["files"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link, but not what it leads to; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
