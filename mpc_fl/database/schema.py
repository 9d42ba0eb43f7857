"""Which tables a database file has, version by version, and how rows of a table are chained.

Every table is a chain: rows are added at its end and, where they are not needed any more, forgotten from its beginning.
Each row keeps a SHA-256 of itself and of the row before; the first of a chain starts from the names of table and keeper. A
table `heads` says where each chain begins and ends, so that a cut tail is found.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

Value = int | float | str
Kind = type[int] | type[float] | type[str]

_SQL_KINDS: dict[Kind, str] = {int: "INTEGER", float: "REAL", str: "TEXT"}
_LARGEST = 2**63 - 1

HEADS = (
    "CREATE TABLE heads (chain TEXT PRIMARY KEY, keeper TEXT NOT NULL, first INTEGER NOT NULL, before TEXT NOT NULL, "
    "last INTEGER NOT NULL, digest TEXT NOT NULL)"
)


@dataclass(frozen=True)
class ChainedTable:
    """A table: its name and those of its columns, plain words, with the type of each. Rows are numbered from 1."""

    name: str
    columns: tuple[tuple[str, Kind], ...]

    @property
    def statement(self) -> str:
        """The SQL that makes it."""
        columns = "".join(f"{name} {_SQL_KINDS[kind]} NOT NULL, " for name, kind in self.columns)
        return f"CREATE TABLE {self.name} (number INTEGER PRIMARY KEY, {columns}digest TEXT NOT NULL)"

    @property
    def names(self) -> str:
        """Its columns for a statement, without number and digest."""
        return ", ".join(name for name, _ in self.columns)

    def holds(self, values: Sequence[object]) -> bool:
        """Whether these can be the values of a row: of the columns' types, finite, of 64 bits."""
        return len(values) == len(self.columns) and all(
            type(value) is kind
            and not (isinstance(value, float) and not math.isfinite(value))
            and not (isinstance(value, int) and abs(value) > _LARGEST)
            for value, (_, kind) in zip(values, self.columns, strict=True)
        )

    def start(self, keeper: str) -> str:
        """What the first row follows."""
        return _digest(["chain", self.name, keeper])

    def digest(self, previous: str, number: int, values: Sequence[Value]) -> str:
        """The SHA-256, as hex, of row `number` after one with the digest `previous`."""
        return _digest(["row", self.name, previous, number, *values])


def _digest(content: list[Value]) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Schema:
    """What a kind of database holds.

    `identifier` marks its files (SQLite's `application_id`). `versions` lists the tables that each version added; a file of
    an older version gets those that it lacks when it is opened. `damaged` says what to do about a file that is damaged.
    """

    identifier: int
    versions: tuple[tuple[ChainedTable, ...], ...]
    damaged: str
