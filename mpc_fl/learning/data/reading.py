"""Reading many image files: what was read, what was done to it, what could not be read and whether that is too much."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.file_kinds import UnreadableImageError
from mpc_fl.learning.data.image_files import ImageForm, read_image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadImages:
    """Images of the readable files with their positions, to how many was done what, and what is wrong with which others."""

    images: list[torch.Tensor]
    kept: list[int]
    treatments: Counter[str]
    unreadable: dict[int, UnreadableImageError]

    def stacked(self) -> torch.Tensor:
        """All images, float32 (N, C, H, W). Raises `DataError` where there is none."""
        if not self.images:
            first = next(iter(self.unreadable.values()), None)
            reason = first.what if first is not None else "there are no files"
            raise DataError(
                f"no image can be read; the first: {reason}", first.fix if first else "check the data folder"
            )
        return torch.stack(self.images)


def read_files(files: Sequence[Path], config: Config) -> ReadImages:
    """Read image files in order; those that cannot be read are counted. Raises `WrongSizeError`."""
    form, read = ImageForm.of(config.data), ReadImages([], [], Counter(), {})
    for position, path in enumerate(files):
        try:
            picture = read_image(path, form)
        except UnreadableImageError as error:
            read.unreadable[position] = error
            log.warning("skipped: %s", error.what)
            continue
        read.images.append(picture.pixels)
        read.kept.append(position)
        read.treatments.update(picture.treatments)
    return read


def require_readable(
    labels: Sequence[int], unreadable: Mapping[int, UnreadableImageError], split: str, config: Config
) -> None:
    """Raise `DataError` where more files of a class are unreadable than `data.most_unreadable` allows.

    `labels` are those of a hospital's files in one split, `unreadable` the errors by their positions.
    """
    files, failed = Counter(labels), Counter(labels[position] for position in unreadable)
    for label, count in sorted(failed.items()):
        if count > config.data.most_unreadable * files[label]:
            first = next(error for position, error in unreadable.items() if labels[position] == label)
            raise DataError(
                f"{count} of {files[label]} {split} files of class '{config.data.classes[label]}' cannot be read, more than "
                f"data.most_unreadable={config.data.most_unreadable:g} of them; the first: {first.what}",
                first.fix,
            )


def require_one_readable(files: Sequence[Path], label: int, config: Config) -> None:
    """Raise `DataError` unless one of these files of a class can be read; those of test patients may all be left out."""
    first: UnreadableImageError | None = None
    for path in files:
        try:
            read_image(path, ImageForm.of(config.data))
            return
        except UnreadableImageError as error:
            first = first or error
    raise nothing_of_class(label, first, config)


def nothing_of_class(label: int, first: UnreadableImageError | None, config: Config) -> DataError:
    """The error of a class of which no image is left: `first` is what is wrong with the first, None where there is none."""
    name = config.data.classes[label]
    if first is None:
        return DataError(
            f"no test patient of class '{name}' is left without those that also train",
            "add patients, or set data.shared_patients to keep",
        )
    return DataError(f"no image of class '{name}' can be read; the first: {first.what}", first.fix)
