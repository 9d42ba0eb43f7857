"""What one hospital owns: find records, divide patients over hospitals, read only this hospital's own files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpc_fl.config.config import Config
from mpc_fl.config.data import SOURCES
from mpc_fl.config.phantoms import ShortcutSection
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.attributes import group_numbers
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.file_kinds import IMAGE_KINDS
from mpc_fl.learning.data.image_folders import ImageFolder
from mpc_fl.learning.data.loaders import read_with_loader
from mpc_fl.learning.data.partition import partition_dirichlet, partition_equal, place_of
from mpc_fl.learning.data.patients import UNREADABLE
from mpc_fl.learning.data.phantom_shortcuts import with_shortcut
from mpc_fl.learning.data.phantoms import phantom_labels
from mpc_fl.learning.data.reading import ReadImages, read_files, require_one_readable, require_readable
from mpc_fl.learning.data.records import Index, index_from, index_of, is_one_hospitals, phantom_names
from mpc_fl.learning.data.spellings import plain_patient
from mpc_fl.learning.data.tables import Part, Split, read_csv, read_medmnist
from mpc_fl.roles import hospital_name

log = logging.getLogger(__name__)

_LARGEST_OVER_SMALLEST = 4  # where privacy.largest_hospital is not set
_NAMED = 5  # patients that a message names


def _patients_of_hospitals(index: Index, config: Config) -> list[list[str]]:
    """Patient keys of every hospital whose records these are, after partition: of all, or of one alone."""
    first_label: dict[str, int] = {}
    for patient, label in zip(index.patients, index.labels.tolist(), strict=True):
        first_label.setdefault(patient, label)
    keys = list(first_label)
    if not keys and is_one_hospitals(config):
        return [[]]
    parts = _divided(keys, np.array([first_label[key] for key in keys]), config)
    return [[keys[i] for i in part] for part in parts]


def _divided(patients: Sequence[str], labels: np.ndarray, config: Config) -> list[np.ndarray]:
    """Numbers of each hospital's patients, from their names and classes, int (patients,)."""
    hospitals, method = config.federation.hospitals, config.data.partition.method
    if is_one_hospitals(config):
        return partition_equal(patients, labels, 1, config.seed)
    if method == "none":
        (whole,) = partition_equal(patients, labels, 1, config.seed)
        return [whole] * hospitals
    if method == "equal":
        return partition_equal(patients, labels, hospitals, config.seed)
    return partition_dirichlet(patients, labels, hospitals, config.data.partition.alpha, config.seed)


@dataclass(frozen=True)
class PublicSizes:
    """Public bounds on the training patients of every hospital."""

    smallest: int
    largest: int


def public_sizes(config: Config) -> PublicSizes:
    """What all parties may know of hospitals' sizes: what is configured, or of phantoms, which are made from public numbers.

    Raises `ConfigError` where neither says it.
    """
    smallest, largest = config.privacy.smallest_hospital, config.privacy.largest_hospital
    if smallest is None:
        if config.data.source != "phantoms":
            raise ConfigError(
                "privacy.smallest_hospital is not set: sampling and noise must follow from a public figure, never from the "
                "number of a hospital's patients",
                "set it to what all hospitals may publish as the fewest training patients that any of them has",
            )
        labels = phantom_labels(config.data.phantoms.train_patients, len(config.data.classes), config.seed, "train")
        names, limit = phantom_names(range(len(labels)), "train"), config.data.subset.train_patients
        parts = ([names[number] for number in part[:limit]] for part in _divided(names, labels, config))
        sizes = [len(_for_part(part, "train", config)) for part in parts]
        return PublicSizes(max(1, min(sizes)), max(1, *sizes))
    if largest is None:
        largest = max(smallest, min(_LARGEST_OVER_SMALLEST * smallest, config.aggregation.count_bound))
    return PublicSizes(smallest, largest)


@dataclass(frozen=True)
class SharedPatients:
    """Test patients that are by name also training patients, in order, `of` so many test patients."""

    names: tuple[str, ...]
    of: int

    @property
    def described(self) -> str:
        """Some words with the first names; empty when there is none."""
        if not self.names:
            return ""
        more = f" and {len(self.names) - _NAMED} more" if len(self.names) > _NAMED else ""
        return f"{len(self.names)} of {self.of} test patients are also training patients by name: " + (
            ", ".join(self.names[:_NAMED]) + more
        )


def shared_patients(config: Config) -> SharedPatients:
    """Which test patients train somewhere, as far as names at hand say: of all hospitals that share one data folder.

    Tables are divided by patient, phantoms number those of each split anew: none is shared there. What a loader calls a patient
    is one. Raises `DataError` like `load_hospital`.
    """
    if config.data.source in ("phantoms", "csv", "breast_cancer"):
        return SharedPatients((), 0)
    index, limit = index_of(config, "train"), config.data.subset.train_patients
    training = {plain_patient(name) for part in _patients_of_hospitals(index, config) for name in part[:limit]}
    testing = dict.fromkeys(index_of(config, "test").patients)
    return SharedPatients(tuple(sorted(name for name in testing if plain_patient(name) in training)), len(testing))


def _index_of(config: Config, split: Split) -> Index:
    """The records of a split; tests are made without those that train, unless `data.shared_patients` says otherwise."""
    index, rule = index_of(config, split), config.data.shared_patients
    shared = shared_patients(config) if split == "test" and rule != "keep" else SharedPatients((), 0)
    if not shared.names:
        return index
    if rule == "refuse" or len(shared.names) == shared.of:
        if len(shared.names) == shared.of:
            raise DataError(
                f"all test patients, {shared.of} with {len(index.patients)} test files or records, are also training patients by "
                "name",
                "part the patients, or correct what says whose records are, such as data.patient_pattern",
            )
        raise DataError(
            f"{len(shared.names)} of {shared.of} test patients are also training patients by name",
            "`mpc-fl check` names them; part the patients, or set data.shared_patients to leave_out or keep",
        )
    log.info("%d of %d test patients are also training patients by name: left out", len(shared.names), shared.of)
    names = set(shared.names)
    kept = [row for row, patient in enumerate(index.patients) if patient not in names]
    return index.only(kept)


def validates(patient: str, config: Config) -> bool:
    """Whether a training patient is kept aside to validate: as the name alone says, at every hospital and in every run."""
    return place_of(patient, "validation") < config.data.validation_fraction


def _for_part(patients: Sequence[str], part: Part, config: Config) -> list[str]:
    """Of a hospital's patients of one split those that train, or validate; all that test."""
    if part == "test":
        return list(patients)
    return [patient for patient in patients if validates(patient, config) == (part == "validation")]


def _split_of(part: Part) -> Split:
    return "test" if part == "test" else "train"


@dataclass(frozen=True)
class DividedRecords:
    """All records of the split that a part is of, and whose patients each hospital has, by rank."""

    config: Config
    part: Part
    index: Index
    patients: list[list[str]]


def divided_records(config: Config, part: Part) -> DividedRecords:
    """Find the records of a part's split and divide them. Raises as `load_hospital`, before pixels are read."""
    index = _index_of(config, _split_of(part))
    return DividedRecords(config, part, index, _patients_of_hospitals(index, config))


def _own_patients(divided: DividedRecords, rank: int) -> list[str]:
    index, config, part, subset = divided.index, divided.config, divided.part, divided.config.data.subset
    limit = subset.test_patients if part == "test" else subset.train_patients
    alone = is_one_hospitals(config)
    patients = _for_part(divided.patients[0 if alone else rank][:limit], part, config)
    if alone and not patients and part == "train":
        raise DataError(
            "there is no patient to train on here", "look at --data, data.classes and data.validation_fraction"
        )
    if not patients and not alone:
        fix = "use fewer hospitals, more data, or a larger data.partition.alpha"
        if config.data.validation_fraction and part != "test":
            fix = "use fewer hospitals, more data, or another data.validation_fraction"
        known = len(set(index.patients))
        raise DataError(
            f"{hospital_name(rank)} has no {part} patients; {len(index.patients)} files or records are divided, of {known} "
            f"patient{'' if known == 1 else 's'}",
            fix,
        )
    return patients


def load_hospital(config: Config, rank: int, part: Part) -> Dataset:
    """The patients of hospital `rank` that are for one part; only its own image files are read.

    Where the folder is its own (`site.data_of`) they are all in it, and there may be none to test or validate.

    (Of files the first bytes are looked at, to tell what they are, and of DICOM files that no table names the header, to tell
    whose they are.) An unreadable file is skipped and counted. Raises `DataError` for missing folders,
    an empty class, a hospital without patients, records of unknown patients, images of a wrong size, labels beyond the classes,
    or when more files of a class are unreadable than `data.most_unreadable` allows.
    """
    return load_own(divided_records(config, part), rank)


def load_own(divided: DividedRecords, rank: int) -> Dataset:
    """The same of records that were found and divided before: for a process that reads for several hospitals."""
    config, part, index = divided.config, divided.part, divided.index
    position = {key: number for number, key in enumerate(_own_patients(divided, rank))}
    rows = [row for row, patient in enumerate(index.patients) if patient in position]
    if index.arrays is not None:
        arrays = np.ascontiguousarray(index.arrays[rows], dtype=np.float32)
        inputs = torch.from_numpy(_with_shortcut(arrays, index, rows, rank, config))
        kept, read = rows, ReadImages([], [], index.treatments_of(rows), {})
    else:
        read = read_files([index.files[row] for row in rows], config)
        require_readable([int(index.labels[row]) for row in rows], read.unreadable, part, config)
        inputs = read.stacked() if rows else torch.zeros(0, config.data.channels, *[config.data.image_size] * 2)
        kept = [rows[position] for position in read.kept]
        _require_owners(index, kept)
        log.info("%s: %d images: %s", part, len(kept), "; ".join(f"{n} {what}" for what, n in read.treatments.items()))
    owners = _renumbered([position[index.patients[row]] for row in kept])
    labels = torch.from_numpy(index.labels[kept])
    names = tuple(index.names[row] for row in kept)
    # What lies in a folder that is divided belongs to no hospital.
    aside = index.left_aside if is_one_hospitals(config) else {}
    known = [index.attributes[row] for row in kept] if index.attributes else []
    groups = group_numbers(config.evaluation.groups, known, rank, len(kept)) if part == "test" else {}
    return Dataset(inputs, labels, owners, names, len(read.unreadable), read.treatments, aside, groups)


def _with_shortcut(arrays: np.ndarray, index: Index, rows: Sequence[int], rank: int, config: Config) -> np.ndarray:
    """The same records, of phantoms with what `data.phantoms.shortcut` puts into them at this hospital."""
    if config.data.phantoms.shortcut == ShortcutSection():
        return arrays
    patients, names = [index.patients[row] for row in rows], [index.names[row] for row in rows]
    return with_shortcut(arrays, index.labels[list(rows)], patients, names, rank, config)


def _require_owners(index: Index, rows: Sequence[int]) -> None:
    """Raise `DataError` where an image is read whose file could not be read when its patient was looked for."""
    changed = [row for row in rows if index.sources[row] == UNREADABLE]
    if changed:
        raise DataError(
            f"{index.files[changed[0]]} was changed while data were read", "run again when nobody writes there"
        )


def _renumbered(owners: list[int]) -> torch.Tensor:
    """Number patients from 0 without gaps, in order of appearance."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(owner, len(numbers)) for owner in owners], dtype=torch.int64)


def load_images(path: Path | None, config: Config, limit: int | None) -> Dataset:
    """Images to diagnose: a file, a folder of files, or a folder with one folder per class; labels -1 where unknown.

    With `limit` the images are taken evenly over the classes in sorted order. Phantoms and the embedded table need no
    path and give test records, one unless `limit` says more. Raises `DataError` like `load_hospital`; records of some
    classes only are no error here.
    """
    source = config.data.source
    if source not in SOURCES:
        records = read_with_loader(config, path, "test", labelled=False)
        return _dataset_of(index_from(records), limit)
    if path is None:
        if source not in ("phantoms", "breast_cancer"):
            raise DataError("no images were given", "pass --images FILE_OR_DIR")
        return _dataset_of(index_of(config, "test"), limit or 1)
    if source in ("csv", "npz"):
        config.data.require_agreed_columns()
        records = read_csv(path, config, None) if source == "csv" else read_medmnist(path, config, "test")
        return _dataset_of(index_from(records), limit)
    if source == "breast_cancer":
        raise DataError("breast_cancer takes no images", "leave out --images")
    labels, files = _find_images(path, config)
    chosen = _evenly(labels, limit)
    read = read_files([files[row] for row in chosen], config)
    images, rows = read.stacked(), [chosen[position] for position in read.kept]
    known, names = torch.tensor([labels[r] for r in rows]), tuple(files[r].name for r in rows)
    return Dataset(images, known, torch.arange(len(rows)), names, len(read.unreadable), read.treatments)


def _dataset_of(index: Index, limit: int | None) -> Dataset:
    assert index.arrays is not None
    rows = _evenly(index.labels.tolist(), limit)
    inputs = torch.from_numpy(np.ascontiguousarray(index.arrays[rows], dtype=np.float32))
    labels = torch.from_numpy(index.labels[rows])
    return Dataset(inputs, labels, torch.arange(len(rows)), tuple(index.names[row] for row in rows))


def _find_images(path: Path, config: Config) -> tuple[list[int], list[Path]]:
    if path.is_file():
        return [-1], [path]
    if not path.is_dir():
        raise DataError(f"image path {path} does not exist", "give a file or a folder with --images")
    direct = list(ImageFolder.of(path).files)
    if direct:
        return [-1] * len(direct), direct
    labels, files = list[int](), list[Path]()
    for label, name in enumerate(config.data.classes):
        inside = ImageFolder.of(path / name).files if (path / name).is_dir() else ()
        labels += [label] * len(inside)
        files += inside
    if not files:
        raise DataError(
            f"{path} holds no file of the kinds {', '.join(IMAGE_KINDS)}", "give a file or a folder with --images"
        )
    return labels, files


def _evenly(labels: Sequence[int], limit: int | None) -> list[int]:
    """Row numbers: all, or `limit` of them taken from each label in turn."""
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    queues = [[row for row, value in enumerate(labels) if value == label] for label in sorted(set(labels))]
    turn = [row for rank in range(max(map(len, queues))) for queue in queues for row in queue[rank : rank + 1]]
    return sorted(turn[:limit])


def records_per_hospital(config: Config, part: Part) -> tuple[Index, list[list[int]]]:
    """All records of a part's split, and which of them, by number, each hospital will read. Raises as `load_hospital`."""
    divided, parts, rows = divided_records(config, part), list[list[int]](), dict[str, list[int]]()
    for row, patient in enumerate(divided.index.patients):
        rows.setdefault(patient, []).append(row)
    for rank in range(1 if is_one_hospitals(config) else config.federation.hospitals):
        own = dict.fromkeys(_own_patients(divided, rank))
        parts.append(sorted(row for patient in own for row in rows[patient]))
    return divided.index, parts


def patients_per_hospital(config: Config) -> list[int]:
    """Training patients of every hospital whose records are here, after checking all parts and that one file per class can be read.

    Raises what `load_hospital` would raise for the same reasons, before any process starts; `survey` reads every file.
    """
    counts: list[int] = []
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        index, parts = records_per_hospital(config, split)
        if split == "train":
            # Of some patients all that is here may prove unreadable: who reads every file knows (`survey`, `load_hospital`).
            nobody = {row for row, source in enumerate(index.sources) if source == UNREADABLE}
            counts = [len({index.patients[row] for row in rows if row not in nobody}) for rows in parts]
            if config.data.validation_fraction:
                records_per_hospital(config, "validation")
        if index.files:
            here = set(index.labels.tolist()) if is_one_hospitals(config) else range(len(config.data.classes))
            for label in here:
                require_one_readable([index.files[row] for row in np.flatnonzero(index.labels == label)], label, config)
    return counts
