"""A database file: made complete, shared, migrated; locked, full, damaged and another's are told apart, each in one line."""

from __future__ import annotations

import contextlib
import os  # noqa: F401 - for `program`
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.database.database import Database
from mpc_fl.database.schema import ChainedTable, Schema
from mpc_fl.errors import StorageError

NOTES = ChainedTable("notes", (("time", float), ("text", str)))
MORE = ChainedTable("more", (("count", int),))
FIRST = Schema(7, ((NOTES,),), "restore it")
SECOND = Schema(7, ((NOTES,), (MORE,)), "restore it")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with one note."""
    with Database(tmp_path / "notes.sqlite3", FIRST, "somebody") as database:
        add(database, "one")
    return tmp_path / "notes.sqlite3"


def add(database: Database, *texts: str) -> None:
    notes = ChainedRows(database, NOTES)
    with database.writing() as transaction:
        notes.read(transaction)
        for text in texts:
            notes.append(transaction, 1.0, text)


def texts(path: Path, schema: Schema = FIRST, keeper: str = "somebody") -> list[str]:
    with Database(path, schema, keeper, patience=0.2) as database:
        notes = ChainedRows(database, NOTES)
        with database.reading() as transaction:
            return [str(row.values[1]) for row in notes.read(transaction)]


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(StorageError) as found:
        yield
    line = str(found.value)
    assert all(word in line for word in words), line
    assert "\n" not in line and "defect" not in line and ".sqlite3" not in found.value.for_peers


def program(lines: str, path: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which `add` and `path` are there."""
    head = f"from tests.database.test_database import *; path = Path({str(path)!r})\n"
    command = [*before, sys.executable, "-c", head + lines]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_file_is_its_owners_alone_and_the_only_one(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]
    path.chmod(0o644)
    assert texts(path) == ["one"]
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]


def test_what_a_block_that_fails_wrote_is_undone(path: Path) -> None:
    with Database(path, FIRST, "somebody") as database:
        notes = ChainedRows(database, NOTES)
        with pytest.raises(KeyError), database.writing() as transaction:
            notes.read(transaction)
            notes.append(transaction, 1.0, "two")
            raise KeyError
        add(database, "three")
    assert texts(path) == ["one", "three"]


def test_an_older_file_gets_the_tables_that_it_lacks_and_a_newer_one_is_refused(path: Path) -> None:
    assert texts(path, SECOND) == ["one"]
    with Database(path, SECOND, "somebody") as database:
        more = ChainedRows(database, MORE)
        with database.writing() as transaction:
            more.read(transaction)
            more.append(transaction, 5)
    with refused("notes.sqlite3", "newer version", "run that version"):
        texts(path, FIRST)
    assert texts(path, SECOND) == ["one"]


def test_a_file_of_another_party_or_program_is_refused(path: Path) -> None:
    with refused("belongs to 'somebody', not to another"):
        texts(path, keeper="another")
    with refused("a database of another program"):
        texts(path, Schema(8, ((NOTES,),), "restore it"))
    other = path.with_name("other.sqlite3")
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE notes (text TEXT)")
    with refused("a database of another program"):
        texts(other)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER forget AFTER INSERT ON notes BEGIN DELETE FROM notes; END",
        "CREATE TABLE others (text TEXT)",
        "CREATE INDEX sooner ON notes (time)",
        "ALTER TABLE notes ADD COLUMN word TEXT",
        "DROP TABLE notes",
        "PRAGMA user_version = 0",
    ],
)
def test_tables_that_are_not_those_of_the_version_are_refused(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
    for _ in range(2):
        with refused("is damaged or was edited", "its tables are not those of version", "restore it"):
            texts(path)


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", b"{}" * 9000])
def test_what_is_no_database_is_refused_and_stays(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for _ in range(2):
        with refused("notes.sqlite3 is damaged"):
            texts(path)
    assert path.read_bytes() == content


def test_a_file_that_vanished_is_not_begun_anew(path: Path) -> None:
    with Database(path, FIRST, "somebody") as database:
        path.rename(path.with_name("away"))
        with contextlib.suppress(StorageError):
            add(database, "two")
        assert not path.exists()


def test_who_keeps_it_locked_is_waited_for_no_longer_than_said(path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sqlite3; c = sqlite3.connect({str(path)!r}, isolation_level=None); c.execute('BEGIN EXCLUSIVE'); "
            "print('held', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with refused("notes.sqlite3 has been locked by another process for 0.2 seconds"):
            texts(path)
        holder.communicate("\n", timeout=30)
    assert texts(path) == ["one"]


def test_threads_wait_for_each_other_no_longer_than_said(path: Path) -> None:
    with Database(path, FIRST, "somebody", patience=0.2) as database, database.writing():
        with refused("has been locked"), database.reading():
            pass


def test_a_crash_amid_a_transaction_leaves_the_state_before(path: Path) -> None:
    lines = """
with Database(path, FIRST, "somebody") as database:
    notes = ChainedRows(database, NOTES)
    with database.writing() as transaction:
        notes.read(transaction)
        for number in range(100):
            notes.append(transaction, 1.0, "x" * 100_000)  # more than SQLite keeps in memory: pages are in the file already
        os.kill(os.getpid(), signal.SIGKILL)
"""
    before = path.stat().st_size
    assert program(lines, path).returncode == -signal.SIGKILL
    assert path.with_name(path.name + "-journal").exists() and path.stat().st_size > before
    assert texts(path) == ["one"] and list(path.parent.iterdir()) == [path]


def test_what_was_acknowledged_is_there_after_a_kill(path: Path) -> None:
    lines = """
with Database(path, FIRST, "somebody") as database:
    for number in range(10_000):
        add(database, f"{os.getpid()} {number}")
        print(f"{os.getpid()} {number}", flush=True)
"""
    head = f"from tests.database.test_database import *; path = Path({str(path)!r})\n"
    writers = [
        subprocess.Popen([sys.executable, "-c", head + lines], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = list[str]()
    for writer in writers:
        assert writer.stdout is not None
        said += [writer.stdout.readline().strip() for _ in range(5)]
    for writer in writers:
        assert writer.stdout is not None
        writer.kill()
        said += writer.stdout.read().split("\n")[:-1]
        writer.wait(30)
    found = texts(path)
    # One row of each may have been written and not yet told.
    assert not set(said) - set(found) and len(found) - 1 <= len(said) + len(writers)


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_NOFILE"])
def test_a_limit_of_the_process_is_named_and_changes_nothing(path: Path, limit: str) -> None:
    lines = f"""
import resource
soft, hard = resource.getrlimit(resource.{limit})
with Database(path, FIRST, "somebody") as database:
    resource.setrlimit(resource.{limit}, (path.stat().st_size if "{limit}" == "RLIMIT_FSIZE" else 0, hard))
    try:
        add(database, "x" * 50_000)
    except StorageError as error:
        print(error)
    resource.setrlimit(resource.{limit}, (soft, hard))
    add(database, "two")
"""
    ran = program(lines, path)
    option = "(ulimit -f); nothing was changed" if limit == "RLIMIT_FSIZE" else "(ulimit -n)"
    assert ran.returncode == 0 and ran.stdout.count("\n") == 1 and option in ran.stdout, ran
    assert texts(path) == ["one", "two"]


def test_a_full_disk_is_named_and_changes_nothing(path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    disk = path.parent / "disk"
    disk.mkdir()
    lines = """
shutil.copy(path, path.parent / "disk" / path.name)
path = path.parent / "disk" / path.name
with Database(path, FIRST, "somebody") as database:
    for size in (100_000, 300_000):
        try:
            add(database, "x" * size)
        except StorageError as error:
            print(error)
    add(database, "two")
print(texts(path))
try:
    Database(path.with_name("another.sqlite3"), FIRST, "somebody").close()
    (path.parent / "filling").write_bytes(bytes(1_000_000))
except OSError:
    pass
try:
    Database(path.with_name("third.sqlite3"), FIRST, "somebody").close()
except StorageError as error:
    print(error)
print(sorted(path.name for path in path.parent.iterdir()))
"""
    mount = "mount -t tmpfs -o size=200k tmpfs " + str(disk) + ' && exec "$0" "$@"'
    ran = program(lines, path, "unshare", "-rm", "sh", "-c", mount)
    said = ran.stdout.splitlines()
    assert ran.returncode == 0, ran
    assert f"the disk of {disk / path.name} is full: free some space, then try again; nothing was changed" in said
    assert any("third.sqlite3" in line and "full" in line for line in said[1:]), said
    assert "third.sqlite3" not in said[-1]


def test_processes_that_begin_at_once_make_one_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite3"
    head = f"from tests.database.test_database import *; path = Path({str(path)!r})\n"
    lines = 'with Database(path, FIRST, "somebody") as database: add(database, str(os.getpid()))'
    begun = [subprocess.Popen([sys.executable, "-c", head + lines]) for _ in range(4)]
    assert [process.wait(60) for process in begun] == [0] * 4
    assert sorted(texts(path)) == sorted(str(process.pid) for process in begun)
    assert list(tmp_path.iterdir()) == [path]
