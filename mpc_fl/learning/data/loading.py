"""What one hospital owns: find records, divide patients over hospitals, read only this hospital's own files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.image_files import UnreadableImageError, is_image_file, read_image
from mpc_fl.learning.data.partition import partition_dirichlet, partition_equal, patient_of, place_of
from mpc_fl.learning.data.phantoms import make_phantoms, phantom_labels
from mpc_fl.learning.data.tables import Part, Records, Split, read_breast_cancer, read_csv, read_medmnist
from mpc_fl.roles import hospital_name

log = logging.getLogger(__name__)

_LARGEST_OVER_SMALLEST = 4  # where privacy.largest_hospital is not set
_NAMED = 5  # patients that a message names


@dataclass(frozen=True)
class _Index:
    """All records of a split before pixels are read: label, patient key and name of each, and where to read it."""

    labels: np.ndarray
    patients: list[str]
    names: list[str]
    files: list[Path] = field(default_factory=list)
    arrays: np.ndarray | None = None


def _data_path(config: Config) -> Path:
    if config.site.data is None:
        raise DataError(f"data.source '{config.data.source}' needs a path", "pass --data")
    return config.site.data


def _class_folders(root: Path, config: Config) -> list[tuple[int, Path]]:
    try:
        exists = root.is_dir()
    except OSError as error:
        raise DataError(f"cannot look into {root.parent}: {error.strerror}", "check its permissions") from None
    if not exists:
        raise DataError(f"data folder {root} does not exist", "give DIR/{train,test}/<class>/ with --data DIR")
    # Hidden folders are left by notebooks and file servers; they are no classes.
    found = [entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")]
    unknown = [name for name in found if name not in config.data.classes]
    if unknown:
        raise DataError(
            f"wrong number of classes: {root} has a folder '{unknown[0]}', {len(config.data.classes)} classes are configured",
            "set data.classes to all folder names",
        )
    folders = []
    for label, name in enumerate(config.data.classes):
        if name not in found:
            raise DataError(f"class folder {root / name} does not exist", "create it or correct data.classes")
        folders.append((label, root / name))
    return folders


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror or 'no access'}", "check its permissions") from None


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if is_image_file(path)]


def _index(config: Config, split: Split) -> _Index:
    source = config.data.source
    if source == "phantoms":
        sizes = config.data.phantoms
        count = sizes.train_patients if split == "train" else sizes.test_patients
        phantoms = make_phantoms(count, len(config.data.classes), config.data.image_size, config.seed, split)
        names = [f"synthetic-phantom-{split}-{row}" for row in range(len(phantoms.labels))]
        inputs = np.repeat(phantoms.images[:, None], config.data.channels, axis=1)
        return _Index(phantoms.labels, _phantom_names(phantoms.patients.tolist(), split), names, arrays=inputs)
    if source == "images":
        labels, files = [], []
        for label, folder in _class_folders(_data_path(config) / split, config):
            inside = _image_files(folder)
            if not inside:
                raise DataError(
                    f"class folder {folder} has no images", "add PNG, JPEG or DICOM files or drop the class"
                )
            labels += [label] * len(inside)
            files += inside
        names = [path.name for path in files]
        return _Index(np.array(labels, dtype=np.int64), [patient_of(name) for name in names], names, files)
    return _from_records(_read_records(config, split), config)


def _read_records(config: Config, split: Split) -> Records:
    if config.data.source == "breast_cancer":
        return read_breast_cancer(config, split)
    if config.data.source == "csv":
        return read_csv(_data_path(config), config, split)
    return read_medmnist(_data_path(config), config, split)


def _from_records(records: Records, config: Config) -> _Index:
    missing = sorted(set(range(len(config.data.classes))) - set(records.labels.tolist()))
    if missing:
        raise DataError(f"class '{config.data.classes[missing[0]]}' has no records", "correct data.classes or the data")
    return _Index(records.labels, records.patients, records.names, arrays=records.inputs)


def _patients_of_hospitals(index: _Index, config: Config) -> list[list[str]]:
    """Patient keys of every hospital, after partition and subset. Raises `DataError` for a hospital without patients."""
    first_label: dict[str, int] = {}
    for patient, label in zip(index.patients, index.labels.tolist(), strict=True):
        first_label.setdefault(patient, label)
    keys = list(first_label)
    parts = _divided(keys, np.array([first_label[key] for key in keys]), config)
    return [[keys[i] for i in part] for part in parts]


def _divided(patients: Sequence[str], labels: np.ndarray, config: Config) -> list[np.ndarray]:
    """Numbers of each hospital's patients, from their names and classes, int (patients,)."""
    hospitals, method = config.federation.hospitals, config.data.partition.method
    if method == "none":
        (whole,) = partition_equal(patients, labels, 1, config.seed)
        return [whole] * hospitals
    if method == "equal":
        return partition_equal(patients, labels, hospitals, config.seed)
    return partition_dirichlet(patients, labels, hospitals, config.data.partition.alpha, config.seed)


def _phantom_names(patients: Sequence[int], split: Split) -> list[str]:
    # No phantom of one split is one of another, and so are their names.
    return [f"{split}-{patient}" for patient in patients]


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
        names, limit = _phantom_names(range(len(labels)), "train"), config.data.subset.train_patients
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

    Tables are divided by patient, archives and phantoms number the records of each split anew: none is shared there.
    Raises `DataError` like `load_hospital`.
    """
    if config.data.source != "images":
        return SharedPatients((), 0)
    index, limit = _index(config, "train"), config.data.subset.train_patients
    training = {patient for part in _patients_of_hospitals(index, config) for patient in part[:limit]}
    testing = dict.fromkeys(_index(config, "test").patients)
    return SharedPatients(tuple(sorted(name for name in testing if name in training)), len(testing))


def _index_of(config: Config, split: Split) -> _Index:
    """The records of a split; tests are made without those that train, unless `data.shared_patients` says otherwise."""
    index, rule = _index(config, split), config.data.shared_patients
    shared = shared_patients(config) if split == "test" and rule != "keep" else SharedPatients((), 0)
    if not shared.names:
        return index
    if rule == "refuse" or len(shared.names) == shared.of:
        raise DataError(
            f"{len(shared.names)} of {shared.of} test patients are also training patients by name",
            "`mpc-fl check` names them; part the patients, or set data.shared_patients to leave_out or keep",
        )
    log.info("%d of %d test patients are also training patients by name: left out", len(shared.names), shared.of)
    names = set(shared.names)
    kept = [row for row, patient in enumerate(index.patients) if patient not in names]
    return _Index(
        index.labels[kept],
        [index.patients[row] for row in kept],
        [index.names[row] for row in kept],
        [index.files[row] for row in kept],
    )


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


def _own_patients(index: _Index, config: Config, rank: int, part: Part) -> list[str]:
    subset = config.data.subset
    limit = subset.test_patients if part == "test" else subset.train_patients
    patients = _for_part(_patients_of_hospitals(index, config)[rank][:limit], part, config)
    if not patients:
        fix = "use fewer hospitals, more data, or a larger data.partition.alpha"
        if config.data.validation_fraction and part != "test":
            fix = "use fewer hospitals, more data, or another data.validation_fraction"
        raise DataError(f"{hospital_name(rank)} has no {part} patients", fix)
    return patients


def load_hospital(config: Config, rank: int, part: Part) -> Dataset:
    """The patients of hospital `rank` that are for one part; only its own image files are read.

    (Of files without a suffix the first bytes are looked at, to tell whether they are DICOM.)
    An unreadable file is skipped and counted. Raises `DataError` for missing folders, an empty class, a hospital without
    patients, images of a wrong size, labels beyond the classes, or when every file is unreadable.
    """
    index = _index_of(config, _split_of(part))
    position = {key: number for number, key in enumerate(_own_patients(index, config, rank, part))}
    rows = [row for row, patient in enumerate(index.patients) if patient in position]
    if index.arrays is not None:
        inputs = torch.from_numpy(np.ascontiguousarray(index.arrays[rows], dtype=np.float32))
        kept, skipped = rows, 0
    else:
        inputs, kept_positions, skipped = _read_files([index.files[row] for row in rows], config)
        kept = [rows[position] for position in kept_positions]
    owners = _renumbered([position[index.patients[row]] for row in kept])
    labels = torch.from_numpy(index.labels[kept])
    return Dataset(inputs, labels, owners, tuple(index.names[row] for row in kept), skipped)


def _renumbered(owners: list[int]) -> torch.Tensor:
    """Number patients from 0 without gaps, in order of appearance."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(owner, len(numbers)) for owner in owners], dtype=torch.int64)


def _read_files(files: Sequence[Path], config: Config) -> tuple[torch.Tensor, list[int], int]:
    """Images of the readable files, their positions, and how many were skipped."""
    images, kept = [], []
    first: UnreadableImageError | None = None
    for position, path in enumerate(files):
        try:
            images.append(read_image(path, config.data.channels, config.data.image_size, config.data.wrong_size))
            kept.append(position)
        except UnreadableImageError as error:
            first = first or error
            log.warning("skipped: %s", error.what)
    if not images:
        reason = first.what if first is not None else "there are no files"
        raise DataError(f"no image can be read; the first: {reason}", "check the data folder")
    return torch.stack(images), kept, len(files) - len(kept)


def load_images(path: Path | None, config: Config, limit: int | None) -> Dataset:
    """Images to diagnose: a file, a folder of files, or a folder with one folder per class; labels -1 where unknown.

    With `limit` the images are taken evenly over the classes in sorted order. Phantoms and the embedded table need no
    path and give test records, one unless `limit` says more. Raises `DataError` like `load_hospital`; records of some
    classes only are no error here.
    """
    source = config.data.source
    if path is None:
        if source not in ("phantoms", "breast_cancer"):
            raise DataError("no images were given", "pass --images FILE_OR_DIR")
        return _dataset_of(_index(config, "test"), limit or 1)
    if source in ("csv", "npz"):
        records = read_csv(path, config, None) if source == "csv" else read_medmnist(path, config, "test")
        return _dataset_of(_Index(records.labels, records.patients, records.names, arrays=records.inputs), limit)
    if source == "breast_cancer":
        raise DataError("breast_cancer takes no images", "leave out --images")
    labels, files = _find_images(path, config)
    chosen = _evenly(labels, limit)
    images, kept, skipped = _read_files([files[row] for row in chosen], config)
    rows = [chosen[position] for position in kept]
    own_patient = torch.arange(len(rows))
    return Dataset(
        images, torch.tensor([labels[r] for r in rows]), own_patient, tuple(files[r].name for r in rows), skipped
    )


def _dataset_of(index: _Index, limit: int | None) -> Dataset:
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
    direct = _image_files(path)
    if direct:
        return [-1] * len(direct), direct
    labels, files = [], []
    for label, name in enumerate(config.data.classes):
        inside = _image_files(path / name) if (path / name).is_dir() else []
        labels += [label] * len(inside)
        files += inside
    if not files:
        raise DataError(f"{path} holds no PNG, JPEG or DICOM file", "give a file or a folder with --images")
    return labels, files


def _evenly(labels: Sequence[int], limit: int | None) -> list[int]:
    """Row numbers: all, or `limit` of them taken from each label in turn."""
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    queues = [[row for row, value in enumerate(labels) if value == label] for label in sorted(set(labels))]
    turn = [row for rank in range(max(map(len, queues))) for queue in queues for row in queue[rank : rank + 1]]
    return sorted(turn[:limit])


def patients_per_hospital(config: Config) -> list[int]:
    """Training patients of every hospital, after checking all parts and that one file per class can be read.

    Raises what `load_hospital` would raise for the same reasons, before any process starts.
    """
    counts: list[int] = []
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        index = _index_of(config, split)
        for rank in range(config.federation.hospitals):
            own = _own_patients(index, config, rank, split)
            if split == "train":
                counts.append(len(own))
                if config.data.validation_fraction:
                    _own_patients(index, config, rank, "validation")
        if index.files:
            for label in range(len(config.data.classes)):
                _read_first(index, label, config)
    return counts


def _read_first(index: _Index, label: int, config: Config) -> None:
    first: UnreadableImageError | None = None
    for row in np.flatnonzero(index.labels == label):
        try:
            read_image(index.files[row], config.data.channels, config.data.image_size, config.data.wrong_size)
            return
        except UnreadableImageError as error:
            first = first or error
    name = config.data.classes[label]
    if first is None:
        raise DataError(
            f"no test patient of class '{name}' is left without those that also train",
            "add patients, or set data.shared_patients to keep",
        )
    raise DataError(f"no image of class '{name}' can be read; the first: {first.what}", first.fix)
