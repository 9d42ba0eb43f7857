"""All records of a split, found before pixels are read: where each lies, its class, and whose it is.

Where a folder is that of one hospital alone (`site.data_of`), it may lack classes, and test patients; classes are what the
configuration says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mpc_fl.config.config import Config
from mpc_fl.config.data import SOURCES
from mpc_fl.errors import DataError
from mpc_fl.learning.data.attributes import Attributes, phantom_attributes
from mpc_fl.learning.data.file_kinds import IMAGE_KINDS
from mpc_fl.learning.data.image_folders import ImageFolder, class_folders
from mpc_fl.learning.data.loaders import read_with_loader
from mpc_fl.learning.data.patients import attributes_of_files, owners_in_archive, owners_of, require_known
from mpc_fl.learning.data.phantoms import make_phantoms
from mpc_fl.learning.data.tables import Records, Split, read_breast_cancer, read_csv, read_medmnist

log = logging.getLogger(__name__)

_EMBEDDED = ("phantoms", "breast_cancer")  # the same everywhere, so divided everywhere


def is_one_hospitals(config: Config) -> bool:
    """Whether the data here are those of one hospital alone, and not divided over all."""
    return config.site.data_of == "hospital" and config.data.source not in _EMBEDDED


@dataclass(frozen=True)
class Index:
    """All records of a split before pixels are read: label, patient key and name of each, and where to read it.

    `sources` says where each image has its patient from, `left_aside` what else lies in the folders or which rows of a table are
    none, `treatments` what was done to each row of a table, `attributes` what is known of each record where groups are formed.
    """

    labels: np.ndarray
    patients: list[str]
    names: list[str]
    files: list[Path] = field(default_factory=list)
    arrays: np.ndarray | None = None
    sources: list[str] = field(default_factory=list)
    left_aside: Mapping[str, int] = field(default_factory=dict)
    treatments: list[tuple[str, ...]] = field(default_factory=list)
    attributes: list[Attributes] = field(default_factory=list)

    def only(self, rows: Sequence[int]) -> Index:
        """Some of the records."""
        return replace(
            self,
            labels=self.labels[list(rows)],
            patients=[self.patients[row] for row in rows],
            names=[self.names[row] for row in rows],
            files=[self.files[row] for row in rows] if self.files else [],
            sources=[self.sources[row] for row in rows] if self.sources else [],
            arrays=None if self.arrays is None else self.arrays[list(rows)],
            treatments=[self.treatments[row] for row in rows] if self.treatments else [],
            attributes=[self.attributes[row] for row in rows] if self.attributes else [],
        )

    def treatments_of(self, rows: Iterable[int]) -> Counter[str]:
        """To how many of some rows of a table was done what."""
        return Counter(what for row in rows if self.treatments for what in self.treatments[row])


def _data_path(config: Config) -> Path:
    if config.site.data is None:
        raise DataError(f"data.source '{config.data.source}' needs a path", "pass --data")
    return config.site.data


def index_of(config: Config, split: Split) -> Index:
    """All records of a split. Raises `DataError` for what `loading.load_hospital` says, before pixels are read."""
    source = config.data.source
    if source == "phantoms":
        sizes = config.data.phantoms
        count = sizes.train_patients if split == "train" else sizes.test_patients
        phantoms = make_phantoms(count, len(config.data.classes), config.data.image_size, config.seed, split)
        names = [f"synthetic-phantom-{split}-{row}" for row in range(len(phantoms.labels))]
        inputs = np.repeat(phantoms.images[:, None], config.data.channels, axis=1)
        owners, groups = phantoms.patients.tolist(), config.evaluation.groups
        attributes = phantom_attributes(groups, owners, config.seed, split) if groups.recorded else []
        return Index(phantoms.labels, phantom_names(owners, split), names, arrays=inputs, attributes=attributes)
    if source == "images":
        return _index_of_images(config, split)
    return _from_records(_read_records(config, split), config)


def _index_of_images(config: Config, split: Split) -> Index:
    labels, files, left_aside = list[int](), list[Path](), Counter[str]()
    alone = is_one_hospitals(config)
    for label, folder in enumerate(class_folders(_data_path(config) / split, config.data.classes, alone)):
        found = ImageFolder(()) if alone and not folder.is_dir() else ImageFolder.of(folder)
        if not found.files and (found.left_aside or not alone):
            aside = ", ".join(f"{count} {what}" for what, count in sorted(found.left_aside.items()))
            raise DataError(
                f"class folder {folder} has no images" + (f" ({aside})" if aside else ""),
                f"add files of the kinds {', '.join(IMAGE_KINDS)}, or drop the class",
            )
        labels += [label] * len(found.files)
        files += found.files
        left_aside += found.left_aside
    owners = owners_of(files, config)
    names = [path.name for path in files]
    attributes = attributes_of_files(files, config) if config.evaluation.groups.recorded else []
    index = Index(np.array(labels, dtype=np.int64), owners.keys, names, files, attributes=attributes)
    return replace(index, sources=owners.sources, left_aside=left_aside)


def _read_records(config: Config, split: Split) -> Records:
    if config.data.source == "breast_cancer":
        return read_breast_cancer(config, split)
    if config.data.source == "csv":
        records = read_csv(_data_path(config), config, split)
        if config.data.table.patient_column is None:
            require_known(len(records.labels), config)
        return records
    if config.data.source not in SOURCES:
        return read_with_loader(config, config.site.data, split)
    records = read_medmnist(_data_path(config), config, split)
    patients = owners_in_archive(_data_path(config), split, len(records.labels))
    if patients is None:
        require_known(len(records.labels), config)
        return records
    return replace(records, patients=patients)


def _from_records(records: Records, config: Config) -> Index:
    missing = sorted(set(range(len(config.data.classes))) - set(records.labels.tolist()))
    if missing and not is_one_hospitals(config):
        raise DataError(f"class '{config.data.classes[missing[0]]}' has no records", "correct data.classes or the data")
    return index_from(records)


def index_from(records: Records) -> Index:
    """The index of records that were read."""
    index = Index(records.labels, records.patients, records.names, arrays=records.inputs)
    return replace(index, left_aside=records.left_aside, treatments=records.treatments, attributes=records.attributes)


def phantom_names(patients: Sequence[int], split: Split) -> list[str]:
    """Names of phantom patients, which differ between splits as the phantoms do."""
    return [f"{split}-{patient}" for patient in patients]
