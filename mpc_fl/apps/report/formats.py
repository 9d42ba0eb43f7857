"""Numbers as text for reports. What is no number, as files of other versions may hold, becomes "n/a"."""

from __future__ import annotations

import math

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: object) -> float:
    """A number from a file, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def plain(value: object, form: str = ".3g", factor: float = 1.0, unit: str = "") -> str:
    """A number from a file as text, "n/a" when there is none."""
    return "n/a" if math.isnan(number(value)) else f"{factor * number(value):{form}}{unit}"


def percent(value: object) -> str:
    """A share as text."""
    return plain(value, ".1f", 100, " %")


def duration(value: object) -> str:
    """Seconds as text in a unit that suits them."""
    seconds = number(value)
    factor, unit = next(((f, u) for f, u in ((3600.0, "h"), (60.0, "min")) if seconds >= 2 * f), (1.0, "s"))
    return plain(seconds, ".3g", 1 / factor, f" {unit}")


def size(count: float) -> str:
    """A number of bytes as text."""
    factor, unit = next(((f, u) for f, u in UNITS if count >= f), (1.0, "bytes"))
    return plain(count, ".3g", 1 / factor, f" {unit}")
