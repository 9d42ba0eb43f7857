"""Seconds and bytes are printed in a unit that suits them, everywhere by one function."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpc_fl
from mpc_fl.apps.formats import duration, energy, in_ranges, percent, plain, size

_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BYTES = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (0.042, "42 ms"), (0.99999, "1 s"), (61, "61 s"), (180, "3 min"), (9000, "2.5 h"),
     (1e7, "2,778 h"), (None, "n/a"), (math.nan, "n/a")],
)  # fmt: skip
def test_seconds_have_a_unit_that_suits_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (12, "12 bytes"), (999, "999 bytes"), (2500, "2.5 kB"), (999_999, "1 MB"), (3.1e6, "3.1 MB"),
     (4e9, "4 GB"), (2e12, "2 TB"), (5e15, "5,000 TB"), (None, "n/a")],
)  # fmt: skip
def test_bytes_have_a_unit_that_suits_them(count: float | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("joules", "text"),
    [(0, "0 mJ"), (0.0123, "12.3 mJ"), (0.9999, "1 J"), (12, "12 J"), (2500, "2.5 kJ"), (3.1e6, "3.1 MJ"), (2e13, "20,000 GJ"),
     (None, "n/a")],
)  # fmt: skip
def test_joules_have_a_unit_that_suits_them(joules: float | None, text: str) -> None:
    assert energy(joules) == text


@given(st.floats(1e-3, 1e9), st.floats(1, 1e16))
def test_what_is_printed_is_never_zero_and_right_to_three_digits(seconds: float, count: float) -> None:
    for value, text, units in ((seconds, duration(seconds), _SECONDS), (count, size(count), _BYTES)):
        said, unit = text.split()
        assert math.isclose(float(said.replace(",", "")) * units[unit], value, rel_tol=6e-3)
        assert "e" not in said


def test_shares_and_what_is_no_number() -> None:
    assert percent(0.1234) == "12.3 %" and plain(None) == "n/a"


def test_rounds_in_a_row_are_a_range() -> None:
    assert in_ranges(["3", "5", "6", "7", "9"]) == "3, 5 to 7, 9"
    assert in_ranges(["4"]) == "4" and in_ranges([]) == ""


def test_no_command_prints_seconds_or_bytes_in_a_unit_of_its_own() -> None:
    fixed = re.compile(r"\.[0-9]f\} (s|ms|kB|MB|GB)\b(?!.*(progress:|GB/s))")
    cli = Path(str(mpc_fl.__file__)).parent / "apps" / "cli"
    lines = [
        f"{path.name}: {line.strip()}"
        for path in sorted(cli.glob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if fixed.search(line) and "progress:" not in line
    ]
    assert [line for line in lines if not line.startswith("bench.py")] == []  # columns of one unit, to compare
