"""What the columns of a table may be, guessed from its names and cells, for a first configuration that a person looks over. Pure.

The configuration goes to all hospitals, so nothing is guessed that tells of single patients: no range is taken from values, and no
name of a category or class that few rows have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpc_fl.config.columns import TRUTH_WORDS, ColumnSection, plain_name
from mpc_fl.learning.data.table_columns import (
    DecimalMark,
    called_like_identifier,
    decimal_mark,
    is_missing,
    looks_like_number,
    name_and_unit,
    number_of,
    years_of,
)
from mpc_fl.learning.data.table_files import TableFile

FEWEST_ROWS = 5  # that have a name which is written down
_MOST_CATEGORIES = 12
_LONGEST_CATEGORY = 40
_LONGEST_NAME = 100
_LABEL = re.compile(r"label|class|target|outcome|diagnosis|diagnose|finding|befund|klasse|y")
_PATIENT = re.compile(
    r"(patient|patienten|pat|subject|person|proband)[ _.-]*(id|no|nr|num|number|nummer|code|key)?\.?|pid"
)
_SINCE = "2000-01-01"
_ORDERS: tuple[Literal["year_month_day", "day_month_year", "month_day_year"], ...] = (
    "year_month_day", "day_month_year", "month_day_year",
)  # fmt: skip


@dataclass(frozen=True)
class GuessedTable:
    """What a table may hold: its classes, the columns of class and patient where their names say it, and what the others are.

    `left_out`: columns that tell patients apart, hold free text or nothing.
    """

    classes: tuple[str, ...]
    label_column: str | None
    patient_column: str | None
    columns: tuple[ColumnSection, ...]
    left_out: tuple[str, ...]


def guess_table(file: TableFile, label_column: str | None = None) -> GuessedTable:
    """Guess what a table holds; `label_column` where it is known. Raises `DataError` where its decimal mark is not sure."""
    label = _first(file.header, _LABEL)
    if label_column is not None:
        label = next((name for name in file.header if plain_name(name) == plain_name(label_column)), None)
    patient = _first([name for name in file.header if name != label], _PATIENT)
    places = [place for place, name in enumerate(file.header) if name not in (label, patient)]
    given = {place: [cells[place] for _, cells in file.rows if not is_missing(cells[place])] for place in places}
    numbers = [place for place in places if given[place] and all(map(looks_like_number, given[place]))]
    mark = decimal_mark(file, numbers)
    columns, left_out = list[ColumnSection](), list[str]()
    for place in places:
        some_missing = len(given[place]) < len(file.rows)
        column = _guessed(file.header[place], given[place], mark, some_missing)
        if column is None:
            left_out.append(file.header[place])
        else:
            columns.append(column)
    classes = () if label is None else _frequent([cells[file.header.index(label)] for _, cells in file.rows])
    return GuessedTable(classes, label, patient, tuple(columns), tuple(left_out))


def _first(names: Sequence[str], pattern: re.Pattern[str]) -> str | None:
    return next((name for name in names if pattern.fullmatch(plain_name(name))), None)


def _guessed(header: str, cells: Sequence[str], mark: DecimalMark, some_missing: bool) -> ColumnSection | None:
    """The column, or None for one that is better left out. `cells`: those with a value."""
    name, unit = name_and_unit(header)
    if not cells or len(name) > _LONGEST_NAME or not name.isprintable() or called_like_identifier(header):
        return None
    missing: Literal["error", "indicator"] = "indicator" if some_missing else "error"
    different = {plain_name(cell) for cell in cells}
    if len(different) > 1 and different <= set(TRUTH_WORDS):
        return ColumnSection(name=header, kind="boolean", missing=missing)
    if _are_numbers(cells, mark):
        censored: Literal["error", "half"] = "half" if any(cell[0] in "<>≤≥" for cell in cells) else "error"
        return ColumnSection(name=name, unit=unit, missing=missing, censored=censored)
    for order in _ORDERS:
        date = ColumnSection(name=header, kind="date", since=_SINCE, order=order, missing=missing)
        if _are_dates(cells, date):
            return date
    categories = _frequent(cells)
    if len(categories) > 1 and len(different) <= _MOST_CATEGORIES:
        return ColumnSection(name=header, kind="category", categories=categories, missing=missing)
    return None


def _are_numbers(cells: Sequence[str], mark: DecimalMark) -> bool:
    try:
        return all(number_of(cell, mark, "limit") is not None for cell in cells)
    except ValueError:
        return False


def _are_dates(cells: Sequence[str], column: ColumnSection) -> bool:
    try:
        return all(years_of(cell, column) is not None for cell in cells)
    except ValueError:
        return False


def _frequent(cells: Sequence[str]) -> tuple[str, ...]:
    """Short texts that at least `FEWEST_ROWS` rows have, in order, each as it is written first."""
    written, count = dict[str, str](), Counter(map(plain_name, cells))
    for cell in cells:
        written.setdefault(plain_name(cell), cell)
    kept = (text for name, text in written.items() if count[name] >= FEWEST_ROWS and not is_missing(text))
    return tuple(sorted(text for text in kept if len(text) <= _LONGEST_CATEGORY and text.isprintable()))
