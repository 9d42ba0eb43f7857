"""The rows of a privacy ledger in its database, and ledgers of earlier versions, which are taken over.

A row is an entry that is never changed: `charge` adds a record; `release` marks the one with a reservation's number as
released; `replace` takes a reserved one away. What they add up to is the list of records that `PrivacyLedger` works with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpc_fl.database.chained_rows import ChainedRows, Row
from mpc_fl.database.database import Database, Transaction
from mpc_fl.database.schema import ChainedTable, Schema
from mpc_fl.database.taking_over import TAKEN_OVER, earlier_content, take_over
from mpc_fl.errors import PrivacyBudgetError, StorageError
from mpc_fl.learning.privacy.accounting import Event, SubsampledGaussian, Unprotected
from mpc_fl.parsing import parse_json

RESTORE = "restore it from a backup; without it the budget spent is unknown, so nothing is released"
SECOND_FORMAT = "mpc-fl privacy ledger 2"
FIRST_FORMAT = "mpc-fl privacy ledger 1"  # without numbers of reservations, and without runs that have no privacy

_ENTRIES = ChainedTable("entries", (("entry", str), ("reservation", str), ("record", str)))
_SCHEMA = Schema(0x6D706350, ((_ENTRIES, TAKEN_OVER),), RESTORE)  # "mpcP"
_PATIENCE = 120.0  # seconds: while it is locked, another run may compute its epsilon

Record = dict[str, Any]


class LedgerRows:
    """The entries of an open ledger within one transaction, and `records`, what they add up to."""

    def __init__(self, transaction: Transaction, rows: ChainedRows) -> None:
        self._transaction, self._rows = transaction, rows
        self.entries: Sequence[Row] = rows.read(transaction)
        self.records = _records_of(self.entries)

    def charge(self, record: Record) -> None:
        """Add a record."""
        self._enter("charge", record.get("number", ""), json.dumps(record))

    def release(self, number: str) -> None:
        """The record with this reservation is released."""
        self._enter("release", number, "")

    def replace(self, number: str) -> None:
        """The record with this reservation counts no more."""
        self._enter("replace", number, "")

    def _enter(self, entry: str, number: str, record: str) -> None:
        self._rows.append(self._transaction, entry, number, record)


def _records_of(entries: Sequence[Row]) -> list[Record]:
    found: list[Record | None] = []
    places: dict[str, int] = {}
    for entry, number, text in (row.values for row in entries):
        if entry == "charge":
            record = parse_json(str(text))
            if number:
                places[str(number)] = len(found)
            found.append(record)
        elif entry == "release":
            found[places[str(number)]] = {**(found[places[str(number)]] or {}), "released": True}
        else:
            found[places.pop(str(number))] = None
    return [record for record in found if record is not None]


@contextlib.contextmanager
def opened(path: Path, who: str, writing: bool) -> Iterator[LedgerRows]:
    """The ledger of hospital `who` in the database `path`, made when there is none, within one transaction.

    A ledger in JSON, of an earlier version, that lies beside it is taken over first. Raises `StorageError`.
    """
    with Database(path, _SCHEMA, who, _PATIENCE) as database:
        earlier, rows = earlier_path(path), ChainedRows(database, _ENTRIES)

        def enter(transaction: Transaction, content: bytes) -> None:
            rows.read(transaction)
            for record in _earlier_records(earlier, content, who):
                rows.append(transaction, "charge", str(record.get("number", "")), json.dumps(record))

        take_over(database, earlier, enter)
        with database.writing() if writing else database.reading() as transaction:
            try:
                ledger = LedgerRows(transaction, rows)
            except (ValueError, LookupError, TypeError):
                raise StorageError(f"{path} holds an entry that no version writes", RESTORE) from None
            yield ledger


def earlier_path(path: Path) -> Path:
    """Where an earlier version kept the ledger."""
    return path.with_suffix(".json")


def has_ledger(path: Path) -> bool:
    """Whether there is a ledger at `path`, or one of an earlier version to take over. Raises `StorageError`."""
    try:
        return path.exists() or earlier_content(earlier_path(path)) is not None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None


def event_of(record: Any) -> Event:
    """What a record stands for. Raises `ValueError` for one that is no event."""
    try:
        if record.get("mechanism") == "none" and {"run", "time"} <= record.keys():
            return Unprotected()
        distance = record.get("total_variation", 0.0)  # ledgers of version 0.1 have none
        return SubsampledGaussian(record["noise_multiplier"], record["sample_rate"], record["steps"], distance)
    except (KeyError, TypeError, AttributeError, PrivacyBudgetError):
        raise ValueError("no event") from None


def checksum(hospital: Any, records: list[Any]) -> str:
    """What ledgers in JSON say of their content."""
    return hashlib.sha256(json.dumps([hospital, records], sort_keys=True).encode()).hexdigest()


def _earlier_records(path: Path, content: bytes, who: str) -> list[Record]:
    try:
        ledger = parse_json(content)
    except ValueError:
        raise StorageError(f"{path} is not JSON", RESTORE) from None
    if not isinstance(ledger, dict) or ledger.get("format") not in (SECOND_FORMAT, FIRST_FORMAT):
        raise StorageError(f"{path} is not of this format", RESTORE)
    hospital, records = ledger.get("hospital"), ledger.get("records")
    if not isinstance(records, list) or ledger.get("sha256") != checksum(hospital, records):
        raise StorageError(f"{path} does not match its checksum", RESTORE)
    if hospital != who:
        raise StorageError(f"{path} belongs to {hospital}", "check the path")
    try:
        for record in records:
            event_of(record)
    except ValueError:
        raise StorageError(f"{path} has a record that is not an event", RESTORE) from None
    # Programs of the first format sent before they marked: what they reserved, without a number, may have left.
    left = [record.get("released") is False and not isinstance(record.get("number"), str) for record in records]
    return [{**record, "released": True} if may else record for may, record in zip(left, records, strict=True)]
