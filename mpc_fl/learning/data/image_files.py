"""Image files to tensors: every kind that is read, brought to one size and one number of channels.

`file_kinds` tells what a file is, `dicom_files` and `picture_files` read it, `windows` says how bright it is; here it gets
the form that the configuration asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mpc_fl.config.data import DataSection
from mpc_fl.errors import DataError
from mpc_fl.learning.data.dicom_files import Frame, read_dicom
from mpc_fl.learning.data.file_kinds import (
    DICOM,
    IMAGE_KINDS,
    NIFTI,
    UnreadableImageError,
    kind_by_name,
    kind_of,
    unreadable,
)
from mpc_fl.learning.data.picture_files import read_nifti, read_picture

RESIZED, PADDED = "resized", "padded to a square"
CROPPED, STRETCHED = "cropped to a square", "stretched to a square, which distorts it"
_WINDOWS_LEAVES = ("thumbs.db", "desktop.ini")
_INDEX = "DICOMDIR"


class WrongSizeError(DataError):
    """An image has another size than configured and `data.wrong_size` is `error`."""


@dataclass(frozen=True)
class ImageForm:
    """The form of all images: channels, side in pixels, and what becomes of files that are otherwise."""

    channels: int
    size: int
    wrong_size: Literal["error", "resize"] = "error"
    not_square: Literal["pad", "crop", "stretch"] = "pad"
    frame: Frame = "error"

    @classmethod
    def of(cls, data: DataSection) -> ImageForm:
        """As configured."""
        return cls(data.channels, data.image_size, data.wrong_size, data.not_square, data.frame)


@dataclass(frozen=True)
class Picture:
    """An image float32 (channels, size, size) in [0, 1], and what was done to its file to get there, in some words each."""

    pixels: torch.Tensor
    treatments: tuple[str, ...]


def what_is_left_aside(path: Path) -> str | None:
    """In some words what an entry of a folder of images is that is not read; None for an image.

    A suffix that announces an image makes one, whatever is inside: damaged files are counted when they are read. Other names
    say nothing, so the first bytes do. A file without access counts as an image, and so does a link that leads nowhere, as to
    a share that is not there now: neither is overlooked.
    """
    if path.name.startswith("."):
        return "hidden"
    if path.name.upper() == _INDEX or path.name.lower() in _WINDOWS_LEAVES:
        return "index or cache of a program"
    if path.is_symlink() and not path.exists():
        return None
    if not path.is_file():
        return "folder" if path.is_dir() else "no file"
    if kind_by_name(path) is not None:
        return None
    try:
        kind = kind_of(path)
    except UnreadableImageError:
        return None
    if kind in IMAGE_KINDS:
        return None
    suffix = path.suffix.lower()
    return kind or (f"no image ({suffix})" if suffix.isprintable() and suffix.strip(".0123456789") else "no image")


def read_image(path: Path, form: ImageForm) -> Picture:
    """Read one image. Raises `UnreadableImageError` naming the file, `WrongSizeError` when the size may not be changed."""
    grey_or_colour, done = _read(path, form.frame)
    image = torch.from_numpy(np.array(grey_or_colour, dtype=np.float32, order="C"))
    image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
    height, width = image.shape[1:]
    if (height, width) != (form.size, form.size):
        if form.wrong_size == "error":
            raise WrongSizeError(
                f"image {path} is {width}x{height}, expected {form.size}x{form.size}",
                "set data.wrong_size=resize or data.image_size",
            )
        image, resizing = made_square(image, form)
        done = (*done, *resizing)
    if form.channels == 1 and image.shape[0] == 3:
        image = image.mean(dim=0, keepdim=True)
    elif form.channels == 3 and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    return Picture(image.clamp(0, 1).contiguous(), done)


def _read(path: Path, frame: Frame) -> tuple[np.ndarray, tuple[str, ...]]:
    kind = kind_of(path)
    if kind not in IMAGE_KINDS:
        raise unreadable(path, "it is no image of a kind that is read", f"give {', '.join(IMAGE_KINDS)}, or remove it")
    if kind == DICOM:
        return read_dicom(path, frame)
    return read_nifti(path, frame) if kind == NIFTI else read_picture(path, str(kind), frame)


def made_square(image: torch.Tensor, form: ImageForm) -> tuple[torch.Tensor, tuple[str, ...]]:
    """A square of the configured side, of an image (channels, height, width), and in some words what was done.

    The whole film with black beside it, its middle, or all of it distorted.
    """
    (height, width), size = image.shape[1:], form.size
    if height == width:
        return _scaled(image, size, size), (RESIZED,)
    if form.not_square == "stretch":
        return _scaled(image, size, size), (STRETCHED,)
    if form.not_square == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scaled(image[:, top : top + side, left : left + side], size, size), (CROPPED,)
    longer = max(height, width)
    inside = _scaled(image, max(1, round(size * height / longer)), max(1, round(size * width / longer)))
    square = torch.zeros(image.shape[0], size, size)
    top, left = (size - inside.shape[1]) // 2, (size - inside.shape[2]) // 2
    square[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    return square, (PADDED,)


def _scaled(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image
    return torch.nn.functional.interpolate(
        image[None], (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]
