"""What a party that stays up keeps of the hospitals it served: one database in its directory, `service.sqlite3`.

`usage` holds a row for each batch that was charged, `sessions` one for each session that began, both with the time in seconds
since 1970; a model owner's processes on one machine share it. `usage.jsonl` of an earlier version is taken over once: its
charges are in the database, and `taken_over` says so, before the file gets another name (`mpc_fl.database.taking_over`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.database.database import Database, Transaction
from mpc_fl.database.schema import ChainedTable, Schema
from mpc_fl.database.taking_over import TAKEN_OVER, take_over
from mpc_fl.errors import StorageError
from mpc_fl.parsing import parse_json_lines
from mpc_fl.roles import is_hospital

RECORDS_FILE = "service.sqlite3"
EARLIER_USAGE = "usage.jsonl"

USAGE = ChainedTable("usage", (("time", float), ("hospital", str), ("images", int)))
SESSIONS = ChainedTable("sessions", (("time", float), ("hospital", str)))

RESTORE = "restore it; deleting it lets every hospital begin again"
_SCHEMA = Schema(0x6D706353, ((USAGE, SESSIONS, TAKEN_OVER),), RESTORE)  # "mpcS"
_MOST_IMAGES = 2**31


def open_records(directory: Path, keeper: str) -> Database:
    """The database of the party `keeper`, which writes in `directory`; close it.

    Raises `StorageError` when it cannot be used, when the file of an earlier version is damaged, and when a process of that
    version is still serving.
    """
    records, earlier = Database(directory / RECORDS_FILE, _SCHEMA, keeper), directory / EARLIER_USAGE
    try:
        usage = ChainedRows(records, USAGE)

        def enter(transaction: Transaction, content: bytes) -> None:
            usage.read(transaction)
            for charge in _earlier_charges(earlier, content):
                usage.append(transaction, *charge)

        take_over(records, earlier, enter)
    except BaseException:
        records.close()
        raise
    return records


def _earlier_charges(path: Path, content: bytes) -> list[tuple[float, str, int]]:
    """The charges of all whole lines, oldest first; a last line without end was cut off by a crash and counts as none."""
    try:
        return sorted(_earlier_charge(line) for line in parse_json_lines(content))
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} is damaged", RESTORE) from None


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
