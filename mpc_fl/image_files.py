"""Image files to tensors: PNG and JPEG through Pillow, DICOM through pydicom.

Of a DICOM file only pixels and what is needed to read them are used; no identifying tag is read, logged or copied.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import torch
from PIL import Image, ImageOps
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from mpc_fl.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})
_LARGEST_PIXELS = 64_000_000


class UnreadableImageError(DataError):
    """One file cannot be read as an image. Loaders skip and count it."""


class WrongSizeError(DataError):
    """An image has another size than configured and `data.wrong_size` is `error`."""


def read_image(path: Path, channels: int, size: int, wrong_size: Literal["error", "resize"]) -> torch.Tensor:
    """Read one image as float32 (channels, size, size) in [0, 1].

    Raises `UnreadableImageError` naming the file, `WrongSizeError` when the size differs and may not be changed.
    """
    grey_or_colour = _read_dicom(path) if _is_dicom(path) else _read_picture(path)
    image = torch.from_numpy(np.ascontiguousarray(grey_or_colour, dtype=np.float32))
    image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
    if tuple(image.shape[1:]) != (size, size):
        found = f"{image.shape[2]}x{image.shape[1]}"
        if wrong_size == "error":
            raise WrongSizeError(
                f"image {path} is {found}, expected {size}x{size}", "set data.wrong_size=resize or data.image_size"
            )
        image = torch.nn.functional.interpolate(
            image[None], (size, size), mode="bilinear", antialias=True, align_corners=False
        )[0].clamp(0, 1)
    if channels == 1 and image.shape[0] == 3:
        image = image.mean(dim=0, keepdim=True)
    elif channels == 3 and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    return image.contiguous()


def _unreadable(path: Path, why: str) -> UnreadableImageError:
    return UnreadableImageError(f"cannot read image {path}: {why}", "replace or remove the file")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")
    except OSError as error:
        raise _unreadable(path, error.strerror or "no access") from None


def _read_picture(path: Path) -> np.ndarray:
    """Float values in [0, 1], (height, width) or (height, width, 3)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as file:
                if file.width * file.height > _LARGEST_PIXELS:
                    raise _unreadable(path, "it has too many pixels")
                picture: Image.Image = ImageOps.exif_transpose(file)
                if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
                    return np.asarray(picture, dtype=np.float32) / 65535.0
                if picture.mode in ("L", "1", "LA"):
                    return np.asarray(picture.convert("L"), dtype=np.float32) / 255.0
                return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _unreadable(path, "no valid PNG or JPEG") from None


def _read_dicom(path: Path) -> np.ndarray:
    """Float values in [0, 1] after modality table, window and photometric interpretation (DICOM PS3.3, C.11 and C.7.6.3)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=False)
            return _shown(dataset, path)
    except UnreadableImageError:
        raise
    except (pydicom.errors.InvalidDicomError, AttributeError, ValueError, KeyError, NotImplementedError, RuntimeError,
            TypeError, OSError, EOFError) as error:  # fmt: skip
        # pydicom's messages may quote tag values, so only the kind of error is passed on.
        raise _unreadable(path, f"no readable DICOM pixels ({type(error).__name__})") from None


def _shown(dataset: Any, path: Path) -> np.ndarray:
    if int(dataset.get("NumberOfFrames", 1) or 1) != 1:
        raise _unreadable(path, "it has several frames")
    if int(dataset.Rows) * int(dataset.Columns) > _LARGEST_PIXELS:
        raise _unreadable(path, "it has too many pixels")
    interpretation = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    pixels = dataset.pixel_array
    if interpretation in ("RGB", "YBR_FULL", "YBR_FULL_422"):
        return pixels.astype(np.float32) / float(2**bits - 1)
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise _unreadable(path, "its photometric interpretation is not supported")
    values = apply_modality_lut(pixels, dataset)
    has_window = "WindowCenter" in dataset or "VOILUTSequence" in dataset
    if has_window:
        values = apply_voi_lut(values, dataset)
    values = np.asarray(values, dtype=np.float64)
    low, high = (
        _range(dataset, bits) if has_window and "VOILUTSequence" not in dataset else (values.min(), values.max())
    )
    if not has_window:
        low, high = _range(dataset, bits)
    shown = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    return (1.0 - shown if interpretation == "MONOCHROME1" else shown).astype(np.float32)


def _range(dataset: Any, bits: int) -> tuple[float, float]:
    """Output range of stored values after rescaling; pydicom's windowing maps onto the same range."""
    signed = int(dataset.PixelRepresentation) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return ends[0], ends[1]
