"""opening_record"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from mpc_fl.audit.reveal_ledger import Scalar


class Record(Protocol):
    """What `open_to` tells before a share leaves: an `OpeningRecord`, or a `RevealLedger` that all parties sign."""

    def append(
        self,
        what: str,
        why: str,
        shape: Sequence[int],
        to: Sequence[str],
        among: Sequence[str],
        privacy: Mapping[str, Scalar] | None = None,
    ) -> object:
        """Write one record, to the disk."""


@dataclass(frozen=True)
class Opening:
    """One opening, as every party that takes part records it."""

    number: int
    time: float
    party: str
    what: str
    why: str
    shape: list[int]
    to: list[str]
    among: list[str]
    privacy: dict[str, Scalar] | None = None


class OpeningRecord:
    """A record without signatures, for a computation whose parties keep no reveal ledger together.

    Append-only JSON lines of all openings this party took part in; each line is flushed before shares are sent.
    """

    def __init__(self, path: Path, party: str) -> None:
        self._path = path
        self._party = party
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(
        self,
        what: str,
        why: str,
        shape: Sequence[int],
        to: Sequence[str],
        among: Sequence[str],
        privacy: Mapping[str, Scalar] | None = None,
    ) -> Opening:
        """Write one record and return it."""
        self._count += 1
        spent = None if privacy is None else dict(privacy)
        moment = round(time.time(), 3)
        opening = Opening(self._count, moment, self._party, what, why, list(shape), list(to), list(among), spent)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(opening)) + "\n")
            file.flush()
        return opening
