"""Tables as spreadsheets and clinics write them: encoding and delimiter are found, cells stay texts."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.config.columns import plain_name
from mpc_fl.errors import DataError

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_SERIAL = re.compile(r"[0-9]{1,18}")
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])\s*\Z")  # of spreadsheets, before the header
_READABLE = "give a CSV file with a header line, as text in UTF-8"


@dataclass(frozen=True)
class TableFile:
    """A file's column names, and the line number and cells of each row, without spaces around them, as many as names.

    `encoding` and `delimiter` (`,`, `;` or tab) are those that were found. `numbered`: a first column without a name that
    numbers the rows, as pandas writes it, was left out.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]
    encoding: str
    delimiter: str
    numbered: bool = False

    @property
    def described(self) -> str:
        """How it was read, in some words."""
        numbers = ", without the numbers of rows in its first column, which has no name" if self.numbered else ""
        return f"read as {self.encoding.upper()}, parted by {_DELIMITERS[self.delimiter]}{numbers}"


def read_table_file(path: Path, expected: Collection[str]) -> TableFile:
    """Read a table whose header has some of the `expected` names.

    UTF-8 and UTF-16 with or without a byte-order mark, else cp1252, of which Latin-1 is a part. Rows and unnamed columns without
    any value are left out, and a first column without a name that numbers the rows: whole numbers that rise. Raises `DataError`
    naming the first line that is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", _READABLE) from None
    if content.startswith(_SPREADSHEETS):
        raise DataError(f"cannot read {path}: it is a spreadsheet", "save it as CSV in UTF-8")
    encoding, text = _decoded(path, content)
    delimiter, lines = _parted(path, text, {plain_name(name) for name in expected})
    if len(lines) < 2:
        raise DataError(f"{path} has no rows", "give a CSV file with a header line and data")
    header = lines[0][1]
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{path} line {line} has {len(cells)} cells, the header {len(header)}",
                f"correct the row; cells with a {_DELIMITERS[delimiter]} need quotes",
            )
    # Spreadsheets write columns beside the table that somebody touched.
    kept = [place for place, name in enumerate(header) if name or any(cells[place] for _, cells in lines[1:])]
    numbered = 0 in kept and not header[0] and len(kept) > 1 and _rise([cells[0] for _, cells in lines[1:]])
    kept = kept[1:] if numbered else kept
    header = [header[place] for place in kept]
    plain = [plain_name(name) for name in header]
    if len(set(plain)) != len(plain):
        raise DataError(f"{path} has two columns of the same name", "rename or remove one")
    if "" in plain:
        raise DataError(f"{path} has a column without a name, number {kept[plain.index('')] + 1}", "name or remove it")
    rows = [(line, [cells[place] for place in kept]) for line, cells in lines[1:]]
    return TableFile(path, header, rows, encoding, delimiter, numbered)


def _rise(cells: Sequence[str]) -> bool:
    """Whether they are whole numbers, each above the one before: an index, of which rows may have been taken out."""
    if not all(_SERIAL.fullmatch(cell) for cell in cells):
        return False
    numbers = [int(cell) for cell in cells]
    return all(before < after for before, after in itertools.pairwise(numbers))


def _decoded(path: Path, content: bytes) -> tuple[str, str]:
    """Encoding and text."""
    marks = [(mark, name) for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)]
    encodings = [name for _, name in marks]
    if not marks and len(content) % 2 == 0 and 0 in content[:2]:  # UTF-16 without a mark: a letter of ASCII and a zero
        encodings = ["utf-16-be" if content[0] == 0 else "utf-16-le"]
    for encoding in encodings or ["utf-8", "cp1252"]:
        try:
            text = content[len(marks[0][0]) if marks else 0 :].decode(encoding)
        except UnicodeDecodeError:
            continue
        if not _NO_TEXT.search(text):
            return encoding, text
    raise DataError(f"cannot read {path}: it is no text in UTF-8, UTF-16 or cp1252", _READABLE)


def _parted(path: Path, text: str, expected: Collection[str]) -> tuple[str, list[tuple[int, list[str]]]]:
    """The delimiter with which the header has most expected names, else most cells; and all lines that hold anything."""
    first, _, _ = text.partition("\n")
    said = _SEPARATOR_LINE.match(first)
    if said:
        return said[1], _lines(path, text, said[1])[1:]
    found = {}
    for delimiter in _DELIMITERS:
        lines = _lines(path, text, delimiter, only_first=True)
        header = lines[0][1] if lines else []
        found[delimiter] = (sum(plain_name(name) in expected for name in header), len(header))
    delimiter = max(_DELIMITERS, key=found.__getitem__)
    return delimiter, _lines(path, text, delimiter)


def _lines(path: Path, text: str, delimiter: str, only_first: bool = False) -> list[tuple[int, list[str]]]:
    reader, lines = (
        csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True),
        list[tuple[int, list[str]]](),
    )
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                lines.append((reader.line_num, stripped))
            if lines and only_first:
                break
    except csv.Error:
        if only_first:  # of a delimiter that may be another
            return []
        raise DataError(
            f"cannot read {path} line {reader.line_num}: quotes do not match, or a cell is too long", _READABLE
        ) from None
    return lines
