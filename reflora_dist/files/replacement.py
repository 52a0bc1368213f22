"""Replacement of a folder as a whole, such that a killed save leaves a complete copy that the next run finds.

    NAME             the folder
    .NAME.part       its successor, while it is written; complete once the record is in it
    .NAME.previous   the folder, while its successor takes its name

Only folders that this module wrote are removed. A folder counts as such if it holds the record or the mark of a part,
or is empty.
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
    """The replacement of one folder. There is no communication: only one rank may call ``begin`` and ``finish``.

    Args:
        folder: the folder to replace; a link is kept, and its target is replaced.
        record: name of the JSON file that is written last and lists the folder's ``files``.
        own: further names in the folder that a save writes. All other names are moved into the successor.

    Attributes:
        folder: the folder, with links resolved.
        part: its successor, which a save writes to between ``begin`` and ``finish``.
        previous: the name of the folder while its successor takes its name.
    """

    def __init__(self, folder: Path, record: str, own: Collection[str]) -> None:
        self.folder = folder.resolve()
        self.part = self.folder.with_name(f".{self.folder.name}.part")
        self.previous = self.folder.with_name(f".{self.folder.name}.previous")
        self._record = record
        self._own = set(own) | {record, _MARK}

    def complete_copy(self) -> Path:
        """Return the folder, or its complete copy if a save was killed between two renames.

        If no copy is complete, this is the folder.
        """
        candidates = [path for path in (self.folder, self.part, self.previous) if self._is_complete(path)]
        if candidates and candidates[0] != self.folder:
            logger.warning("%s is not there, the last save was interrupted: using %s", self.folder, candidates[0])
        return candidates[0] if candidates else self.folder

    def begin(self) -> None:
        """Finish the work of a killed save, then create an empty part.

        Raises:
            ValueError: one of the three names belongs to a file, a link or a foreign folder. Nothing is changed then.
        """
        self._refuse_foreign()
        if not self._is_complete(self.folder) and (copy := self.complete_copy()) != self.folder:
            if self.folder.is_dir():
                self.folder.rmdir()  # it is empty: _refuse_foreign refuses anything else
            copy.rename(self.folder)
        if self._is_complete(self.folder):
            self._retire()
        if self.part.exists():
            self._remove(self.part)
        self.part.mkdir(parents=True)
        (self.part / _MARK).touch()

    def finish(self) -> None:
        """Give the folder's name to the part, which must be complete, and remove the previous folder."""
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
        """Remove the previous folder, after moving the files that others have put into it."""
        if not self.previous.is_dir():
            return
        own = self._own | self._listed(self.previous)
        for path in self.previous.iterdir():
            target = self.folder / path.name
            if path.name not in own and not target.exists():
                path.rename(target)
        self._remove(self.previous)

    def _remove(self, folder: Path) -> None:
        """Remove a folder, its record and mark last: if this is killed, the next save knows the rest as its own."""
        for path in folder.iterdir():
            if path.name not in (self._record, _MARK):
                remove(path)
        shutil.rmtree(folder)

    def _listed(self, folder: Path) -> set[str]:
        """Return the first path component of every file in the record; nothing if the record cannot be read."""
        try:
            return {name.split("/")[0] for name in read_json(folder / self._record)["files"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link without its target; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
