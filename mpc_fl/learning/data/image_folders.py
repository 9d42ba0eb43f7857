"""Folders of images: one for each class, and in each what is read and what is left aside, which is counted by kind."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mpc_fl.errors import DataError
from mpc_fl.learning.data.image_files import what_is_left_aside


@dataclass(frozen=True)
class ImageFolder:
    """The image files of one folder in order of their names, and how many entries of which kind are none."""

    files: tuple[Path, ...]
    left_aside: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, folder: Path) -> ImageFolder:
        """What lies in a folder, not below it. Raises `DataError` when it cannot be listed."""
        files, aside = [], Counter[str]()
        for path in entries(folder):
            what = what_is_left_aside(path)
            if what is None:
                files.append(path)
            else:
                aside[what] += 1
        return cls(tuple(files), aside)


def entries(folder: Path) -> list[Path]:
    """All entries of a folder, sorted. Raises `DataError` when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror or 'no access'}", "check its permissions") from None


def class_folders(root: Path, classes: tuple[str, ...], alone: bool = False) -> list[Path]:
    """The folder of each class, in the order of `classes`. Raises `DataError` for a missing one and for any other.

    Of one hospital `alone` folders may be missing: of classes that it has no patient of, or the whole of its test patients.
    """
    try:
        exists = root.is_dir()
    except OSError as error:
        raise DataError(f"cannot look into {root.parent}: {error.strerror}", "check its permissions") from None
    if not exists:
        if alone and root.parent.is_dir():
            return [root / name for name in classes]
        raise DataError(f"data folder {root} does not exist", "give DIR/{train,test}/<class>/ with --data DIR")
    # Hidden folders are left by notebooks and file servers; they are no classes.
    found = [entry.name for entry in entries(root) if entry.is_dir() and not entry.name.startswith(".")]
    unknown = [name for name in found if name not in classes]
    missing = [name for name in classes if name not in found]
    if unknown and (near := difflib.get_close_matches(unknown[0], missing, 1)):
        raise DataError(
            f"{root} has a folder '{unknown[0]}' and none called '{near[0]}', which is one of data.classes",
            "give the folder the name of its class; data.classes is the same for all hospitals",
        )
    if unknown:
        raise DataError(
            f"wrong number of classes: {root} has a folder '{unknown[0]}', {len(classes)} classes are configured",
            "set data.classes to all folder names",
        )
    for name in classes:
        if name not in found and not alone:
            raise DataError(f"class folder {root / name} does not exist", "create it or correct data.classes")
    return [root / name for name in classes]
