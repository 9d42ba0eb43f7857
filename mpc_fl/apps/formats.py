"""Numbers as people read them: shares, seconds, bytes, joules. What is no number, as in files of other versions, becomes "n/a"."""

from __future__ import annotations

import math

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_JOULES = ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"), (1.0, "J"))
_HOUR, _MINUTE = 3600.0, 60.0
_ROUNDED = 0.9995  # of a unit: with three digits it is one whole


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
    """Seconds as text in a unit that suits them, to three digits: 12 ms, 1.5 s, 3 min, 2.5 h."""
    seconds = number(value)
    if seconds >= 2 * _MINUTE:
        return _three_digits(seconds, *((_HOUR, "h") if seconds >= 2 * _HOUR else (_MINUTE, "min")))
    if 0 < seconds < _ROUNDED:
        return _three_digits(seconds, 1e-3, "ms")
    return _three_digits(seconds, 1.0, "s")


def size(value: object) -> str:
    """A number of bytes as text in a unit that suits it, to three digits: 12 bytes, 2.5 kB, 3.1 MB."""
    count = number(value)
    factor, unit = next(((f, u) for f, u in UNITS if count >= _ROUNDED * f), (1.0, "bytes"))
    return _three_digits(count, factor, unit)


def energy(value: object) -> str:
    """Joules as text in a unit that suits them, to three digits: 12 mJ, 12 J, 2.5 kJ, 3.1 MJ."""
    joules = number(value)
    factor, unit = next(((f, u) for f, u in _JOULES if abs(joules) >= _ROUNDED * f), (1e-3, "mJ"))
    return "n/a" if math.isnan(joules) else _three_digits(joules, factor, unit)


def in_ranges(numbers: list[str]) -> str:
    """Numbers in order, as text: 3, 5 to 9."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _three_digits(value: float, factor: float, unit: str) -> str:
    scaled = value / factor
    return plain(scaled, ",.0f" if scaled >= 999.5 else ".3g", unit=f" {unit}")  # never 1.2e+03
