"""Brightness: from the values of a picture to [0, 1], as it is shown on a screen.

In this order: the table or the window that the header gives (PS3.3 C.11.2); else the range that the bits allow; and where
these say nothing, because the picture takes a small part of them or they are signed 16 bits of anything, the range that the
picture itself takes. What was done is said with every picture and counted by `mpc-fl check`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TABLE, WINDOW = "brightness by the table in the header", "brightness by the window in the header"
STORED_BITS = "no window: brightness by the bits that the header says"
USED_BITS = "no window: brightness by the bits that are used, fewer than the file has"
PERCENTILES = "no window: brightness by the picture itself, from 0.5 to 99.5 % of its values"
_PERCENTILES = (0.5, 99.5)
_LEAST_SHARE = 1 / 8  # of its range; with less, 8 bits of it would hold fewer than 32 steps of grey
_DISPLAY_BITS = 8  # values of so many bits were made to be shown
_USUAL_BITS = (12, 14, 16)  # of detectors


def first_number(header: Any, name: str) -> float | None:
    """A decimal value, the first of several; None where the element is absent or empty."""
    from pydicom.multival import MultiValue

    value = header.get(name)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)


def shown(stored: np.ndarray, header: Any, bits: int, signed: bool) -> tuple[np.ndarray, str]:
    """Brightness in [0, 1] of a grey DICOM picture, and how it came about. `stored`: integers (height, width).

    Great values are bright; MONOCHROME1 is the caller's. Raises `ValueError` for a header that cannot be.
    """
    padding = header.get("PixelPaddingValue")
    outside = None if padding is None else stored == int(padding)
    inside = stored if outside is None or outside.all() else stored[~outside]
    ends, how = _range_of_bits(inside, bits, signed, said=bits < int(header.BitsAllocated))
    values, low, high = _modality_values(stored.astype(np.float64), header, ends)
    if header.get("VOILUTSequence"):
        brightness, largest = _looked_up(values, header.VOILUTSequence[0], header)
        return np.clip(brightness / largest, 0.0, 1.0), TABLE
    windowed = _windowed(values, header)
    if windowed is not None:
        return windowed, WINDOW
    if bits <= _DISPLAY_BITS and not header.get("ModalityLUTSequence"):
        return np.clip((values - low) / (high - low), 0.0, 1.0), how
    return _by_range(values, (low, high), how, outside)


def shown_without_header(values: np.ndarray) -> tuple[np.ndarray, str]:
    """The same of a picture whose file says nothing of brightness: 16 bits or more, or floats, (height, width)."""
    if values.dtype.kind == "f":
        return _by_range(values.astype(np.float64), (0.0, 0.0), PERCENTILES, None)
    ends, how = _range_of_bits(values, 16, signed=bool(values.min() < 0), said=False)
    return _by_range(values.astype(np.float64), ends, how, None)


def _range_of_bits(stored: np.ndarray, bits: int, signed: bool, said: bool) -> tuple[tuple[float, float], str]:
    """Least and greatest value by the bits, and how that was found: `said` by the header, or the fewest that hold all."""
    ends = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if bits <= _DISPLAY_BITS or said:
        return ends, STORED_BITS
    if signed:
        return ends, PERCENTILES
    used = next((usual for usual in _USUAL_BITS if stored.max(initial=0) < 2**usual), None)
    if used is None:
        return ends, PERCENTILES
    return (0.0, 2.0**used - 1), STORED_BITS if used == bits else USED_BITS


def _by_range(
    values: np.ndarray, ends: tuple[float, float], how: str, outside: np.ndarray | None
) -> tuple[np.ndarray, str]:
    """Brightness by `ends`, or by the picture's own percentiles where they say nothing of it.

    `outside` marks pixels that belong to no picture. A picture of one value stays where `ends` put it.
    """
    inside = values if outside is None or outside.all() else values[~outside]
    low, high = (float(end) for end in np.percentile(inside, _PERCENTILES))
    if low == high:
        low, high = float(inside.min()), float(inside.max())
    if low < high and (how == PERCENTILES or high - low < _LEAST_SHARE * (ends[1] - ends[0])):
        ends, how = (low, high), PERCENTILES
    if not ends[0] < ends[1]:
        return np.zeros_like(values), how
    return np.clip((values - ends[0]) / (ends[1] - ends[0]), 0.0, 1.0), how


def _modality_values(pixels: np.ndarray, header: Any, ends: tuple[float, float]) -> tuple[np.ndarray, float, float]:
    """Values after the modality table or rescaling (PS3.3 C.11.1), and the least and greatest they can take."""
    if header.get("ModalityLUTSequence"):
        values, largest = _looked_up(pixels, header.ModalityLUTSequence[0], header)
        return values, 0.0, largest
    slope, intercept = first_number(header, "RescaleSlope"), first_number(header, "RescaleIntercept")
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if slope == 0:
        raise ValueError("the rescale slope is zero")
    if not np.isfinite((slope, intercept)).all():
        raise ValueError("the rescaling is not finite")
    low, high = sorted(end * slope + intercept for end in ends)
    return pixels * slope + intercept, low, high


def _windowed(values: np.ndarray, header: Any) -> np.ndarray | None:
    """Brightness in [0, 1] by the first window; None where the header gives none.

    Written out because pydicom's functions turn brightness round for a negative slope, and fail or wrap round for
    tables of 8 bits with more than 256 entries.
    """
    centre, width = first_number(header, "WindowCenter"), first_number(header, "WindowWidth")
    if centre is None or width is None:
        return None
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
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


def _looked_up(values: np.ndarray, item: Any, header: Any) -> tuple[np.ndarray, float]:
    """Values through a table of one sequence item, and the greatest value its entries can take."""
    return through_table(values, item.LUTDescriptor, item.LUTData, little_endian=header.original_encoding[1])


def through_table(values: np.ndarray, descriptor: Any, data: Any, little_endian: bool) -> tuple[np.ndarray, float]:
    """Values through a table (PS3.3 C.7.6.3.1.5, C.11.1.1 and C.11.2.1.1), float64, and the greatest value of an entry.

    `descriptor` is how many entries there are, the value that the first stands for, and the bits of each; `data` its words, or
    their bytes. Raises `ValueError` for a table that cannot be.
    """
    count, first, depth = (int(number) for number in descriptor)
    count = count % 65536 or 65536
    if not 8 <= depth <= 16:
        raise ValueError("the table has an unknown depth")
    if isinstance(data, bytes):
        words = np.frombuffer(data, "<u2" if little_endian else ">u2")
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
