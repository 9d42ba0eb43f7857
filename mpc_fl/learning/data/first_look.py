"""What lies in the folder or file that somebody begins with, for a first configuration: `mpc-fl init --data`.

Of a folder some files of each class are read, of a table all rows; nothing is kept but what `mpc_fl.apps.first_configuration`
writes down.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpc_fl.config.data import KERMANY_NAMES
from mpc_fl.errors import DataError, printable
from mpc_fl.learning.data.column_guesses import GuessedTable, guess_table
from mpc_fl.learning.data.dicom_files import patient_identifier
from mpc_fl.learning.data.file_kinds import DICOM, UnreadableImageError, kind_of
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.data.image_folders import ImageFolder, entries
from mpc_fl.learning.data.patients import FROM_HEADER, FROM_NAME, FROM_TABLE, TABLE_FILE
from mpc_fl.learning.data.table_columns import place_of_column
from mpc_fl.learning.data.table_files import read_table_file

_SPLITS = ("train", "test")
_SAMPLE = 12  # files of a class and split that are read
_LAYOUT = "give DIR/{train,test}/<class>/ with images, or a CSV file"


@dataclass(frozen=True)
class FilmsFound:
    """Classes by the names of folders, files by kind, and some of the files, evenly over all folders.

    `patients_from`: what says whose all of these are (`patients.FROM_TABLE` and the like), None where nothing does.
    """

    classes: tuple[str, ...]
    kinds: Mapping[str, int]
    patients_from: str | None
    sample: tuple[Path, ...] = field(repr=False)

    def treatments(self, size: int) -> Counter[str]:
        """To how many of the sample would be done what, to bring it to so many pixels a side; unreadable files have none."""
        found = Counter[str]()
        for path in self.sample:
            try:
                found.update(read_image(path, ImageForm(3, size, "resize", frame="first")).treatments)
            except UnreadableImageError:
                continue
        return found


def look_at_films(root: Path) -> FilmsFound:
    """What a folder of films holds. Raises `DataError` where it has no folders of classes with images."""
    classes, kinds, sample = dict[str, None](), Counter[str](), list[Path]()
    for split in _SPLITS:
        folders = entries(root / split) if (root / split).is_dir() else []
        for folder in folders:
            if not folder.is_dir() or folder.name.startswith("."):
                continue
            classes[folder.name] = None
            files = ImageFolder.of(folder).files
            kinds.update(_kind(path) for path in files)
            taken = min(_SAMPLE, len(files))
            sample += [files[len(files) * number // taken] for number in range(taken)]
    if not kinds:
        raise DataError(f"{root} has no folders of classes with images", _LAYOUT)
    return FilmsFound(tuple(sorted(classes)), dict(kinds), _patients_from(root, sample), tuple(sample))


def look_at_table(path: Path, label_column: str | None = None) -> GuessedTable:
    """What a CSV file may hold, `label_column` where it is known. Raises `DataError` for one that cannot be read, or without it."""
    file = read_table_file(path, () if label_column is None else (label_column,))
    if label_column is not None and place_of_column(file, label_column) is None:
        raise DataError(f"{path} has no column '{printable(label_column, 60)}'", "name the column that holds the class")
    return guess_table(file, label_column)


def _kind(path: Path) -> str:
    try:
        return kind_of(path) or "unknown"
    except UnreadableImageError:
        return "unreadable"


def _patients_from(root: Path, sample: list[Path]) -> str | None:
    if (root / TABLE_FILE).is_file():
        return FROM_TABLE
    if all(_kind(path) == DICOM and patient_identifier(path) is not None for path in sample):
        return FROM_HEADER
    return FROM_NAME if all(re.match(KERMANY_NAMES, path.name) for path in sample) else None
