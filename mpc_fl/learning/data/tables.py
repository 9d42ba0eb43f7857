"""Tabular and array sources: CSV, scikit-learn's breast-cancer set, MedMNIST archives."""

from __future__ import annotations

import csv
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.partition import place_of

Split = Literal["train", "test"]  # what sources have
Part = Literal["train", "validation", "test"]  # what a hospital's patients are for


@dataclass(frozen=True)
class Records:
    """All records of one split: inputs (records, ...) float32, int64 labels, patient key and name of each record."""

    inputs: np.ndarray
    labels: np.ndarray
    patients: list[str]
    names: list[str]


def scale_features(features: np.ndarray, config: Config) -> np.ndarray:
    """Bring float features (records, features) to a moderate range without looking at any patient; float32.

    With public `data.table.reference_ranges` each feature x becomes 4 sqrt((x - low) / (high - low)) - 2, clipped to
    [-2, 2]; the root because laboratory values are skewed. Without, the fixed map sign(x) log(1 + |x|). A mean or range
    measured at a site would tell something about its patients. Raises `DataError` for a wrong number of ranges.
    """
    ranges = config.data.table.reference_ranges
    if ranges is None:
        return (np.sign(features) * np.log1p(np.abs(features))).astype(np.float32)
    if len(ranges) != features.shape[1]:
        raise DataError(
            f"{len(ranges)} reference ranges are configured for {features.shape[1]} features",
            "give data.table.reference_ranges one pair per feature column",
        )
    low, high = np.array(ranges).T
    return (4.0 * np.sqrt(np.clip((features - low) / (high - low), 0.0, 1.0)) - 2.0).astype(np.float32)


def _split(patients: list[str], config: Config, split: Split) -> np.ndarray:
    """Rows of the split, divided by patient: one whose place lies below `data.table.test_fraction` tests. Raises `DataError`."""
    fraction = config.data.table.test_fraction
    tests = {patient: place_of(patient, "held out", config.seed) < fraction for patient in set(patients)}
    rows = [row for row, patient in enumerate(patients) if tests[patient] == (split == "test")]
    if not rows and not (split == "test" and config.site.data_of == "hospital"):
        side = "below" if split == "test" else "above"
        raise DataError(
            f"no {split} patient: of {len(tests)} patients none falls {side} data.table.test_fraction={fraction:g}",
            "use more patients, or another fraction",
        )
    return np.array(rows, dtype=int)


def _chosen(records: Records, rows: np.ndarray) -> Records:
    return Records(
        records.inputs[rows],
        records.labels[rows],
        [records.patients[i] for i in rows],
        [records.names[i] for i in rows],
    )


def read_breast_cancer(config: Config, split: Split) -> Records:
    """The Wisconsin diagnostic set within scikit-learn: 569 real patients, 30 features. Raises `DataError`."""
    from sklearn.datasets import load_breast_cancer

    if len(config.data.classes) != 2:
        raise DataError(
            f"wrong number of classes: breast_cancer has 2, {len(config.data.classes)} are configured",
            "set data.classes=[malignant, benign]",
        )
    data = load_breast_cancer()
    known = [str(name) for name in data.target_names]
    if set(config.data.classes) != set(known):
        raise DataError(f"breast_cancer has the classes {known[0]} and {known[1]}, others are configured",
                        "set data.classes=[malignant, benign]")  # fmt: skip
    own_number = np.array([config.data.classes.index(name) for name in known], dtype=np.int64)
    patients = [str(row) for row in range(len(data.target))]
    names = [f"breast-cancer-{row}" for row in patients]
    everything = Records(scale_features(data.data, config), own_number[data.target], patients, names)
    return _chosen(everything, _split(patients, config, split))


def read_csv(path: Path, config: Config, split: Split | None) -> Records:
    """A CSV file with a header; `split` None takes all rows. Features are all columns but label and patient.

    Labels are class names or their numbers; with `split` None the label column may be absent, then they are -1.
    Raises `DataError` naming row and column of the first bad cell.
    """
    table = config.data.table
    header, rows = _read_rows(path)
    labelled = split is not None or table.label_column in header
    for column in (table.label_column if labelled else None, table.patient_column):
        if column is not None and column not in header:
            raise DataError(f"{path} has no column '{column}'", "set data.table.label_column and patient_column")
    features = [name for name in header if name not in (table.label_column, table.patient_column)]
    if len(features) != table.features:
        raise DataError(f"{path} has {len(features)} feature columns, not {table.features}", "set data.table.features")
    values = np.empty((len(rows), len(features)))
    labels, patients = [], []
    for position, (line, row) in enumerate(rows):
        values[position] = [_number(row[name], path, line, name) for name in features]
        labels.append(_label(row[table.label_column], config, path, line) if labelled else -1)
        patients.append(_patient(row[table.patient_column], path, line) if table.patient_column else str(line))
    names = [f"{path.name} line {line}" for line, _ in rows]
    everything = Records(scale_features(values, config), np.array(labels, dtype=np.int64), patients, names)
    return everything if split is None else _chosen(everything, _split(patients, config, split))


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names, and line number and cells of each row. Raises `DataError` for a malformed table."""
    try:
        # Spreadsheets begin UTF-8 files with a byte-order mark; it is no part of the first name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(f"cannot read {path}", "give a UTF-8 CSV file with a header line") from None
    if len(lines) < 2:
        raise DataError(f"{path} has no rows", "give a CSV file with a header line and data")
    header = [name.strip() for name in lines[0][1]]
    if len(set(header)) != len(header):
        raise DataError(f"{path} has two columns of the same name", "rename or remove one")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(f"{path} line {line} has {len(cells)} cells, the header {len(header)}", "correct the row")
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in lines[1:]]


def _patient(cell: str, path: Path, line: int) -> str:
    # Empty keys would make one patient of all rows without a patient.
    if not cell.strip():
        raise DataError(f"{path} line {line}: the patient column is empty", "fill or remove the row")
    return cell.strip()


def _number(cell: str, path: Path, line: int, column: str) -> float:
    try:
        value = float(cell) if "_" not in cell else float("nan")  # Python would read 1_0 as 10
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"{path} line {line}: column '{column}' holds no number", "fill or remove the row")
    return value


def _label(cell: str, config: Config, path: Path, line: int) -> int:
    text, classes = cell.strip(), config.data.classes
    if text in classes:
        return classes.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    raise DataError(
        f"wrong number of classes: {path} line {line} has a label outside of the {len(classes)} configured",
        "set data.classes to all class names",
    )


def read_medmnist(path: Path, config: Config, split: Split) -> Records:
    """A MedMNIST archive: `<split>_images` uint8 (n, h, w) or (n, h, w, 3), `<split>_labels`. One record, one patient.

    Raises `DataError` for a file that is none, for images of another size, for labels beyond the classes.
    """
    images, labels = _read_arrays(path, split)
    size = config.data.image_size
    # A last axis other than 3 is a volume (MedMNIST3D) or has alpha, not colours.
    if images.shape[1:] not in ((size, size), (size, size, 3)) or images.dtype != np.uint8:
        raise DataError(f"the images in {path} have shape {images.shape[1:]}, expected {size}x{size} uint8",
                        "set data.image_size")  # fmt: skip
    if not len(images):
        raise DataError(f"{path} holds no {split} images", "give another archive")
    if labels.shape not in ((len(images),), (len(images), 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"the labels in {path} are not one class per image", "use a single-label data set")
    labels = labels.reshape(len(images), 1)
    labels = labels[:, 0].astype(np.int64)
    if not 0 <= labels.min() <= labels.max() < len(config.data.classes):
        raise DataError(
            f"wrong number of classes: {path} has labels from {labels.min()} to {labels.max()}, "
            f"{len(config.data.classes)} are configured",
            "set data.classes to all class names",
        )
    colour = images.ndim == 4
    pixels = images.astype(np.float32) / 255.0
    pixels = pixels.transpose(0, 3, 1, 2) if colour else pixels[:, None]
    if config.data.channels == 1 and colour:
        pixels = pixels.mean(axis=1, keepdims=True)
    if config.data.channels == 3 and not colour:
        pixels = np.repeat(pixels, 3, axis=1)
    names = [f"{path.stem}-{split}-{index}" for index in range(len(labels))]
    return Records(pixels, labels, names, names)


def _read_arrays(path: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a split. Pickled objects are refused: loading them could run code."""
    try:
        # A context manager of its own: for a file that is no archive np.load gives an array, not something to close.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", "give a MedMNIST .npz file") from None
    except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError, AttributeError,
            zipfile.BadZipFile, zlib.error, struct.error):  # fmt: skip
        images = labels = None
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray) or not images.ndim:
        raise DataError(f"{path} is no MedMNIST archive", f"it must hold {split}_images and {split}_labels")
    return images, labels
