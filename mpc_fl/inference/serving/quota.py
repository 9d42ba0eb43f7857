"""How many images hospitals may ask about, and how many sessions each may begin: a model owner's protection of its model.

`UsageLedger` bounds model extraction (Tramèr et al., USENIX Security 2016): every batch is charged, on the disk, before its
offline work begins and so before its answer can leave. A crash can waste a hospital's images and never give any back.
Hospitals may pool their answers, so there are limits for each and for all together; a batch must be within all of them, which
one transaction decides and charges for all sessions of all processes that share the records (`service_records`).
Windows slide: a day is the last 24 hours, so that no midnight lets twice the quota through. What is stored in a pool is charged
when it is taken out; `SessionRate` and the places of a pool bound what else a hospital can cost.

`free_again` is pure; the caller keeps time.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpc_fl.config.config import Config
from mpc_fl.database.chained_rows import ChainedRows, Row
from mpc_fl.database.database import Database
from mpc_fl.errors import RefusedError
from mpc_fl.inference.serving.service_records import SESSIONS, USAGE

# Seconds that rows are kept, twice their longest window: a clock that ran ahead and was put back frees nothing within them.
_USAGE_KEPT, _SESSIONS_KEPT = 2 * 86400.0, 2 * 60.0


@dataclass(frozen=True)
class Quota:
    """At most `most` images, or sessions, within any `seconds`: of one hospital, or of all hospitals together."""

    most: int
    seconds: float
    period: str  # in words, for the hospital
    of_all: bool = False


@dataclass(frozen=True)
class Charge:
    """Images that a hospital was charged with, at `time` in seconds since 1970."""

    time: float
    images: int


def quotas_of(config: Config) -> tuple[Quota, ...]:
    """How many images the model owner lets each hospital, and all of them together, ask about."""
    serving = config.serving
    return (
        Quota(serving.images_per_day, 86400.0, "24 hours"),
        Quota(serving.images_per_minute, 60.0, "a minute"),
        Quota(serving.day_of_all, 86400.0, "24 hours", of_all=True),
        Quota(serving.minute_of_all, 60.0, "a minute", of_all=True),
    )


def free_again(quota: Quota, charges: Sequence[Charge], images: int, now: float) -> float | None:
    """The time from which `images` more are within the limit; None when they are now.

    Charges from the future count: a clock that was put back frees nothing. Raises `ValueError` for more than the limit.
    """
    if images > quota.most:
        raise ValueError(f"{images} images are never within a limit of {quota.most}")
    window = sorted((charge for charge in charges if charge.time + quota.seconds > now), key=lambda charge: charge.time)
    used, again = sum(charge.images for charge in window), None
    for charge in window:
        if used + images <= quota.most:
            break
        used, again = used - charge.images, charge.time + quota.seconds
    return again


def _moment(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC) + datetime.timedelta(seconds=1)
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


class UsageLedger:
    """Charges of all hospitals, in the order in which batches began. Threads, and processes of one model owner, share them.

    Raises `StorageError` when the records are damaged (then nobody knows what was used) or cannot be read or written.
    """

    def __init__(self, records: Database, quotas: Sequence[Quota], clock: Callable[[], float] = time.time) -> None:
        self._records, self._quotas, self._clock = records, tuple(quotas), clock
        self._rows = ChainedRows(records, USAGE)

    def require(self, hospital: str, images: int = 1) -> None:
        """Raise `RefusedError` when `images` are not within the limits now: whose limit it is, and when to come back."""
        with self._records.reading() as transaction:
            self._require(self._rows.read(transaction), hospital, images)

    def _require(self, rows: Sequence[Row], hospital: str, images: int) -> None:
        now = self._clock()
        charges = [(str(by), Charge(float(at), int(count))) for at, by, count in (row.values for row in rows)]
        every = [charge for _, charge in charges]
        own = [charge for by, charge in charges if by == hospital]
        waits = [(free_again(quota, every if quota.of_all else own, images, now), quota) for quota in self._quotas]
        late = [(again, quota) for again, quota in waits if again is not None]
        if late:
            again, quota = max(late, key=lambda item: item[0])
            who = "all hospitals together" if quota.of_all else hospital
            raise RefusedError(
                f"{who} may ask about {quota.most} images in {quota.period}", f"come back at {_moment(again)}"
            )

    def charge(self, hospital: str, images: int) -> None:
        """Charge `images`, on the disk when this returns. Raises `RefusedError` when they are not within the limits."""
        if images < 1:
            raise ValueError("at least one image is charged")
        with self._records.writing() as transaction:
            rows = self._rows.read(transaction)
            self._require(rows, hospital, images)
            now = self._clock()
            self._rows.forget(transaction, _outdated(rows, now - _USAGE_KEPT))
            self._rows.append(transaction, now, hospital, images)


class SessionRate:
    """At most `sessions` new sessions of each hospital within any 60 seconds, of both kinds together.

    Threads, and processes of one party, share the count; it outlives them.
    """

    def __init__(self, records: Database, sessions: int, clock: Callable[[], float] = time.time) -> None:
        self._records, self._quota, self._clock = records, Quota(sessions, 60.0, "a minute"), clock
        self._rows = ChainedRows(records, SESSIONS)

    def begin(self, hospital: str) -> None:
        """A session of `hospital` begins. Raises `RefusedError`, which says when to come back; that costs nothing.

        Raises `StorageError` when the records cannot be used.
        """
        with self._records.reading() as transaction:  # one that hammers makes nobody wait for the disk
            self._require(self._rows.read(transaction), hospital)
        with self._records.writing() as transaction:
            rows = self._rows.read(transaction)
            self._require(rows, hospital)
            now = self._clock()
            self._rows.forget(transaction, _outdated(rows, now - _SESSIONS_KEPT))
            self._rows.append(transaction, now, hospital)

    def _require(self, rows: Sequence[Row], hospital: str) -> None:
        begun = [Charge(float(at), 1) for at, by in (row.values for row in rows) if by == hospital]
        again = free_again(self._quota, begun, 1, self._clock())
        if again is not None:
            raise RefusedError(
                f"{hospital} may begin {self._quota.most} sessions in {self._quota.period}",
                f"come back at {_moment(again)}",
            )


def _outdated(rows: Sequence[Row], before: float) -> int:
    """How many of the oldest rows began before a moment."""
    return next((number for number, row in enumerate(rows) if float(row.values[0]) >= before), len(rows))
