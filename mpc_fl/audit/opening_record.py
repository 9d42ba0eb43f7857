"""What is said of an opening before a share of it leaves, and the plain record of it.

Whoever opens a secret-shared value describes it once, as an `Opening`, and gives that to its `Record`: to an
`OpeningRecord`, JSON lines without signatures, or to a `RevealLedger`, which all parties sign together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpc_fl.exhaustion import unwritable

OPENINGS_FILE = "openings.jsonl"
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Opening:
    """The public description of one opening: all parties of it know it alike, and no value is in it.

    `what` names the value, `why` the step of the protocol; `shape` is that of the tensor, empty for a single number. `to`
    are the parties that learn it, `among` those whose shares make it up. `privacy` is what all may know of the privacy
    that it spends. `transcript` (64 hex digits) is the digest of what the parties of a closed sum agreed on before it, `None`
    for an opening of shares.
    """

    what: str
    why: str
    shape: tuple[int, ...]
    to: tuple[str, ...]
    among: tuple[str, ...]
    privacy: Mapping[str, Scalar] | None = None
    transcript: str | None = None


class Record(Protocol):
    """What opening tells before a share leaves: an `OpeningRecord`, or a `RevealLedger` that all parties sign."""

    def append(self, opening: Opening) -> object:
        """Write one opening, to the disk."""


class OpeningRecord:
    """A record without signatures, for a computation whose parties keep no reveal ledger together.

    Append-only JSON lines of all openings this party took part in; each line is flushed before shares are sent.
    """

    def __init__(self, path: Path, party: str) -> None:
        self._path = path
        self._party = party
        self._count = 0
        self._among: dict[str, tuple[str, ...]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, opening: Opening) -> None:
        """Write one line: its number, the time in seconds since 1970, this party, and the description. Raises `MpcFlError`."""
        self._count += 1
        self._among.setdefault(opening.why, opening.among)
        line = {"number": self._count, "time": round(time.time(), 3), "party": self._party, **vars(opening)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=dict) + "\n")
                file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from None

    def begun_among(self, why: str) -> tuple[str, ...] | None:
        """Among whom the first opening for this reason was, of this start of the party."""
        return self._among.get(why)
