"""Rows of one table, in their order, in which an edit is found.

A view reads the whole chain once and checks every row against the one before and the last against the head; later it reads
what others have added since. So a process never forgets what it has read: a file that was put back to an older state while
it runs is refused. What a chain finds and what it cannot find is said in `database`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpc_fl.database.database import Database, Transaction
from mpc_fl.database.schema import ChainedTable, Value
from mpc_fl.errors import StorageError

_IN_ORDER = "SELECT number, {columns}, digest FROM {table} WHERE number > ? ORDER BY number"


@dataclass(frozen=True)
class Row:
    """A row: its number, and values in the order of the table's columns."""

    number: int
    values: tuple[Value, ...]
    digest: str


@dataclass(frozen=True)
class _Head:
    """Where a chain begins (row `first`, which follows `before`) and ends (row `last`, whose digest this is)."""

    first: int
    before: str
    last: int
    digest: str


class ChainedRows:
    """A process's view of `table` in `database`. Threads may share it: it is used within transactions alone."""

    def __init__(self, database: Database, table: ChainedTable) -> None:
        """Read and check all of it. Raises `StorageError`, as all that follows."""
        self._database, self._table = database, table
        self._rows: list[Row] = []
        self._end: tuple[int, str] | None = None  # number and digest of the last row that was checked
        self._head: tuple[Transaction, _Head] | None = None  # as the transaction that goes on left it
        with database.reading() as transaction:
            self.read(transaction)

    def read(self, transaction: Transaction) -> Sequence[Row]:
        """All rows that are kept, oldest first; before `append` and `forget` of the same transaction, if it has any."""
        head = self._head_in(transaction)
        if self._end is not None and head.last < self._end[0]:
            raise self._damage(f"it ends at row {head.last} and had {self._end[0]}")
        if self._end is None or self._end[0] < head.first - 1:  # others have forgotten what this process never read
            self._rows, self._end = [], (head.first - 1, head.before)
        number, digest = self._end
        rows = []
        for row in self._stored(transaction, number):
            number += 1
            if row.number != number or row.digest != self._table.digest(digest, number, row.values):
                raise self._damage(f"row {number} does not follow from the one before")
            digest = row.digest
            rows.append(row)
        if (number, digest) != (head.last, head.digest):
            raise self._damage(f"its end is missing: {number} of {head.last} rows are there")
        self._rows = [row for row in self._rows if row.number >= head.first] + rows
        self._end, self._head = (number, digest), (transaction, head)
        return self._rows

    def append(self, transaction: Transaction, *values: Value) -> None:
        """Add a row. Raises `ValueError` for values that are not of the table's types."""
        values = tuple(value + 0.0 if isinstance(value, float) else value for value in values)  # SQLite has no -0.0
        if not self._table.holds(values):
            raise ValueError(f"these are no values of a row of {self._table.name}")
        head = self._head_after_read(transaction)
        number, marks = head.last + 1, "?, " * len(values)
        digest = self._table.digest(head.digest, number, values)
        transaction.run(f"INSERT INTO {self._table.name} VALUES (?, {marks}?)", (number, *values, digest))
        transaction.run("UPDATE heads SET last = ?, digest = ? WHERE chain = ?", (number, digest, self._table.name))
        self._head = transaction, _Head(head.first, head.before, number, digest)

    def forget(self, transaction: Transaction, rows: int) -> None:
        """Remove the oldest `rows` of those that `read` gave."""
        if rows == 0:
            return
        head, last = self._head_after_read(transaction), self._rows[rows - 1]
        transaction.run(f"DELETE FROM {self._table.name} WHERE number <= ?", (last.number,))
        transaction.run(
            "UPDATE heads SET first = ?, before = ? WHERE chain = ?", (last.number + 1, last.digest, self._table.name)
        )
        self._head = transaction, _Head(last.number + 1, last.digest, head.last, head.digest)

    def _head_after_read(self, transaction: Transaction) -> _Head:
        if self._head is None or self._head[0] is not transaction:
            raise ValueError("the rows were not read in this transaction")
        return self._head[1]

    def _head_in(self, transaction: Transaction) -> _Head:
        if self._head is not None and self._head[0] is transaction:
            raise ValueError("the rows were read in this transaction before")
        found = transaction.run("SELECT first, before, last, digest FROM heads WHERE chain = ?", (self._table.name,))
        if len(found) != 1 or [type(value) for value in found[0]] != [int, str, int, str]:
            raise self._damage("its head is missing")
        head = _Head(*found[0])
        if not 1 <= head.first <= head.last + 1:
            raise self._damage("its head is wrong")
        if head.first == 1 and head.before != self._table.start(self._database.keeper):
            raise self._damage("it begins in another place")
        return head

    def _stored(self, transaction: Transaction, after: int) -> list[Row]:
        statement = _IN_ORDER.format(columns=self._table.names, table=self._table.name)
        rows = []
        for number, *values, digest in transaction.run(statement, (after,)):
            if not self._table.holds(values):
                raise self._damage(f"row {number} has values of other types")
            rows.append(Row(number, tuple(values), digest))
        return rows

    def _damage(self, how: str) -> StorageError:
        return self._database.damage(f"table {self._table.name}: {how}")
