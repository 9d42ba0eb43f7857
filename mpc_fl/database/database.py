"""An SQLite file that belongs to one party and may be used by several of its processes and threads at once.

**Written with a rollback journal** (`journal_mode=DELETE`), not with a write-ahead log. The log keeps committed rows in a file
of its own, whose damaged frames SQLite takes for its end: a flipped bit there takes back what was used, unnoticed. With the
journal all that was committed is in one file. It also needs no shared memory and leaves no second file behind.
`synchronous=EXTRA` has the journal's removal on the disk before a transaction is over; with FULL a power failure could bring
the journal back, and with it the state before. A full disk or a crash leaves the state before the transaction.

**Locks** are those of POSIX on the file itself, so it must lie on a local disk: network file systems lie about locks. A
process that opened the file otherwise and closed it again would drop them; nobody here does. Writers begin with `IMMEDIATE`,
so that what is read and then decided cannot be another's decision too, and no two wait for each other. All waits end after
`patience` seconds.

**Damage.** At opening SQLite checks its pages, and the tables must be exactly those of the file's version: no trigger or view
is ever added. Rows are chained (`chained_rows`). A file of no bytes is damaged: a file gets its name only when it is complete.
Who can write the file can also make a new chain or put back an older copy: a chain finds what rots, what is cut, and who edits a
row without knowing of it. It does not bind its own keeper, whom only what others hold can (receipts, a checkpoint).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from mpc_fl.database.failures import Place, explained
from mpc_fl.database.schema import HEADS, Schema, Value
from mpc_fl.errors import MpcFlError, StorageError
from mpc_fl.files import OTHERS_MAY_NOTHING, written_whole

PATIENCE = 10.0  # seconds; a transaction takes some milliseconds

_SETTINGS = ("trusted_schema = OFF", "cell_size_check = ON", "temp_store = MEMORY", "synchronous = EXTRA")


class Transaction:
    """What is read, or read and written, at once. It ends with the block that made it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def run(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        """All rows that plain SQL gives."""
        return self._connection.execute(statement, values).fetchall()


class Database:
    """The file at `path`, of the party `keeper`; made when there is none. Close it.

    Raises `StorageError` (from every method) for a file that is damaged, of another kind, party or newer version, locked for
    longer than `patience` seconds, not readable or not writable, and for a full disk; then nothing was changed.
    """

    def __init__(self, path: Path, schema: Schema, keeper: str, patience: float = PATIENCE) -> None:
        self.path, self.keeper = path, keeper
        self._schema, self._place = schema, Place(path, schema.damaged, patience)
        self._guard = threading.Lock()
        with explained(self._place):
            if not path.exists():
                self._create()
            found = path.stat()
            if found.st_size == 0:
                raise self.damage("it is empty")
            if found.st_mode & OTHERS_MAY_NOTHING:
                path.chmod(0o600)
            self._connection = self._connect(path)
            try:
                self._check()
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the file; no transaction may go on."""
        with self._turn(), explained(self._place):
            self._connection.close()

    def damage(self, how: str) -> StorageError:
        """The error for content that this program did not write, or not so."""
        return self._place.damage(how)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        """One state of the database, whatever others write meanwhile."""
        with self._transaction("BEGIN") as transaction:
            yield transaction

    @contextlib.contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Nobody else writes while the block lasts. What it wrote is on the disk at its end, or, when it raises, undone."""
        with self._transaction("BEGIN IMMEDIATE") as transaction:
            yield transaction

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[Transaction]:
        with self._turn(), explained(self._place):
            self._connection.execute(begin)
            try:
                yield Transaction(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite may have undone it itself. If undoing fails, the journal is left, and whoever reads next undoes it.
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Threads of this process wait for each other here."""
        if not self._guard.acquire(timeout=self._place.patience):
            raise self._place.in_use()
        try:
            yield
        finally:
            self._guard.release()

    def _connect(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(os.path.abspath(path))}?mode=rw",  # never makes a file: one that vanished is not begun anew
            timeout=self._place.patience,
            isolation_level=None,  # transactions are begun and ended here alone
            check_same_thread=False,
            uri=True,
        )
        try:
            for setting in _SETTINGS:
                connection.execute(f"PRAGMA {setting}")
            [[journal]] = connection.execute("PRAGMA journal_mode = DELETE").fetchall()
            if journal != "delete":
                raise StorageError(f"{self.path} cannot be written with a rollback journal", "choose a local disk")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(self.path, durable=True, once=True) as temporary:
                with contextlib.closing(self._connect(temporary)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    _bring_up_to_date(connection, self._schema, self.keeper, 0)
                    connection.execute("COMMIT")
        except StorageError:
            raise
        except MpcFlError as error:
            raise StorageError(error.what, error.fix) from None

    def _check(self) -> None:
        with self.reading() as transaction:
            version = self._checked_version(transaction)
        if version < len(self._schema.versions):
            with self.writing() as transaction:  # another process may have come first
                _bring_up_to_date(self._connection, self._schema, self.keeper, self._checked_version(transaction))

    def _checked_version(self, transaction: Transaction) -> int:
        """The version of a file of this kind and party whose pages and tables are as they must be."""
        [[identifier]], [[version]] = transaction.run("PRAGMA application_id"), transaction.run("PRAGMA user_version")
        newest = len(self._schema.versions)
        if identifier != self._schema.identifier:
            raise self.damage("it is a database of another program")
        if version > newest:
            raise StorageError(
                f"{self.path} was written by a newer version of this program ({version}, this one knows {newest})",
                "run that version",
            )
        if version < 1 or _layout(self._connection) != _layout_of(self._schema, version):
            raise self.damage(f"its tables are not those of version {version}")
        if transaction.run("PRAGMA integrity_check(1)") != [("ok",)]:
            raise self.damage("its pages contradict each other")
        for [keeper] in transaction.run("SELECT DISTINCT keeper FROM heads"):
            if keeper != self.keeper:
                raise StorageError(f"{self.path} belongs to {keeper[:40]!r}, not to {self.keeper}", "check the path")
        return int(version)


def _bring_up_to_date(connection: sqlite3.Connection, schema: Schema, keeper: str, version: int) -> None:
    """Within a transaction, give a file of a version (0: none yet) the tables that it lacks."""
    if version == len(schema.versions):
        return
    if version == 0:
        connection.execute(HEADS)
    for table in (table for tables in schema.versions[version:] for table in tables):
        connection.execute(table.statement)
        start = table.start(keeper)
        connection.execute("INSERT INTO heads VALUES (?, ?, 1, ?, 0, ?)", (table.name, keeper, start, start))
    connection.execute(f"PRAGMA application_id = {schema.identifier}")
    connection.execute(f"PRAGMA user_version = {len(schema.versions)}")


def _layout(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


def _layout_of(schema: Schema, version: int) -> list[tuple[Any, ...]]:
    """What a file of this version holds, made once more in memory."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        as_it_was = Schema(schema.identifier, schema.versions[:version], schema.damaged)
        _bring_up_to_date(connection, as_it_was, "", 0)
        return _layout(connection)
