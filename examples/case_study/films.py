"""Films for the study: phantoms written as files, a folder for each hospital, and a few films to diagnose.

Nothing is changed in the data that were given: files are linked, or copied where links cannot be made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpc_fl.config.loading import load_config
from mpc_fl.errors import DataError
from mpc_fl.files import OTHERS_MAY_NOTHING
from mpc_fl.learning.data.loading import patients_per_hospital
from mpc_fl.learning.data.partition import partition_equal, patient_of
from mpc_fl.learning.data.phantoms import make_phantoms

CLASSES = ("normal", "bacterial", "viral")
SPLITS = ("train", "test")
_PHANTOMS = {"train": 420, "test": 90}  # patients
_SIDE, _SEED = 64, 1


@dataclass(frozen=True)
class Sizes:
    """Training patients of the smallest and of the largest hospital."""

    smallest: int
    largest: int

    @property
    def public(self) -> tuple[int, int]:
        """Round bounds on both, which hospitals could publish."""
        return max(1, self.smallest // 10 * 10), -(-self.largest // 10) * 10


def write_phantoms(folder: Path) -> Path:
    """Phantoms as PNG in `folder`/{train,test}/<class>/, named by patient, once; return `folder`."""
    done = folder / "complete"
    if done.exists():
        return folder
    for split, patients in _PHANTOMS.items():
        found = make_phantoms(patients, len(CLASSES), _SIDE, _SEED, "train" if split == "train" else "test")
        first = 0 if split == "train" else _PHANTOMS["train"]  # no patient is in both
        for number, (image, label, patient) in enumerate(zip(found.images, found.labels, found.patients, strict=True)):
            place = folder / split / CLASSES[label] / f"person{first + patient}_phantom_{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255).astype(np.uint8)).save(place)
    done.touch()
    return folder


def listed(data: Path) -> list[Path]:
    """All films of the study's classes, in order. Raises `DataError` where a split has none of a class."""
    files = list[Path]()
    for split in SPLITS:
        for name in CLASSES:
            found = sorted(path for path in (data / split / name).glob("*.*") if not path.name.startswith("."))
            if not found:
                raise DataError(
                    f"{data / split / name} holds no film", "give --data DIR with DIR/{train,test}/<class>/"
                )
            files += found
    return files


def sizes(config: Path, data: Path, values: Mapping[str, Any]) -> Sizes:
    """How many training patients hospitals get of `data` by a configuration with values over it. Raises what reading raises."""
    overrides = [f"{key}={value}" for key, value in values.items()]
    settings = load_config(config, overrides).with_values(site={"data": str(data)})
    counts = patients_per_hospital(settings)
    return Sizes(min(counts), max(counts))


def divide(data: Path, folder: Path, hospitals: int, seed: int = _SEED) -> Path:
    """A folder `folder`/hospital-<n>/{train,test}/<class>/ for each, no patient at two, once; return `folder`."""
    done = folder / "complete"
    if done.exists():
        return folder
    for split in SPLITS:
        files = [path for path in listed(data) if path.parts[-3] == split]
        owners = list(dict.fromkeys(patient_of(path.name) for path in files))
        label_of = dict[str, int]()
        for path in files:
            label_of.setdefault(patient_of(path.name), CLASSES.index(path.parts[-2]))
        parts = partition_equal(owners, np.array([label_of[owner] for owner in owners]), hospitals, seed)
        at = {owners[number]: rank for rank, part in enumerate(parts) for number in part.tolist()}
        for path in files:
            place = folder / f"hospital-{at[patient_of(path.name)]}" / split / path.parts[-2] / path.name
            _put(path, place)
    done.touch()
    return folder


def choose(data: Path, folder: Path, of_each: int) -> Path:
    """So many test films of each class in `folder`/<class>/, spread evenly over the names in order, once; return `folder`."""
    films = listed(data)
    for name in CLASSES:
        found = [path for path in films if path.parts[-3:-1] == ("test", name)]
        for row in np.linspace(0, len(found) - 1, min(of_each, len(found))).round().astype(int).tolist():
            _put(found[row], folder / name / found[row].name)
    return folder


def _put(path: Path, place: Path) -> None:
    if place.exists():
        return
    place.parent.mkdir(mode=0o777 & ~OTHERS_MAY_NOTHING, parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), place)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, place)
