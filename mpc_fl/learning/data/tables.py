"""Tabular and array sources: CSV, scikit-learn's breast-cancer set, MedMNIST archives."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mpc_fl.config.columns import plain_name
from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.attributes import Attributes
from mpc_fl.learning.data.partition import place_of
from mpc_fl.learning.data.spellings import in_one_spelling
from mpc_fl.learning.data.table_columns import (
    EncodedRows,
    decimal_mark,
    encode_rows,
    in_range,
    number_of,
    on_log_scale,
    place_of_column,
    places_of_columns,
    require_no_identifier,
)
from mpc_fl.learning.data.table_files import TableFile, read_table_file

Split = Literal["train", "test"]  # what sources have
Part = Literal["train", "validation", "test"]  # what a hospital's patients are for
_WHOLE = re.compile(r"(?P<number>-?[0-9]+)(?:\.0*|,0{1,2})?")
_BEFORE_UNIT = re.compile(r"[\[(]")  # age [years]
_TRUTH = {"true": "1", "false": "0"}  # as pandas writes 1 and 0


@dataclass(frozen=True)
class Records:
    """All records of one split: inputs (records, ...) float32, int64 labels, patient key and name of each record.

    `treatments` says what was done to each, `left_aside` how many rows of a table make no record, and why; of tables alone.
    `attributes` has what is known of each record where groups are formed.
    """

    inputs: np.ndarray
    labels: np.ndarray
    patients: list[str]
    names: list[str]
    treatments: list[tuple[str, ...]] = field(default_factory=list)
    left_aside: Mapping[str, int] = field(default_factory=dict)
    attributes: list[Attributes] = field(default_factory=list)


def scale_features(features: np.ndarray, config: Config) -> np.ndarray:
    """Bring float features (records, features) to a moderate range without looking at any patient; float32.

    With public `data.table.reference_ranges` each feature x becomes 4 sqrt((x - low) / (high - low)) - 2, clipped to
    [-2, 2]; the root because laboratory values are skewed. Without, the fixed map sign(x) log(1 + |x|). A mean or range
    measured at a site would tell something about its patients. Raises `DataError` for a wrong number of ranges.
    """
    ranges = config.data.table.reference_ranges
    if ranges is None:
        return on_log_scale(features).astype(np.float32)
    if len(ranges) != features.shape[1]:
        raise DataError(
            f"{len(ranges)} reference ranges are configured for {features.shape[1]} features",
            "give data.table.reference_ranges one pair per feature column",
        )
    low, high = np.array(ranges).T
    return in_range(features, low, high).astype(np.float32)


def _tests(patient: str, config: Config) -> bool:
    # A hospital's patients who train in one run do not test in another, where exact counts of them would be opened.
    seed = 0 if config.site.data_of == "hospital" else config.seed
    return place_of(patient, "held out", seed) < config.data.table.test_fraction


def _split(patients: list[str], config: Config, split: Split) -> np.ndarray:
    """Rows of the split, divided by patient: one whose place lies below `data.table.test_fraction` tests. Raises `DataError`."""
    fraction = config.data.table.test_fraction
    tests = {patient: _tests(patient, config) for patient in set(patients)}
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
        [records.treatments[i] for i in rows] if records.treatments else [],
        records.left_aside,
        [records.attributes[i] for i in rows] if records.attributes else [],
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
    """A CSV file with a header; `split` None takes all rows. Features are as `data.table` says.

    Delimiter, encoding and decimal mark are found (`table_files`, `table_columns`). Labels are class names or their numbers; with
    `split` None the label column may be absent, then they are -1. Raises `DataError` naming row and column of the first bad cell.
    """
    table = config.data.table
    features, grouped = {plain_name(column.name) for column in table.columns or ()}, config.evaluation.groups.recorded
    own = [
        table.label_column,
        *([table.patient_column] if table.patient_column is not None else []),
        *table.identifiers,
        *(name for name in grouped if name not in features),  # to form groups alone
    ]
    file = read_table_file(path, [*own, *(column.name for column in table.columns or ())])
    label = place_of_column(file, table.label_column)
    patient = None if table.patient_column is None else place_of_column(file, table.patient_column)
    if label is None and split is not None:
        raise _no_column(path, table.label_column)
    if patient is None and table.patient_column is not None:
        raise _no_column(path, table.patient_column)
    patients = in_one_spelling([_patient(cells, patient, path, line) for line, cells in file.rows])
    if table.columns is None:
        encoded = _numbers_in_order(file, config, own, patients)
    else:
        places = places_of_columns(file, table.columns, own)
        numbers = [place for place, column in zip(places, table.columns, strict=True) if column.kind == "number"]
        require_no_identifier(file, numbers, patients)
        encoded = encode_rows(file, table.columns, places, may_leave_out=split is not None)
        if not encoded.kept:
            raise DataError(f"{path}: no row has a value in every column that needs one", "set `missing` of columns")
    kept = [file.rows[row] for row in encoded.kept]
    read_as = file.described + (", with decimal commas" if encoded.mark == "," else "")
    labels = [-1 if label is None else _label(cells[label], config, path, line) for line, cells in kept]
    everything = Records(
        encoded.features.astype(np.float32),
        np.array(labels, dtype=np.int64),
        [patients[row] for row in encoded.kept],
        [f"{path.name} line {line}" for line, _ in kept],
        [(read_as, *done) for done in encoded.treatments],
        Counter(why for row, why in encoded.left_out.items() if _tests(patients[row], config) == (split == "test")),
        _attributes(file, grouped, kept),
    )
    return everything if split is None else _chosen(everything, _split(everything.patients, config, split))


def _attributes(file: TableFile, grouped: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> list[Attributes]:
    """What columns say of these rows beside features; a table may lack such a column. Empty where no groups are formed."""
    plain = [plain_name(_BEFORE_UNIT.split(name)[0]) for name in file.header]
    places = {name: plain.index(name) for name in grouped if name in plain}
    return (
        [Attributes(**{name: cells[place] for name, place in places.items()}) for _, cells in rows] if grouped else []
    )


def _no_column(path: Path, name: str) -> DataError:
    return DataError(f"{path} has no column '{name}'", "set data.table.label_column and patient_column")


def _numbers_in_order(file: TableFile, config: Config, others: list[str], patients: list[str]) -> EncodedRows:
    """All columns but `others`, in the order of the file: without `data.table.columns` nobody says more."""
    left, count = {plain_name(name) for name in others}, config.data.table.features
    places = [place for place, name in enumerate(file.header) if plain_name(name) not in left]
    require_no_identifier(file, places, patients)
    if len(places) != count:
        raise DataError(f"{file.path} has {len(places)} feature columns, not {count}", "set data.table.features")
    mark, values = decimal_mark(file, places), np.empty((len(file.rows), len(places)))
    for row, (line, cells) in enumerate(file.rows):
        for feature, place in enumerate(places):
            try:
                values[row, feature] = number_of(cells[place], mark)
            except ValueError:
                raise DataError(
                    f"{file.path} line {line}: column '{file.header[place]}' holds no number",
                    "fill or remove the row, or say what the column is with data.table.columns or data.table.identifiers",
                ) from None
    rows = list(range(len(file.rows)))
    return EncodedRows(scale_features(values, config), rows, mark, [[] for _ in rows])


def _patient(cells: list[str], place: int | None, path: Path, line: int) -> str:
    if place is None:
        return str(line)
    # Empty keys would make one patient of all rows without a patient.
    if not cells[place]:
        raise DataError(f"{path} line {line}: the patient column is empty", "fill or remove the row")
    return cells[place]


def _label(cell: str, config: Config, path: Path, line: int) -> int:
    """The class of a row: its name, in any case where that is sure; else its number, which spreadsheets write as 1.0 or True."""
    classes, where = config.data.classes, f"{path} line {line}"
    if not cell:
        raise DataError(f"{where} has no label", "fill or remove the row")
    named = [number for number, name in enumerate(classes) if plain_name(name) == plain_name(cell)]
    written = _WHOLE.fullmatch(cell)
    text = written["number"] if written else cell
    if len(classes) == 2 and not named:
        text = _TRUTH.get(cell.casefold(), text)
    for candidate in (cell, text):
        if candidate in classes:
            return classes.index(candidate)
    if len(named) == 1:
        return named[0]
    if named:
        raise DataError(f"{where} has a label that fits several classes", "write it exactly as data.classes has it")
    if not _WHOLE.fullmatch(text):
        raise DataError(
            f"{where} has a label that is neither a class of data.classes nor a number", "correct it, or data.classes"
        )
    if any(_WHOLE.fullmatch(name) for name in classes):  # numbers are names here, not places
        raise DataError(f"{where} has a number that is no class of data.classes", "correct it, or data.classes")
    if len(text) >= 10 or not 0 <= int(text) < len(classes):
        raise DataError(
            f"wrong number of classes: {where} has a label outside of the {len(classes)} configured",
            "set data.classes to all class names",
        )
    return int(text)


def read_medmnist(path: Path, config: Config, split: Split) -> Records:
    """A MedMNIST archive: `<split>_images` uint8 (n, h, w) or (n, h, w, 3), `<split>_labels`. One record, one patient.

    Raises `DataError` for a file that is none, for images of another size, for labels beyond the classes.
    """
    images, labels = _read_arrays(path, split)
    _require_images(images, path, config.data.image_size)
    if not len(images):
        raise DataError(f"{path} holds no {split} images", "give another archive")
    labels = _whole_labels(labels, path, split, len(images))
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


def _require_images(images: np.ndarray, path: Path, size: int) -> None:
    """Raise `DataError` naming the dtype or the axis that is wrong."""
    if images.dtype != np.uint8:
        raise DataError(
            f"the images in {path} are {images.dtype}, expected uint8", "store grey values from 0 to 255 as uint8"
        )
    axes = images.shape[1:]
    shown = "x".join(map(str, axes)) or "no axes"
    if len(axes) == 3 and axes[0] in (1, 3) and axes[1:] == (size, size) and axes[2] != 3:
        raise DataError(f"the images in {path} are {shown}: colours come first", "move the colour axis to the end")
    # A last axis other than 3 is a volume (MedMNIST3D) or has alpha, not colours.
    if len(axes) not in (2, 3) or (len(axes) == 3 and axes[2] != 3):
        raise DataError(
            f"the images in {path} are {shown}: expected height x width, or height x width x 3",
            "store pictures, grey or with three colours; volumes and alpha are not read",
        )
    if axes[:2] != (size, size):
        fix = f"set data.image_size={axes[0]}" if axes[0] == axes[1] else "make height and width equal"
        raise DataError(f"the images in {path} are {shown}, expected {size}x{size}", fix)


def _whole_labels(labels: np.ndarray, path: Path, split: Split, count: int) -> np.ndarray:
    """One label an image, int64 (count,); truth values and floats without decimals are numbers. Raises `DataError`."""
    where = f"the array {split}_labels of {path}"
    if labels.shape not in ((count,), (count, 1)):
        several = labels.ndim == 2 and labels.shape[0] == count
        what = f"has {labels.shape[1]} labels an image" if several else f"has shape {labels.shape} for {count} images"
        raise DataError(f"{where} {what}, not one class per image", "use a single-label data set")
    labels = labels.reshape(count)
    values = labels.astype(np.float64) if labels.dtype.kind in "biuf" else np.full(count, np.nan)
    if not (np.isfinite(values) & (values == np.trunc(values)) & (np.abs(values) < 2**53)).all():
        raise DataError(
            f"{where} is {labels.dtype}, not whole numbers: not one class per image", "store numbers of classes"
        )
    return labels.astype(np.int64)


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
