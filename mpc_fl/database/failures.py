"""One line for whatever keeps a database from being used: what, where, what to do."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.errors import StorageError


@dataclass(frozen=True)
class Place:
    """A database file, as an error names it: `damaged` says what to do when it is damaged or was edited."""

    path: Path
    damaged: str
    patience: float  # seconds that a lock is waited for

    def damage(self, how: str) -> StorageError:
        """The error for content that was not written by this program, or not in this order."""
        return StorageError(f"{self.path} is damaged or was edited ({how})", self.damaged)

    def in_use(self) -> StorageError:
        """The error for a lock that was not freed in time."""
        return StorageError(
            f"{self.path} has been locked by another process for {self.patience:g} seconds",
            "end what keeps it open, then try again; nothing was changed",
        )


@contextlib.contextmanager
def explained(place: Place) -> Iterator[None]:
    """Raise `StorageError` for what SQLite or the system says within the block.

    SQLite's errors are told apart by their text, which is part of its interface (`sqlite3_errstr`); Python tells the number
    from 3.11 on only. What is none of these is damage: its messages would name places in a file that nobody can look at.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a defect of this program, not of the file
    except UnicodeDecodeError:  # SQLite's own words, which quote the file
        raise place.damage("SQLite cannot read it") from None
    except sqlite3.Error as error:
        raise _explanation(place, str(error)) from None
    except OSError as error:
        raise StorageError(
            f"{place.path} cannot be used: {error.strerror}", "check the path, its permissions and the free space"
        ) from None


def _explanation(place: Place, said: str) -> StorageError:
    path = place.path
    if "is locked" in said or "locking protocol" in said:
        return place.in_use()
    if "is full" in said:
        return StorageError(f"the disk of {path} is full", "free some space, then try again; nothing was changed")
    if "readonly" in said:
        return StorageError(f"{path} may not be written", "check the permissions of the file and of its directory")
    if "unable to open" in said:
        return StorageError(
            f"{path} or its journal cannot be opened",
            "check the path, its permissions, and how many files a process may open (ulimit -n)",
        )
    if "disk I/O error" in said:
        return StorageError(
            f"reading or writing {path} failed",
            "check the disk, its quota, and how large a file may be (ulimit -f); nothing was changed",
        )
    return place.damage("SQLite cannot read it")
