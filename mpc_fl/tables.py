"""Tabular and array sources: CSV, scikit-learn's breast-cancer set, MedMNIST archives."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mpc_fl.config import Config
from mpc_fl.errors import DataError
from mpc_fl.partition import generator

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Records:
    """All records of one split: inputs (records, ...) float32, int64 labels, patient key and name of each record."""

    inputs: np.ndarray
    labels: np.ndarray
    patients: list[str]
    names: list[str]


def squash(features: np.ndarray) -> np.ndarray:
    """Bring features of any scale to a moderate range by the fixed map sign(x) log(1 + |x|).

    It depends on no data, so it tells nothing about any hospital (a mean or range per site would).
    """
    return (np.sign(features) * np.log1p(np.abs(features))).astype(np.float32)


def _split(patients: list[str], config: Config, split: Split) -> np.ndarray:
    """Rows of the split, divided by patient."""
    unique = sorted(set(patients))
    order = generator(config.seed, 3).permutation(len(unique))
    held_out = {unique[i] for i in order[: max(1, round(len(unique) * config.data.table.test_fraction))]}
    return np.array(
        [row for row, patient in enumerate(patients) if (patient in held_out) == (split == "test")], dtype=int
    )


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
    patients = [str(row) for row in range(len(data.target))]
    names = [f"breast-cancer-{row}" for row in patients]
    everything = Records(squash(data.data), data.target.astype(np.int64), patients, names)
    return _chosen(everything, _split(patients, config, split))


def read_csv(path: Path, config: Config, split: Split | None) -> Records:
    """A CSV file with a header; `split` None takes all rows. Features are all columns but label and patient.

    Labels are class names or their numbers. Raises `DataError` naming row and column of the first bad cell.
    """
    table = config.data.table
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(f"cannot read {path}", "give a UTF-8 CSV file with a header line") from None
    if not rows:
        raise DataError(f"{path} has no rows", "give a CSV file with a header line and data")
    header = [name for name in rows[0] if name is not None]
    for column in (table.label_column, table.patient_column):
        if column is not None and column not in header:
            raise DataError(f"{path} has no column '{column}'", "set data.table.label_column and patient_column")
    features = [name for name in header if name not in (table.label_column, table.patient_column)]
    if len(features) != table.features:
        raise DataError(f"{path} has {len(features)} feature columns, not {table.features}", "set data.table.features")
    values = np.empty((len(rows), len(features)))
    labels, patients = [], []
    for number, row in enumerate(rows, start=2):
        for index, name in enumerate(features):
            values[number - 2, index] = _number(row.get(name), path, number, name)
        labels.append(_label(row.get(table.label_column), config, path, number))
        patients.append(str(row[table.patient_column]) if table.patient_column else str(number))
    names = [f"{path.name} line {number}" for number in range(2, len(rows) + 2)]
    everything = Records(squash(values), np.array(labels, dtype=np.int64), patients, names)
    return everything if split is None else _chosen(everything, _split(patients, config, split))


def _number(cell: str | None, path: Path, line: int, column: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"{path} line {line}: column '{column}' holds no number", "fill or remove the row")
    return value


def _label(cell: str | None, config: Config, path: Path, line: int) -> int:
    text, classes = (cell or "").strip(), config.data.classes
    if text in classes:
        return classes.index(text)
    if text.isdigit() and int(text) < len(classes):
        return int(text)
    raise DataError(
        f"wrong number of classes: {path} line {line} has a label outside of the {len(classes)} configured",
        "set data.classes to all class names",
    )


def read_medmnist(path: Path, config: Config, split: Split) -> Records:
    """A MedMNIST archive: `<split>_images` uint8 (n, h, w) or (n, h, w, 3), `<split>_labels`. One record, one patient.

    Raises `DataError` for a file that is none, for images of another size, for labels beyond the classes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", "pass --data FILE.npz") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        raise DataError(f"{path} is no MedMNIST archive", f"it must hold {split}_images and {split}_labels") from None
    size = config.data.image_size
    if images.ndim not in (3, 4) or images.shape[1:3] != (size, size) or images.dtype != np.uint8:
        raise DataError(f"the images in {path} have shape {images.shape[1:]}, expected {size}x{size} uint8",
                        "set data.image_size")  # fmt: skip
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] != 1 or len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"the labels in {path} are not one class per image", "use a single-label data set")
    labels = labels[:, 0].astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(config.data.classes):
        raise DataError(
            f"wrong number of classes: {path} has labels up to {labels.max()}, {len(config.data.classes)} are configured",
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
