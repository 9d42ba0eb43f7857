"""How many images hospitals may ask about, and how many sessions each may begin: a model owner's protection of its model.

`UsageLedger` bounds model extraction (Tramèr et al., USENIX Security 2016): every batch is charged, on the disk, before its
offline work begins and so before its answer can leave. A crash can waste a hospital's images and never give any back.
Hospitals may pool their answers, so there are limits for each and for all together; a batch must be within all of them, which
one lock decides and charges for all sessions.
Windows slide: a day is the last 24 hours, so that no midnight lets twice the quota through. What is stored in a pool is charged
when it is taken out; `SessionRate` and the places of a pool bound what else a hospital can cost.

`free_again` is pure; the caller keeps time.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.config.config import Config
from mpc_fl.errors import MpcFlError, RefusedError
from mpc_fl.files import append_json_line, read_json_lines, to_disk, written_whole

USAGE_FILE = "usage.jsonl"


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
    at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc) + datetime.timedelta(seconds=1)
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


class UsageLedger:
    """Charges of all hospitals: `usage.jsonl` in `directory`, one line per batch, in the order in which batches began.

    Raises `MpcFlError` when the file is damaged (then nobody knows what was used) or another process has it. Threads may
    share it.
    """

    def __init__(self, directory: Path, quotas: Sequence[Quota], clock: Callable[[], float] = time.time) -> None:
        self._path, self._quotas, self._clock = directory / USAGE_FILE, tuple(quotas), clock
        self._guard, self._open = threading.Lock(), contextlib.ExitStack()
        directory.mkdir(parents=True, exist_ok=True)
        lock = self._open.enter_context((directory / f"{USAGE_FILE}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._open.close()
            raise MpcFlError(
                f"another process is serving in {directory}", "end it, or choose another directory"
            ) from None
        try:
            self._charges = self._read()
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Let another process serve in this directory."""
        self._open.close()

    def _read(self) -> dict[str, list[Charge]]:
        """What counts still; the file is rewritten without the rest and without a line that a crash cut off."""
        found: dict[str, list[Charge]] = {}
        try:
            for line in read_json_lines(self._path):
                charge = Charge(float(line["time"]), int(line["images"]))
                if charge.images < 1:
                    raise ValueError
                found.setdefault(str(line["hospital"]), []).append(charge)
        except (ValueError, KeyError, TypeError):
            raise MpcFlError(
                f"{self._path} is damaged", "restore it; deleting it lets every hospital begin again"
            ) from None
        found = {hospital: self._counting(charges) for hospital, charges in found.items()}
        lines = sorted(
            ((charge.time, hospital, charge.images) for hospital, charges in found.items() for charge in charges)
        )
        keys = ("time", "hospital", "images")
        text = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
        with written_whole(self._path, durable=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return found

    def _counting(self, charges: Sequence[Charge]) -> list[Charge]:
        longest = max(quota.seconds for quota in self._quotas)
        return [charge for charge in charges if charge.time + longest > self._clock()]

    def require(self, hospital: str, images: int = 1) -> None:
        """Raise `RefusedError` when `images` are not within the limits now: whose limit it is, and when to come back."""
        with self._guard:
            self._require(hospital, images)

    def _require(self, hospital: str, images: int) -> None:
        """The same, with the lock held: a session that begins and one that is charged see one state."""
        now, own = self._clock(), self._charges.get(hospital, [])
        every = [charge for charges in self._charges.values() for charge in charges]
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
        with self._guard:
            self._require(hospital, images)
            now = self._clock()
            try:
                append_json_line(self._path, {"time": now, "hospital": hospital, "images": images})
                to_disk(self._path)
            except OSError as error:
                raise MpcFlError(f"cannot write {self._path}: {error.strerror}", "check the free space") from None
            self._charges[hospital] = [*self._counting(self._charges.get(hospital, [])), Charge(now, images)]


class SessionRate:
    """At most `sessions` new sessions of each hospital within any 60 seconds, of both kinds together. Threads may share it.

    Kept in memory: a session costs work, not knowledge, so nothing is lost with a restart.
    """

    def __init__(self, sessions: int, clock: Callable[[], float] = time.time) -> None:
        self._quota, self._clock = Quota(sessions, 60.0, "a minute"), clock
        self._begun: dict[str, list[Charge]] = {}
        self._guard = threading.Lock()

    def begin(self, hospital: str) -> None:
        """A session of `hospital` begins. Raises `RefusedError`, which says when to come back; that costs nothing."""
        with self._guard:
            now = self._clock()
            begun = [charge for charge in self._begun.get(hospital, []) if charge.time + self._quota.seconds > now]
            again = free_again(self._quota, begun, 1, now)
            if again is not None:
                raise RefusedError(
                    f"{hospital} may begin {self._quota.most} sessions in {self._quota.period}",
                    f"come back at {_moment(again)}",
                )
            self._begun[hospital] = [*begun, Charge(now, 1)]
