"""Loaders of others: an installed package that announces one in the group `mpc_fl.loaders` is a `data.source` by its name.

    [project.entry-points."mpc_fl.loaders"]
    our_archive = "our_package.archive:load"

    def load(path, split, input_shape, classes): ...

It is called with a `Path` (`--data`, `--images`) or None, the split "train" or "test", the shape of a record, and the names of the
classes, and returns a mapping with all records of that split: `records` float32 (N, *input_shape), of images between 0 and 1;
`labels` int64 (N,), places in `classes`, at diagnosis -1 where unknown; `patients`, N texts, each the key of one patient and of
nobody else; and perhaps `names`, N texts for logs and results (else they are numbered). Arrays are NumPy's or torch's. With
`data.table.features` the records are rows of so many numbers, scaled here as those of CSV files are.

All of that is checked, since privacy counts by patient and headroom by range. Whose records are whose, only the loader knows: a
patient under two keys is counted as two. Who is in both splits is treated as `data.shared_patients` says. Each site allows the
package first (`installed_code`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpc_fl.config.config import Config
from mpc_fl.config.data import SOURCES
from mpc_fl.errors import ConfigError, DataError, printable
from mpc_fl.installed_code import Package, load_entry_point, loaders
from mpc_fl.learning.data.spellings import in_one_spelling
from mpc_fl.learning.data.tables import Records, Split, scale_features

GROUP = "mpc_fl.loaders"
_LONGEST_TEXT = 200
_FIX = "correct the package, or ask its author"


def loader_package(config: Config) -> Package | None:
    """The installed package that loads the data; None for sources of this program. Nothing is imported. Raises `ConfigError`."""
    name = config.data.source
    if name in SOURCES:
        return None
    packages = loaders(GROUP).get(name, [])
    if not packages:
        known = [*SOURCES, *loaders(GROUP)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"data.source '{name}' is none of this program's, and no installed package announces it ({GROUP})",
            f"the nearest known name is '{near[0]}'; or install the package that has it",
        )
    return packages[0]


def read_with_loader(config: Config, path: Path | None, split: Split, labelled: bool = True) -> Records:
    """All records of a split by the configured loader; with `labelled` false labels may be -1.

    Raises `ConfigError` for a loader that is not installed, announced twice or not allowed here, `DataError` for one that fails or
    breaks the contract.
    """
    loader_package(config)
    load, package = load_entry_point(GROUP, config.data.source, config.site.allow_packages)
    who, shape = f"the loader '{config.data.source}' of {package}", config.data.input_shape
    try:
        loaded = load(path, split, shape, config.data.classes)
    except Exception as error:  # noqa: BLE001 - code of others
        first = printable((str(error).splitlines() or [""])[0], 160)
        raise DataError(f"{who} raised {type(error).__name__} on the {split} records: {first}", _FIX) from None
    if not isinstance(loaded, Mapping) or not {"records", "labels", "patients"} <= set(loaded):
        raise DataError(f"{who} gives no mapping with records, labels and patients", _FIX)
    records, labels = _array(loaded["records"], who, "records"), _array(loaded["labels"], who, "labels")
    if records.dtype != np.float32 or records.shape[1:] != shape:
        raise DataError(
            f"{who} gives records {records.dtype} {records.shape}, not float32 (N, {', '.join(map(str, shape))})",
            "set data.image_size and data.channels, or data.table.features, to what it gives",
        )
    if not len(records) or not bool(np.isfinite(records).all()):
        raise DataError(f"{who} gives {'values that are not finite' if len(records) else 'no records'} ({split})", _FIX)
    if not config.data.is_table and not 0 <= records.min() <= records.max() <= 1:
        raise DataError(f"{who} gives images with values outside of 0 to 1", "let it scale them")
    lowest, classes = 0 if labelled else -1, len(config.data.classes)
    if labels.dtype != np.int64 or labels.shape != (len(records),):
        raise DataError(f"{who} gives labels {labels.dtype} {labels.shape}, not int64 ({len(records)},)", _FIX)
    if not lowest <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"wrong number of classes: {who} gives labels from {labels.min()} to {labels.max()}, {classes} are configured",
            "set data.classes to all class names",
        )
    patients = in_one_spelling(_texts(loaded["patients"], len(records), who, "patients"))
    numbered = [f"{config.data.source}-{split}-{row}" for row in range(len(records))]
    names = _texts(loaded["names"], len(records), who, "names") if "names" in loaded else numbered
    if config.data.is_table:
        records = scale_features(records.astype(np.float64), config)
    return Records(records, labels, patients, names)


def _array(value: Any, who: str, what: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or not value.ndim:
        raise DataError(f"{who} gives {what} that are no array", _FIX)
    return value


def _texts(values: Any, count: int, who: str, what: str) -> list[str]:
    """A text for each record; keys that are equal but for spaces around them would make two patients of one."""
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str) or len(values) != count:
        raise DataError(f"{who} gives no list of {count} {what}", _FIX)
    for value in values:
        if (
            not isinstance(value, str)
            or not 0 < len(value.strip()) == len(value) <= _LONGEST_TEXT
            or not value.isprintable()
        ):
            raise DataError(
                f"{who} gives {what} that are not short texts", "let it give str, without spaces at either end"
            )
    return [str(value) for value in values]
