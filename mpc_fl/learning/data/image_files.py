"""Image files to tensors: PNG and JPEG through Pillow, DICOM through pydicom.

Of a DICOM file only pixels and what is needed to show them are loaded; no identifying tag is read, logged or copied.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mpc_fl.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})
_LARGEST_PIXELS = 64_000_000
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom gives RGB for all of them
# The only data elements that are loaded.
_ELEMENTS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence", "RescaleSlope",
    "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelData",
)  # fmt: skip
# What Pillow and pydicom raise for malformed content besides exceptions of their own, found by damaging files at random.
_MALFORMED = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, SyntaxError,
    MemoryError, AssertionError, struct.error, zlib.error,
)  # fmt: skip


class UnreadableImageError(DataError):
    """One file cannot be read as an image. Loaders skip and count it."""


class WrongSizeError(DataError):
    """An image has another size than configured and `data.wrong_size` is `error`."""


def is_image_file(path: Path) -> bool:
    """Whether an entry of a folder counts as an image: by its suffix, or as DICOM by its content without one.

    Exports of hospital archives are often named by number or identifier (`IM0001`, `1.2.840.10008.7`). Hidden files and
    the index file DICOMDIR are no images.
    """
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix.strip(".0123456789"):
        return False
    try:
        return _has_dicom_mark(path)
    except OSError:
        return True  # so that it is counted as unreadable, not overlooked


def read_image(path: Path, channels: int, size: int, wrong_size: Literal["error", "resize"]) -> torch.Tensor:
    """Read one image as float32 (channels, size, size) in [0, 1].

    Raises `UnreadableImageError` naming the file, `WrongSizeError` when the size differs and may not be changed.
    """
    grey_or_colour = _read_dicom(path) if _is_dicom(path) else _read_picture(path)
    image = torch.from_numpy(np.array(grey_or_colour, dtype=np.float32, order="C"))
    image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
    if tuple(image.shape[1:]) != (size, size):
        found = f"{image.shape[2]}x{image.shape[1]}"
        if wrong_size == "error":
            raise WrongSizeError(
                f"image {path} is {found}, expected {size}x{size}", "set data.wrong_size=resize or data.image_size"
            )
        image = torch.nn.functional.interpolate(
            image[None], (size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
    if channels == 1 and image.shape[0] == 3:
        image = image.mean(dim=0, keepdim=True)
    elif channels == 3 and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    return image.clamp(0, 1).contiguous()


def _unreadable(path: Path, why: str) -> UnreadableImageError:
    return UnreadableImageError(f"cannot read image {path}: {why}", "replace or remove the file")


def _has_dicom_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _is_dicom(path: Path) -> bool:
    try:
        return _has_dicom_mark(path) or path.suffix.lower() in (".dcm", ".dicom")
    except OSError as error:
        raise _unreadable(path, error.strerror or "no access") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log lines of the decoders: they may quote tag values."""
    from PIL import Image  # pydicom decodes some pixels with it, too

    loggers = [logging.getLogger(name) for name in ("pydicom", "PIL")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _read_picture(path: Path) -> np.ndarray:
    """Float values in [0, 1], (height, width) or (height, width, 3)."""
    from PIL import Image, ImageOps

    try:
        with _quiet(), Image.open(path, formats=("PNG", "JPEG")) as file:
            if file.width * file.height > _LARGEST_PIXELS:
                raise _unreadable(path, "it has too many pixels")
            picture: Image.Image = ImageOps.exif_transpose(file)
            if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
                return np.asarray(picture, dtype=np.float32) / 65535.0
            if picture.mode in ("L", "1", "LA"):
                return np.asarray(picture.convert("L"), dtype=np.float32) / 255.0
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    except (*_MALFORMED, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _unreadable(path, "no valid PNG or JPEG") from None


def _read_dicom(path: Path) -> np.ndarray:
    """Float values in [0, 1] as shown on a screen: modality table, window, photometric interpretation (PS3.3 C.11)."""
    import pydicom
    from PIL import Image

    own = (pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException)
    try:
        with _quiet():
            syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
            if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                # pydicom inflates the whole file without any bound
                raise _unreadable(path, "a deflated DICOM file is not supported")
            return _shown(pydicom.dcmread(path, force=False, specific_tags=list(_ELEMENTS)), path)
    except (*_MALFORMED, *own, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # pydicom's messages may quote tag values, so only the kind of error is passed on.
        raise _unreadable(path, f"no readable DICOM pixels ({type(error).__name__})") from None


def _shown(dataset: Any, path: Path) -> np.ndarray:
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise _unreadable(path, "it has several frames")
    if int(dataset.Rows) * int(dataset.Columns) > _LARGEST_PIXELS:
        raise _unreadable(path, "it has too many pixels")
    interpretation, bits = str(dataset.PhotometricInterpretation), int(dataset.BitsStored)
    if interpretation not in _GREY + _COLOUR:
        raise _unreadable(path, "its photometric interpretation is not supported")
    if int(dataset.get("HighBit", bits - 1)) != bits - 1:
        # forbidden since DICOM 2014c; pydicom would cut off the high bits
        raise _unreadable(path, "its high bit is not supported")
    pixels = dataset.pixel_array
    if pixels.ndim != (2 if interpretation in _GREY else 3) or not pixels.size:
        raise _unreadable(path, "its number of samples per pixel does not fit")
    if interpretation in _COLOUR:
        return np.clip(pixels.astype(np.float32) / float(2**bits - 1), 0.0, 1.0)
    values, low, high = _modality_values(pixels.astype(np.float64), dataset, bits)
    shown = _windowed(values, low, high, dataset)
    if not np.isfinite(shown).all():
        raise _unreadable(path, "its rescaling or window is not finite")
    return 1.0 - shown if interpretation == "MONOCHROME1" else shown


def _first_number(dataset: Any, name: str) -> float | None:
    """A decimal value, the first of several; None where the element is absent or empty."""
    from pydicom.multival import MultiValue

    value = dataset.get(name)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)


def _modality_values(pixels: np.ndarray, dataset: Any, bits: int) -> tuple[np.ndarray, float, float]:
    """Values after the modality table or rescaling (PS3.3 C.11.1), and the least and greatest they can take."""
    if dataset.get("ModalityLUTSequence"):
        values, largest = _looked_up(pixels, dataset.ModalityLUTSequence[0], dataset)
        return values, 0.0, largest
    slope, intercept = _first_number(dataset, "RescaleSlope"), _first_number(dataset, "RescaleIntercept")
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if slope == 0:
        raise ValueError("the rescale slope is zero")
    signed = int(dataset.PixelRepresentation) == 1
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = sorted(end * slope + intercept for end in ends)
    return pixels * slope + intercept, low, high


def _windowed(values: np.ndarray, low: float, high: float, dataset: Any) -> np.ndarray:
    """Brightness in [0, 1] by the first value-of-interest table, else the first window, else the whole range.

    Written out because pydicom's functions turn brightness round for a negative slope, and fail or wrap round for
    tables of 8 bits with more than 256 entries.
    """
    if dataset.get("VOILUTSequence"):
        brightness, largest = _looked_up(values, dataset.VOILUTSequence[0], dataset)
        return np.clip(brightness / largest, 0.0, 1.0)
    centre, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    if centre is None or width is None:
        return np.clip((values - low) / (high - low), 0.0, 1.0)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ValueError("the window width is too small")
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1.0
    elif function != "LINEAR_EXACT":
        raise ValueError("the window function is unknown")
    if width == 0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _looked_up(values: np.ndarray, item: Any, dataset: Any) -> tuple[np.ndarray, float]:
    """Values through a table (PS3.3 C.11.1.1 and C.11.2.1.1), and the greatest value its entries can take."""
    count, first, depth = (int(number) for number in item.LUTDescriptor)
    count = count % 65536 or 65536
    if not 8 <= depth <= 16:
        raise ValueError("the table has an unknown depth")
    data = item.LUTData
    if isinstance(data, bytes):
        words = np.frombuffer(data, "<u2" if dataset.original_encoding[1] else ">u2")
    else:
        words = np.atleast_1d(np.asarray(data, dtype=np.int64)) % 65536
    if len(words) >= count:
        entries = words[:count]
    elif depth == 8 and 2 * len(words) >= count:
        entries = words.astype("<u2").view(np.uint8)[:count]  # two entries to a word
    else:
        raise ValueError("the table is too short")
    index = np.clip(np.rint(values) - first, 0, count - 1).astype(np.int64)
    return entries[index].astype(np.float64), float(2**depth - 1)
