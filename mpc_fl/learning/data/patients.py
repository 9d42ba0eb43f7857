"""Whose a record is. What privacy counts by and what is never split hangs on it, so nothing is guessed.

Of an image says it, in this order: the table DIR/patients.csv, the header of a DICOM file, the pattern of the configuration for
names of files. With a table no other source is asked: the same patient under two names would be two. PatientID is read inside the
site and kept as a keyed hash alone (HMAC-SHA256 under a key that only this site has), which tells patients apart and nothing
else. What is left is refused, or counts by itself where `data.unit` is `image`; but for files that cannot be read at all, which
are left out and counted, whoever's they are.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from mpc_fl.config.columns import plain_name
from mpc_fl.config.config import Config
from mpc_fl.crypto.identity_files import read_private
from mpc_fl.errors import DataError, IdentityError, MpcFlError
from mpc_fl.files import written_whole
from mpc_fl.learning.data.attributes import Attributes
from mpc_fl.learning.data.dicom_files import patient_identifier
from mpc_fl.learning.data.file_kinds import DICOM, UnreadableImageError, kind_of
from mpc_fl.learning.data.image_files import ImageForm, WrongSizeError, read_image
from mpc_fl.learning.data.spellings import in_one_spelling
from mpc_fl.learning.data.table_files import read_table_file

TABLE_FILE = "patients.csv"
FROM_TABLE, FROM_HEADER, FROM_NAME, BY_ITSELF = TABLE_FILE, "headers", "names of files", "each by itself"
UNREADABLE = "nothing, and cannot be read"
_OTHER_TABLES = tuple(f"patients.{suffix}" for suffix in ("csv.txt", "txt", "tsv", "xlsx", "xls", "ods"))
_KEY_BYTES = 32
_HASH_DIGITS = 16
_FOLDERS = {
    "train": "train",
    "validation": "train",
    "test": "test",
}  # of each split: who validates lies with who trains
_FIX = f"give DIR/{TABLE_FILE} (columns file, patient), set data.patient_pattern, or accept privacy per image with data.unit=image"


@dataclass(frozen=True)
class Owners:
    """The patient key of each file, and where it comes from."""

    keys: list[str]
    sources: list[str]


@dataclass(frozen=True)
class PatientRow:
    """A row of the table: whose a file is, and what may stand beside it ('' where it does not)."""

    patient: str
    sex: str = ""
    age: str = ""
    scanner: str = ""
    split: str = ""


def owners_of(files: Sequence[Path], config: Config) -> Owners:
    """Whose each image file is. Of DICOM files that no table names headers are read, without pixels.

    Raises `DataError` for a damaged table, or readable files of which nothing says whose they are while `data.unit` is `patient`.
    """
    root = config.site.data or Path()
    table, keys, sources = read_table(root), list[str](), list[str]()
    unknown: list[Path] = []
    patients = config.data.unit == "patient"
    headers = _Headers(config)
    for path in files:
        place = PurePosixPath(*path.relative_to(root).parts)
        key, source = _owner(path, place, table, config, headers)
        if key is None:
            unknown.append(path)
            # By its place in the folder: in two splits two files of one name are two images.
            key, source = str(place), UNREADABLE if patients else BY_ITSELF
        keys.append(key)
        sources.append(source)
    known = [row for row, source in enumerate(sources) if source not in (BY_ITSELF, UNREADABLE)]
    for row, key in zip(known, in_one_spelling([keys[row] for row in known]), strict=True):
        keys[row] = key
    if patients and any(_can_be_read(path, config) for path in unknown):
        what = "no patient is known of" if table is None else f"{TABLE_FILE} does not name"
        raise DataError(
            f"{what} {len(unknown)} of {len(files)} images, the first {unknown[0]}",
            _FIX if table is None else "complete the table, or remove it",
        )
    return Owners(keys, sources)


def attributes_of_files(files: Sequence[Path], config: Config) -> list[Attributes]:
    """What the table says of each image file beside whose it is; nothing where there is no table. Raises as `owners_of`."""
    root = config.site.data or Path()
    table, found = read_table(root), list[Attributes]()
    for path in files:
        row = None if table is None else table.row_of(PurePosixPath(*path.relative_to(root).parts))
        found.append(Attributes() if row is None else Attributes(row.sex, row.age, row.scanner))
    return found


def _can_be_read(path: Path, config: Config) -> bool:
    try:
        read_image(path, ImageForm.of(config.data))
    except UnreadableImageError:
        return False
    except WrongSizeError:
        pass
    return True


def _owner(
    path: Path, place: PurePosixPath, table: PatientTable | None, config: Config, headers: _Headers
) -> tuple[str | None, str]:
    if table is not None:
        row = table.row_of(place)
        return (None if row is None else row.patient), FROM_TABLE
    patient = headers.patient(path)
    if patient is not None:
        return patient, FROM_HEADER
    pattern = config.data.patient_pattern
    match = None if pattern is None else re.match(pattern, path.name)
    return (match.group(1) or None) if match is not None else None, FROM_NAME


class _Headers:
    """What stands for the patients of DICOM files. The site's key is read, or made, when the first file is asked."""

    def __init__(self, config: Config) -> None:
        self._place = config.site.patient_key
        self._key: bytes | None = None

    def patient(self, path: Path) -> str | None:
        """The keyed hash of a file's PatientID; None where it has none, or is no readable DICOM file."""
        try:
            status = path.stat()
            if not _is_dicom(path, status.st_mtime_ns, status.st_size):
                return None
        except (OSError, UnreadableImageError):
            return None  # counted when it is to be read
        if self._key is None:
            self._key = site_key(self._place)
        return _hashed(path, status.st_mtime_ns, status.st_size, self._key)


@functools.lru_cache(maxsize=1 << 20)
def _is_dicom(path: Path, changed: int, size: int) -> bool:
    """By its first bytes, as it will be read: what a suffix says changes nothing about whose it is."""
    return kind_of(path) == DICOM


@functools.lru_cache(maxsize=1 << 20)
def _hashed(path: Path, changed: int, size: int, key: bytes) -> str | None:
    """Of a file as it was last changed: a run asks several times, and reading a header takes a millisecond."""
    identifier = patient_identifier(path)
    if identifier is None:
        return None
    return "patient-" + hmac.new(key, f"\0{identifier}".encode(), hashlib.sha256).hexdigest()[:_HASH_DIGITS]


def site_key(place: Path | None) -> bytes:
    """The key of this site, 32 bytes, from `site.patient_key`, else $XDG_STATE_HOME/mpc-fl/patient.key; made where it is missing.

    Raises `DataError` for a damaged file, and when it can be neither read nor made.
    """
    try:
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        path = place or (state if state.is_absolute() else Path.home() / ".local" / "state") / "mpc-fl" / "patient.key"
        if not path.exists():
            with written_whole(path, once=True) as temporary:
                temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
        key = read_private(path)
    except IdentityError as error:
        raise DataError(error.what, error.fix) from None
    except (OSError, RuntimeError, MpcFlError):
        raise DataError("the key that patients' identifiers are hashed with cannot be read or made",
                        "name a file for it with site.patient_key") from None  # fmt: skip
    if len(key) != _KEY_BYTES:
        raise DataError(f"{path} is no key of {_KEY_BYTES} bytes", "remove it, and another one is made")
    return key


@dataclass(frozen=True)
class PatientTable:
    """Rows by the path of a file below DIR, or by its name alone. `read_as`: how the file was read, in some words."""

    path: Path
    rows: dict[str, PatientRow]
    read_as: str

    def row_of(self, place: PurePosixPath) -> PatientRow | None:
        """The row of a file at DIR/`place`. Raises `DataError` where its split is another than that of its folder."""
        row = self.rows.get(str(place)) or self.rows.get(place.name)
        if row is not None and row.split and _FOLDERS[row.split] != place.parts[0]:
            raise DataError(
                f"{self.path} says that {place} is for '{row.split}', and it lies in '{place.parts[0]}'",
                "move it, or correct the row",
            )
        return row


def read_table(root: Path) -> PatientTable | None:
    """DIR/patients.csv with the columns file and patient, and perhaps sex, age, scanner and split; None without one.

    It is read like every table (`table_files`). Raises `DataError` naming the line of the first mistake.
    """
    path = root / TABLE_FILE
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        _require_no_other_table(root)
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    table = read_table_file(path, ("file", "patient"))
    header = [plain_name(name) for name in table.header]
    for column in ("file", "patient"):
        if column not in header:
            raise DataError(f"{path} needs one column '{column}'", "its first line names the columns: file, patient")
    rows: dict[str, PatientRow] = {}
    for line, cells in table.rows:
        values = dict(zip(header, cells, strict=True))
        file, row = values["file"].replace("\\", "/").removeprefix("./"), _row(values, path, line)
        if rows.setdefault(file, row) != row:
            raise DataError(f"{path} line {line} names a file again, with another patient", "leave one of the rows")
    return PatientTable(path, rows, table.described)


def _require_no_other_table(root: Path) -> None:
    """Raise `DataError` for a table of patients under another name: passed over, one patient would count as several."""
    try:
        names = os.listdir(root)
    except OSError:  # said where the data are read
        return
    for name in names:
        if name.casefold() in _OTHER_TABLES or name.casefold() == TABLE_FILE:
            raise DataError(
                f"{root} holds {name}, and only {TABLE_FILE} is read", f"save it as {TABLE_FILE}, or remove it"
            )


def _row(values: dict[str, str], path: Path, line: int) -> PatientRow:
    if not values["file"] or not values["patient"]:
        raise DataError(f"{path} line {line} lacks a file or a patient", "fill or remove the row")
    beside = {name: values.get(name, "") for name in ("sex", "age", "scanner", "split")}
    if beside["split"] not in ("", *_FOLDERS):
        raise DataError(f"{path} line {line}: the split is none of {', '.join(_FOLDERS)}", "correct the row")
    return PatientRow(values["patient"], **beside)


def owners_in_archive(path: Path, split: str, count: int) -> list[str] | None:
    """The array `<split>_patients` of a .npz archive, one whole number or text a record; None where there is none.

    Raises `DataError` for an array that cannot be.
    """
    name = f"{split}_patients"
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if name not in archive:
                return None
            values = archive[name]
    except (OSError, ValueError, TypeError, EOFError, LookupError, MemoryError, AttributeError):
        raise DataError(f"the array {name} of {path} cannot be read", "store whole numbers or texts in it") from None
    if values.size != count or values.dtype.kind not in "iuUS":
        raise DataError(f"the array {name} of {path} is not one whole number or text a record", "correct it")
    return in_one_spelling([str(value) for value in values.reshape(count).tolist()])


def require_known(count: int, config: Config) -> None:
    """Raise `DataError` for `count` records of a table or archive whose patients nothing names, unless the unit is the image."""
    if config.data.unit == "patient":
        fix = (
            "set data.table.patient_column"
            if config.data.source == "csv"
            else "store arrays train_patients, test_patients"
        )
        raise DataError(
            f"nothing says which of the {count} records are of one patient",
            f"{fix}, or accept privacy per record with data.unit=image",
        )
