"""Columns of a table by their names, and cells as features: what `data.table.columns` agreed on. Pure.

No message quotes a cell: it may be a patient's name.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mpc_fl.config.columns import TRUTH_WORDS, ColumnSection, iso_date, plain_name
from mpc_fl.errors import DataError, printable
from mpc_fl.learning.data.table_files import TableFile

DecimalMark = Literal[".", ","]
_MARKS: tuple[DecimalMark, ...] = (".", ",")
OUTSIDE = "outside of its range, cut off"  # how a treatment ends that `survey` warns of
_NAMED = 5  # columns that a message names
_LONGEST_NAME = 60
_DAYS_PER_YEAR = 365.25
_MISSING = frozenset(
    ("", "-", "--", ".", "?", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "missing", "k.a.", "#nv")
)
_NUMBER = re.compile(
    r"(?P<limit>[<>≤≥]?=?)\s*(?P<value>[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"
)
_WHOLE = re.compile(r"[+-]?[0-9]+(?:[.,]0*)?")  # as spreadsheets write numbers of a column with gaps: 4711.0
_MANY_NUMBERS = 20  # more of them, among so many patients, are hardly values of something
_THOUSANDS = re.compile(
    r"[+-]?[1-9][0-9]{0,2}[.,][0-9]{3}"
)  # may be one number with a decimal mark, or another without
_UNIT = re.compile(r"(?P<name>.*\S)\s*(?:\[(?P<square>[^][]*)\]|\((?P<round>[^()]*)\))")
_YEAR_FIRST = re.compile(r"([0-9]{4})[-/.]([0-9]{1,2})[-/.]([0-9]{1,2})|([0-9]{4})([0-9]{2})([0-9]{2})")
_YEAR_LAST = re.compile(r"([0-9]{1,2})[-/.]([0-9]{1,2})[-/.]([0-9]{4})")
_TIME_OF_DAY = re.compile(r"[ T][0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?Z?\Z")
# How columns are called that tell patients apart; what is so called and the same for two patients is none.
_IDENTIFIER = re.compile(
    r"unnamed.*|(.*[ _.-])?(id|ids|pid|mrn|ssn|uid|uuid|guid|identifier|accession|key)|(id|pid|mrn)[ _.-].*"
    r"|(patient|case|record|row|index|sample|subject|study|visit|insurance|nhs|serial|accession|medical.record|fall)?"
    r"[ _.-]*(no|nr|num|number|nummer|code)?\.?|.*(surname|patient.?name|(first|last|family|given|full).?name)|name|patientid"
)


@dataclass(frozen=True)
class EncodedRows:
    """Features of the rows that are kept, float64 (rows, features), where these stand in the file, and what was done to each.

    `mark` parts decimals; `left_out` says why other rows are not kept.
    """

    features: np.ndarray
    kept: list[int]
    mark: DecimalMark
    treatments: list[list[str]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)


def on_log_scale(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|), which looks at no patient."""
    scaled: np.ndarray = np.sign(values) * np.log1p(np.abs(values))
    return scaled


def in_range(values: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """4 sqrt((x - low) / (high - low)) - 2, clipped to [-2, 2]; the root because laboratory values are skewed."""
    scaled: np.ndarray = 4.0 * np.sqrt(np.clip((values - low) / (high - low), 0.0, 1.0)) - 2.0
    return scaled


# ---- Names -------------------------------------------------------------------------------------------------------------


def place_of_column(file: TableFile, name: str) -> int | None:
    """Where a column stands, None where it does not."""
    plain = [plain_name(each) for each in file.header]
    return plain.index(plain_name(name)) if plain_name(name) in plain else None


def places_of_columns(file: TableFile, columns: Sequence[ColumnSection], others: Collection[str]) -> list[int]:
    """Where each agreed column stands, whatever the order; `others` may stand there too, with a unit or without.

    A header may name the unit in brackets. Raises `DataError` naming columns that are missing, that nobody agreed on, or whose
    unit is another.
    """
    known, plain = {plain_name(column.name): column for column in columns}, {plain_name(name) for name in others}
    places, extra = dict[str, int](), list[str]()
    for place, header in enumerate(file.header):
        name = plain_name(header)
        split = _UNIT.fullmatch(header)
        if name not in known and name not in plain and split is not None:
            name = plain_name(split["name"])
            column, unit = known.get(name), split["square"] or split["round"] or ""
            if column is None or column.unit is None:
                name = name if column is None and name in plain else ""
            elif _plain_unit(column.unit) != _plain_unit(unit):
                raise DataError(
                    f"{file.path} has column '{column.name}' in '{printable(unit, 20)}', agreed is '{column.unit}'",
                    "convert it at this site, or agree on another unit in data.table.columns",
                )
        if name in places:
            raise DataError(f"{file.path} has the column '{known[name].name}' twice", "rename or remove one")
        if name in known:
            places[name] = place
        elif name not in plain:
            extra.append(header)
    missing = [column.name for name, column in known.items() if name not in places]
    if missing or extra:
        what = [f"lacks {_quoted(missing)}"] if missing else []
        what += [f"has {_quoted(extra)}, which data.table.columns does not name"] if extra else []
        fix = "rename columns as agreed" if missing else "leave them out at all sites with data.table.identifiers"
        raise DataError(f"{file.path} {' and '.join(what)}", f"{fix}, or agree on other data.table.columns")
    return [places[name] for name in known]


def name_and_unit(header: str) -> tuple[str, str | None]:
    """What a header that may name a unit in brackets says: `crp [mg/l]`."""
    split = _UNIT.fullmatch(header)
    unit = "" if split is None else (split["square"] or split["round"] or "").strip()
    return (header, None) if split is None or not unit else (split["name"], unit)


def _plain_unit(unit: str) -> str:
    # Not in lower case: mU and MU differ.
    return "".join(unit.split()).replace("µ", "μ").replace("L", "l")  # the micro sign and the Greek letter look alike


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{printable(name, _LONGEST_NAME)}'" for name in names[:_NAMED]) + more


def called_like_identifier(name: str) -> bool:
    """Whether a column is called as those are that tell patients apart."""
    return _IDENTIFIER.fullmatch(plain_name(name)) is not None


def require_no_identifier(file: TableFile, places: Sequence[int], patients: Sequence[str]) -> None:
    """Raise `DataError` for a column that is called like an identifier and is another for every patient, or for most of many.

    Some cells may be empty, and where nothing says whose rows are, rows of one patient have one number.
    """
    people = len(set(patients))
    called = [place for place in places if called_like_identifier(file.header[place])]
    for place in called if people > 1 else ():
        cells = {cells[place] for _, cells in file.rows if cells[place].casefold() not in _MISSING}
        whole_or_text = all(_WHOLE.fullmatch(cell) or not _NUMBER.fullmatch(cell) for cell in cells)
        most = len(cells) > _MANY_NUMBERS and 2 * len(cells) > people
        if whole_or_text and (len(cells) >= people or most):
            raise DataError(
                f"{file.path}: column {_quoted([file.header[place]])} looks like an identifier, another for every patient",
                "name it in data.table.identifiers, or rename it",
            )


# ---- Cells -------------------------------------------------------------------------------------------------------------


def decimal_mark(file: TableFile, places: Sequence[int]) -> DecimalMark:
    """What parts decimals in the columns of numbers: a comma where there is one. Raises `DataError` where it is not sure."""
    lines, sure = dict[DecimalMark, int](), set[DecimalMark]()
    for line, cells in file.rows:
        for match in filter(None, (_NUMBER.fullmatch(cells[place]) for place in places)):
            for mark in _MARKS:
                if mark in match["value"]:
                    lines.setdefault(mark, line)
                    sure |= set() if _THOUSANDS.fullmatch(match["value"]) else {mark}
    if len(lines) > 1:
        raise DataError(
            f"{file.path} has numbers with a decimal point (line {lines['.']}) and with a comma (line {lines[',']})",
            "write them alike, without thousands separators",
        )
    found: DecimalMark = "," if "," in lines else "."
    # Whoever has decimal commas parts cells with semicolons; the other mark there may part thousands.
    unusual = "." if file.delimiter == ";" else ","
    if found in lines and found not in sure and found == unusual:
        raise DataError(
            f"{file.path} line {lines[found]}: '{found}' comes before three digits in all numbers, and may part decimals or "
            "thousands",
            "write numbers without thousands separators, and one with other decimals",
        )
    return found


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value."""
    return cell.casefold() in _MISSING


def looks_like_number(cell: str) -> bool:
    """Whether a cell is a number, or a limit of one, with any decimal mark."""
    return _NUMBER.fullmatch(cell) is not None


def number_of(cell: str, mark: DecimalMark, censored: str = "error") -> float:
    """A number as the file writes it. Raises `ValueError` with a reason in a few words."""
    match = _NUMBER.fullmatch(cell)
    if match is None or {".": ",", ",": "."}[mark] in match["value"]:
        raise ValueError("holds no number")
    value = float(match["value"].replace(",", "."))
    if not np.isfinite(value):
        raise ValueError("holds no number")
    if match["limit"] and censored == "error":
        raise ValueError("holds a limit; say with `censored` of the column what it is")
    return value / 2 if match["limit"] and censored == "half" and match["limit"][0] in "<≤" else value


def encode_rows(
    file: TableFile, columns: Sequence[ColumnSection], places: Sequence[int], may_leave_out: bool
) -> EncodedRows:
    """Rows as features, column after column as `ColumnSection` says. Raises `DataError` naming line and column of a bad cell.

    `may_leave_out` false: a row that would be left out for a missing value is an error, since somebody asks about it.
    """
    numbers = [place for column, place in zip(columns, places, strict=True) if column.kind == "number"]
    reader = _Cells(decimal_mark(file, numbers))
    features, kept, treatments, left_out = list[list[float]](), list[int](), list[list[str]](), dict[int, str]()
    for row, (line, cells) in enumerate(file.rows):
        values, done = list[float](), list[str]()
        for column, place in zip(columns, places, strict=True):
            if column.missing == "leave_out" and may_leave_out and reader.lacks(cells[place], column):
                left_out[row] = f"rows without '{column.name}'"
                break
            try:
                values += reader.encoded(cells[place], column, done)
            except ValueError as error:
                raise DataError(
                    f"{file.path} line {line}: column '{column.name}' {error}",
                    "correct the cell or remove the row, or agree on more in data.table.columns",
                ) from None
        else:
            features.append(values)
            kept.append(row)
            treatments.append(done)
    shape = (len(kept), sum(column.size for column in columns))
    return EncodedRows(np.array(features).reshape(shape), kept, reader.mark, treatments, left_out)


@dataclass(frozen=True)
class _Cells:
    """Cells of one file as features."""

    mark: DecimalMark
    categories: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def lacks(self, cell: str, column: ColumnSection) -> bool:
        """Whether there is no value; a category may be called like a mark of missing ones."""
        return is_missing(cell) and plain_name(cell) not in self._places(column)

    def encoded(self, cell: str, column: ColumnSection, done: list[str]) -> list[float]:
        """The features of a cell; what was done to it is added to `done`. Raises `ValueError`."""
        indicator, mark = [0.0] if column.missing == "indicator" else [], self.mark
        if self.lacks(cell, column):
            if column.missing == "indicator":
                done.append(f"without '{column.name}', marked so")
                return [0.0] * (column.size - 1) + [1.0]
            if column.fill is None:
                raise ValueError("has no value")
            done.append(f"without '{column.name}', filled")
            cell, mark = column.fill, "."
        if column.kind == "category":
            place = self._places(column).get(plain_name(cell))
            if place is None:
                raise ValueError("holds none of its categories")
            return [float(place == other) for other in range(len(column.categories))] + indicator
        if column.kind == "boolean":
            if plain_name(cell) not in TRUTH_WORDS:
                raise ValueError("holds neither true nor false")
            return [1.0 if TRUTH_WORDS[plain_name(cell)] else -1.0, *indicator]
        value = years_of(cell, column) if column.kind == "date" else number_of(cell, mark, column.censored)
        if column.kind == "number" and cell[0] in "<>≤≥":
            done.append(f"'{column.name}' beyond a limit, {'half of it' if column.censored == 'half' else 'the limit'}")
        if column.range is None:
            return [float(on_log_scale(np.array(value))), *indicator]
        if not column.range[0] <= value <= column.range[1]:
            done.append(f"'{column.name}' {OUTSIDE}")
        return [float(in_range(np.array(value), *column.range)), *indicator]

    def _places(self, column: ColumnSection) -> Mapping[str, int]:
        if column.name not in self.categories:
            self.categories[column.name] = {plain_name(name): place for place, name in enumerate(column.categories)}
        return self.categories[column.name]


def years_of(cell: str, column: ColumnSection) -> float:
    """Years from `since` to a date, below 0 before it; a time of day is cut off. Raises `ValueError`."""
    text = _TIME_OF_DAY.sub("", cell)
    first, last = _YEAR_FIRST.fullmatch(text), _YEAR_LAST.fullmatch(text)
    if last is not None and column.order == "year_month_day":
        raise ValueError("holds a date with the year last; say with `order` which is the month")
    try:
        if first is not None:
            year, month, day = (int(part) for part in first.groups() if part is not None)
        elif last is not None:
            day, month, year = map(int, last.groups())
            if column.order == "month_day_year":
                day, month = month, day
        else:
            raise ValueError
        date = datetime.date(year, month, day)
    except ValueError:
        raise ValueError("holds no date") from None
    assert column.since is not None  # `ColumnSection` saw to it
    return (date - iso_date(column.since)).days / _DAYS_PER_YEAR
