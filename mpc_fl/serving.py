"""What a standing model owner decides: whose batch is next, and how many images a hospital may ask about.

`Rota` is round-robin over hospitals: of those that wait, the one whose last turn began longest ago is next, so no number of
images or of new sessions gets a hospital more than its part. A turn is one batch, from its offline work to its answer. A
turn that outlasts `patience` (its hospital hangs) no longer keeps others waiting; the session's own deadline ends it.

`UsageLedger` bounds model extraction (Tramèr et al., USENIX Security 2016): every batch is charged, on the disk, before its
offline work begins and so before its answer can leave. A crash can waste a hospital's images and never give any back.
Windows slide: a day is the last 24 hours, so that no midnight lets twice the quota through.

`Rota` and `free_again` are pure; the caller keeps time.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.config import Config
from mpc_fl.errors import MpcFlError, RefusedError
from mpc_fl.files import append_json_line, read_json_lines, written_whole

USAGE_FILE = "usage.jsonl"
_SESSION = re.compile(r"(hospital-(?:0|[1-9][0-9]{0,2}))/[0-9a-f]{32}")
_LOOK = 0.5  # seconds between looks at whether a waiting hospital is still there


# ---- agreeing ----------------------------------------------------------------------------------------------------------


def hospital_of(session: str) -> str | None:
    """The hospital that a session's name says it is of; None when it is no session's name."""
    found = _SESSION.fullmatch(session)
    return found.group(1) if found else None


def service_digest(config: Config) -> str:
    """SHA-256, as hex, of what a hospital and a standing model owner must agree on. Their images are their own matter."""
    inference, data = config.inference, config.data
    shared = {
        "inputs": [list(data.input_shape), list(data.classes), data.normalise],
        "inference": [inference.engine, inference.reveal, inference.batch_size],
        "model": config.model.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


# ---- whose batch is next -----------------------------------------------------------------------------------------------


class Rota:
    """Turns of hospitals, at most `places` at once, not counting those that outlast `patience` seconds."""

    def __init__(self, places: int, patience: float) -> None:
        self._places, self._patience = places, patience
        self._waiting: dict[str, int] = {}  # when each came, in order
        self._holding: dict[str, float] = {}
        self._last: dict[
            str, int
        ] = {}  # number of each hospital's last turn; kept when it leaves, or leaving would pay
        self._arrivals = self._turns = 0

    @property
    def holding(self) -> set[str]:
        """Whose turn it is."""
        return set(self._holding)

    def wait(self, hospital: str) -> None:
        """`hospital` waits for a turn. Raises `ValueError` when it waits or has one."""
        if hospital in self._waiting or hospital in self._holding:
            raise ValueError(f"{hospital} waits for a turn or has one")
        self._arrivals += 1
        self._waiting[hospital] = self._arrivals

    def leave(self, hospital: str) -> None:
        """Its turn is over, or it does not wait any more."""
        self._waiting.pop(hospital, None)
        self._holding.pop(hospital, None)

    def begin(self, now: float) -> list[str]:
        """Those whose turn begins at `now`, in order."""
        began = []
        busy = sum(now - since < self._patience for since in self._holding.values())
        while self._waiting and busy < self._places:
            hospital = min(self._waiting, key=lambda name: (self._last.get(name, 0), self._waiting[name]))
            del self._waiting[hospital]
            self._turns += 1
            self._last[hospital] = self._turns
            self._holding[hospital] = now
            began.append(hospital)
            busy += 1
        return began


class Turns:
    """A `Rota` for threads: each session waits in one."""

    def __init__(self, places: int, patience: float) -> None:
        self._rota = Rota(places, patience)
        self._changed = threading.Condition()

    def begin(self, hospital: str, check: Callable[[], None]) -> None:
        """Wait for a turn; `check` is called meanwhile and raises when there is nobody to wait for."""
        with self._changed:
            self._rota.wait(hospital)
            try:
                while True:
                    if self._rota.begin(time.monotonic()):
                        self._changed.notify_all()
                    check()
                    if hospital in self._rota.holding:
                        return
                    self._changed.wait(_LOOK)
            except BaseException:
                self._leave(hospital)
                raise

    def end(self, hospital: str) -> None:
        """Its turn is over; no harm when it has none."""
        with self._changed:
            self._leave(hospital)

    def _leave(self, hospital: str) -> None:
        self._rota.leave(hospital)
        self._changed.notify_all()


# ---- how many images ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """At most `images` of one hospital within any `seconds`."""

    images: int
    seconds: float
    period: str  # in words, for the hospital


@dataclass(frozen=True)
class Charge:
    """Images that a hospital was charged with, at `time` in seconds since 1970."""

    time: float
    images: int


def limits_of(config: Config) -> tuple[Limit, ...]:
    """The model owner's limits for each hospital."""
    serving = config.serving
    return Limit(serving.images_per_day, 86400.0, "24 hours"), Limit(serving.images_per_minute, 60.0, "a minute")


def free_again(limit: Limit, charges: Sequence[Charge], images: int, now: float) -> float | None:
    """The time from which `images` more are within the limit; None when they are now.

    Charges from the future count: a clock that was put back frees nothing. Raises `ValueError` for more than the limit.
    """
    if images > limit.images:
        raise ValueError(f"{images} images are never within a limit of {limit.images}")
    window = sorted((charge for charge in charges if charge.time + limit.seconds > now), key=lambda charge: charge.time)
    used, again = sum(charge.images for charge in window), None
    for charge in window:
        if used + images <= limit.images:
            break
        used, again = used - charge.images, charge.time + limit.seconds
    return again


def _moment(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc) + datetime.timedelta(seconds=1)
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


class UsageLedger:
    """Charges of all hospitals: `usage.jsonl` in `directory`, one line per batch, in the order in which batches began.

    Raises `MpcFlError` when the file is damaged (then nobody knows what was used) or another process has it. Threads may
    share it.
    """

    def __init__(self, directory: Path, limits: Sequence[Limit], clock: Callable[[], float] = time.time) -> None:
        self._path, self._limits, self._clock = directory / USAGE_FILE, tuple(limits), clock
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
        with written_whole(self._path, 0o600) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        return found

    def _counting(self, charges: Sequence[Charge]) -> list[Charge]:
        longest = max(limit.seconds for limit in self._limits)
        return [charge for charge in charges if charge.time + longest > self._clock()]

    def require(self, hospital: str, images: int = 1) -> None:
        """Raise `RefusedError`, which says when to come back, when `images` are not within the limits now."""
        now, charges = self._clock(), self._charges.get(hospital, [])
        waits = [(free_again(limit, charges, images, now), limit) for limit in self._limits]
        late = [(again, limit) for again, limit in waits if again is not None]
        if late:
            again, limit = max(late, key=lambda item: item[0])
            raise RefusedError(
                f"{hospital} may ask about {limit.images} images in {limit.period}", f"come back at {_moment(again)}"
            )

    def charge(self, hospital: str, images: int) -> None:
        """Charge `images`, on the disk when this returns. Raises `RefusedError` when they are not within the limits."""
        with self._guard:
            self.require(hospital, images)
            now = self._clock()
            try:
                append_json_line(self._path, {"time": now, "hospital": hospital, "images": images})
                _to_disk(self._path)
            except OSError as error:
                raise MpcFlError(f"cannot write {self._path}: {error.strerror}", "check the free space") from None
            self._charges[hospital] = [*self._counting(self._charges.get(hospital, [])), Charge(now, images)]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- one session's gate ------------------------------------------------------------------------------------------------


class Gate:
    """What `fast.sessions.Owner` asks before each batch of one hospital, and tells after it."""

    def __init__(self, hospital: str, turns: Turns, usage: UsageLedger, check: Callable[[], None]) -> None:
        self._hospital, self._turns, self._usage, self._check = hospital, turns, usage, check

    @contextlib.contextmanager
    def session(self) -> Iterator[Gate]:
        """However the session ends, its turn ends with it."""
        try:
            yield self
        finally:
            self._turns.end(self._hospital)

    def begin(self, images: int) -> None:
        """Wait for this hospital's turn and charge it. Raises `RefusedError`, or what `check` raises."""
        self._usage.require(self._hospital, images)
        self._turns.begin(self._hospital, self._check)
        self._usage.charge(self._hospital, images)

    def end(self) -> None:
        """The batch has been answered."""
        self._turns.end(self._hospital)
