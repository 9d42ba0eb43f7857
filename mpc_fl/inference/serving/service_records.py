"""What a party that stays up keeps of the hospitals it served: one database in its directory, `service.sqlite3`.

`usage` holds a row for each batch that was charged, `sessions` one for each session that began, both with the time in seconds
since 1970; a model owner's processes on one machine share it. `usage.jsonl` of an earlier version is taken over once: its
charges are in the database, and `taken_over` says so, before the file gets another name. A crash in between, or another process
at the same time, adds nothing twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.database.database import Database
from mpc_fl.database.schema import ChainedTable, Schema
from mpc_fl.errors import MpcFlError
from mpc_fl.roles import is_hospital

RECORDS_FILE = "service.sqlite3"
EARLIER_USAGE = "usage.jsonl"
TAKEN_OVER_SUFFIX = ".taken-over-"  # and the first digits of the file's digest

USAGE = ChainedTable("usage", (("time", float), ("hospital", str), ("images", int)))
SESSIONS = ChainedTable("sessions", (("time", float), ("hospital", str)))
TAKEN_OVER = ChainedTable("taken_over", (("file", str), ("sha256", str)))

RESTORE = "restore it; deleting it lets every hospital begin again"
_SCHEMA = Schema(0x6D706353, ((USAGE, SESSIONS, TAKEN_OVER),), RESTORE)  # "mpcS"
_MOST_IMAGES = 2**31


def open_records(directory: Path, keeper: str) -> Database:
    """The database of the party `keeper`, which writes in `directory`; close it.

    Raises `StorageError` when it cannot be used, `MpcFlError` when the file of an earlier version is damaged, or a process of
    that version is still serving.
    """
    records = Database(directory / RECORDS_FILE, _SCHEMA, keeper)
    try:
        _take_over(records, directory / EARLIER_USAGE)
    except BaseException:
        records.close()
        raise
    return records


def _take_over(records: Database, path: Path) -> None:
    taken, usage = ChainedRows(records, TAKEN_OVER), ChainedRows(records, USAGE)
    with records.writing() as transaction:
        content = _earlier_content(path)
        if content is None:
            return
        digest = hashlib.sha256(content).hexdigest()
        known = [row.values for row in taken.read(transaction)]
        if (EARLIER_USAGE, digest) not in known:
            usage.read(transaction)
            for charge in _earlier_charges(path, content):
                usage.append(transaction, *charge)
            taken.append(transaction, EARLIER_USAGE, digest)
    with contextlib.suppress(FileNotFoundError):  # another process came first
        path.rename(path.with_name(path.name + TAKEN_OVER_SUFFIX + digest[:8]))


def _earlier_content(path: Path) -> bytes | None:
    """What the file of an earlier version holds, if it is there and no process of that version adds to it."""
    try:
        with path.with_name(f"{path.name}.lock").open("w") if path.exists() else contextlib.nullcontext() as lock:
            if lock is None:
                return None
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path.read_bytes()
    except FileNotFoundError:
        return None
    except BlockingIOError:
        raise MpcFlError(
            f"a process of an earlier version is serving in {path.parent}", "end it, or choose another directory"
        ) from None
    except OSError as error:
        raise MpcFlError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None


def _earlier_charges(path: Path, content: bytes) -> list[tuple[float, str, int]]:
    """The charges of all whole lines, oldest first; a last line without end was cut off by a crash and counts as none."""
    try:
        lines = content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines()
        return sorted(_earlier_charge(json.loads(line)) for line in lines if line)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise MpcFlError(f"{path} is damaged", RESTORE) from None


def _earlier_charge(line: dict[str, Any]) -> tuple[float, str, int]:
    time, hospital, images = float(line["time"]), line["hospital"], line["images"]
    if (
        not math.isfinite(time)
        or type(images) is not int
        or not 1 <= images < _MOST_IMAGES
        or not is_hospital(hospital)
    ):
        raise ValueError
    return time, hospital, images
