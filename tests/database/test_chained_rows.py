"""Rows of a chain: whatever is edited, removed, cut off or put back is found, and a process forgets nothing that it has read."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.database.database import Database
from mpc_fl.database.schema import ChainedTable, Schema, Value
from mpc_fl.errors import StorageError

TABLE = ChainedTable("things", (("time", float), ("name", str), ("count", int)))
OTHER = ChainedTable("others", (("time", float), ("name", str), ("count", int)))
SCHEMA = Schema(7, ((TABLE, OTHER),), "restore it")


def opened(path: Path) -> Database:
    return Database(path, SCHEMA, "somebody", patience=2.0)


def add(database: Database, rows: ChainedRows, *counts: int) -> None:
    with database.writing() as transaction:
        rows.read(transaction)
        for count in counts:
            rows.append(transaction, count / 8, f"thing {count}", count)


def counts(database: Database, rows: ChainedRows) -> list[Value]:
    with database.reading() as transaction:
        return [row.values[2] for row in rows.read(transaction)]


def read_again(path: Path) -> list[Value]:
    with opened(path) as database:
        return counts(database, ChainedRows(database, TABLE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with opened(tmp_path / "things.sqlite3") as database:
        rows = ChainedRows(database, TABLE)
        add(database, rows, 0, 1, 2, 3, 4, 5)
        with database.writing() as transaction:
            rows.read(transaction)
            rows.forget(transaction, 2)
            rows.append(transaction, -0.0, "", -(2**62))
    return tmp_path / "things.sqlite3"


def test_rows_are_added_and_forgotten_and_those_of_another_process_are_read(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        here, there = ChainedRows(one, TABLE), ChainedRows(other, TABLE)
        assert counts(one, here) == counts(other, there) == [2, 3, 4, 5, -(2**62)]
        add(one, here, 7)
        add(other, there, 8)
        with other.writing() as transaction:
            there.forget(transaction, len(there.read(transaction)))
            there.append(transaction, 1.0, "last", 9)
        assert counts(one, here) == counts(other, there) == read_again(path) == [9]
        with one.writing() as transaction:
            here.forget(transaction, len(here.read(transaction)))
        assert counts(one, here) == counts(other, there) == read_again(path) == []
    with opened(path) as late:
        rows = ChainedRows(late, TABLE)
        with opened(path) as other:
            there = ChainedRows(other, TABLE)
            add(other, there, 1, 2)
            with other.writing() as transaction:
                there.forget(transaction, len(there.read(transaction)) - 1)
        assert counts(late, rows) == [2]  # it never read the one that was forgotten


@pytest.mark.parametrize("values", [(1, "a", 1), (1.0, b"a", 1), (1.0, "a", True), (float("nan"), "a", 1), (1.0, "a")])
def test_values_of_other_types_are_no_row(path: Path, values: tuple[Value, ...]) -> None:
    with opened(path) as database:
        rows = ChainedRows(database, TABLE)
        with pytest.raises(ValueError, match="no values of a row"), database.writing() as transaction:
            rows.read(transaction)
            rows.append(transaction, *values)
        with pytest.raises(ValueError, match="not read in this transaction"), database.writing() as transaction:
            rows.append(transaction, 1.0, "a", 1)
    assert len(read_again(path)) == 5


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE things SET count = 1 WHERE number = 5",
        "UPDATE things SET count = 'four' WHERE number = 5",
        "UPDATE things SET count = 4.5 WHERE number = 5",
        "UPDATE things SET time = time + 1e-9 WHERE number = 5",
        "UPDATE things SET name = CAST(name AS BLOB) WHERE number = 5",
        "UPDATE things SET name = CAST(x'ff' AS TEXT) WHERE number = 5",
        "UPDATE things SET digest = '' WHERE number = 5",
        "DELETE FROM things WHERE number = 3",
        "DELETE FROM things WHERE number = 5",
        "DELETE FROM things WHERE number = 7",
        "DELETE FROM things",
        "UPDATE things SET number = 17 WHERE number = 7",
        "INSERT INTO things SELECT 8, time, name, count, digest FROM things WHERE number = 7",
        "UPDATE things SET number = 100 - number",
        "DELETE FROM heads",
        "DELETE FROM heads WHERE chain = 'things'",
        "UPDATE heads SET last = 6",
        "UPDATE heads SET last = 6, digest = before",
        "UPDATE heads SET first = 1",
        "UPDATE heads SET first = 4",
        "UPDATE heads SET first = 8, before = digest WHERE chain = 'things' AND digest = before",
        "UPDATE heads SET first = 9, last = 8",
        "UPDATE heads SET before = digest",
        "UPDATE heads SET keeper = 'another'",
        "UPDATE heads SET chain = 'other' WHERE chain = 'things'",
        "UPDATE heads SET last = 'seven'",
    ],
)
def test_an_edit_is_found(path: Path, edit: str) -> None:
    before = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(edit)
        connection.commit()
    if path.read_bytes() == before:
        assert edit.startswith("UPDATE heads SET first = 8")  # there is no such head: nothing was edited
        return
    with pytest.raises(StorageError) as found:
        read_again(path)
    line = str(found.value)
    assert (
        "things.sqlite3" in line and ("is damaged or was edited" in line or "belongs to" in line) and "\n" not in line
    )


def test_rows_of_another_table_do_not_fit(path: Path) -> None:
    with opened(path) as database:
        add(database, ChainedRows(database, OTHER), 0, 1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM things")
        connection.execute("INSERT INTO things SELECT * FROM others")
        [[first, before, last, digest]] = connection.execute(
            "SELECT first, before, last, digest FROM heads WHERE chain = 'others'"
        )
        connection.execute(
            "UPDATE heads SET first = ?, before = ?, last = ?, digest = ? WHERE chain = 'things'",
            (first, before, last, digest),
        )
        connection.commit()
    with pytest.raises(StorageError, match="table things: it begins in another place"):
        read_again(path)


def test_an_older_copy_that_is_put_back_is_found_by_who_has_read_further(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "older")
    with opened(path) as database:
        rows = ChainedRows(database, TABLE)
        add(database, rows, 7, 8)
        assert len(counts(database, rows)) == 7
        path.write_bytes((tmp_path / "older").read_bytes())
        with pytest.raises(StorageError, match="ends at row 7 and had 9"):
            add(database, rows, 9)
    # Nobody who begins anew can know: a chain does not bind who can write the file.
    assert len(read_again(path)) == 5
