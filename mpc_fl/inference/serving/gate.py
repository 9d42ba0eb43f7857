"""What a standing model owner decides: whose batch is next, and how many images a hospital may ask about.

A hospital may have two sessions at a time: one diagnoses, one fills its pool (`Visit`).

`Rota` is round-robin over hospitals: of those that wait, the one whose last turn began longest ago is next, so no number of
images or of new sessions gets a hospital more than its part. A turn is one batch, from its offline work to its answer or to
the disk; with `inference.at_once` as many batches as are answered together. A turn that outlasts `patience` (its hospital
hangs) no longer keeps others waiting; the session's own deadline ends it.

`UsageLedger` bounds model extraction (Tramèr et al., USENIX Security 2016): every batch is charged, on the disk, before its
offline work begins and so before its answer can leave. A crash can waste a hospital's images and never give any back.
Windows slide: a day is the last 24 hours, so that no midnight lets twice the quota through. What is stored in a pool is charged
when it is taken out; `SessionRate` and the places of a pool bound what else a hospital can cost.

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
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpc_fl.config.config import Config
from mpc_fl.errors import MpcFlError, ProtocolError, RefusedError
from mpc_fl.files import append_json_line, read_json_lines, written_whole

USAGE_FILE = "usage.jsonl"
_SESSION = re.compile(r"(hospital-(?:0|[1-9][0-9]{0,2}))/(fill-)?[0-9a-f]{32}")
_LOOK = 0.5  # seconds between looks at whether a waiting hospital is still there


# ---- agreeing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """What a session is for: a hospital asks about images, or fills its pool. At most one of each at a time."""

    hospital: str
    purpose: Literal["diagnose", "fill"] = "diagnose"

    def new_session(self) -> str:
        """A fresh name of a session: 'hospital-2/<32 hex digits>', or 'hospital-2/fill-<32 hex digits>'."""
        return f"{self.hospital}/{'fill-' if self.purpose == 'fill' else ''}{secrets.token_hex(16)}"

    @classmethod
    def of_session(cls, session: str) -> Visit | None:
        """What a session's name says; None when it is no session's name."""
        found = _SESSION.fullmatch(session)
        return cls(found.group(1), "fill" if found.group(2) else "diagnose") if found else None

    def __str__(self) -> str:
        return self.hospital if self.purpose == "diagnose" else f"{self.hospital}, filling its pool"


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
    """Turns of visits, at most `places` at once, not counting those that outlast `patience` seconds.

    Two visits of one hospital share that hospital's part, turn about.
    """

    def __init__(self, places: int, patience: float) -> None:
        self._places, self._patience = places, patience
        self._waiting: dict[Visit, int] = {}  # when each came, in order
        self._holding: dict[Visit, float] = {}
        # Number of the last turn, of each hospital and of each visit; kept when it leaves, or leaving would pay.
        self._last: dict[str, int] = {}
        self._last_of_visit: dict[Visit, int] = {}
        self._arrivals = self._turns = 0

    @property
    def holding(self) -> set[Visit]:
        """Whose turn it is."""
        return set(self._holding)

    def wait(self, visit: Visit) -> None:
        """`visit` waits for a turn. Raises `ValueError` when it waits or has one."""
        if visit in self._waiting or visit in self._holding:
            raise ValueError(f"{visit} waits for a turn or has one")
        self._arrivals += 1
        self._waiting[visit] = self._arrivals

    def leave(self, visit: Visit) -> None:
        """Its turn is over, or it does not wait any more."""
        self._waiting.pop(visit, None)
        self._holding.pop(visit, None)

    def _place_in_line(self, visit: Visit) -> tuple[int, int, int]:
        return self._last.get(visit.hospital, 0), self._last_of_visit.get(visit, 0), self._waiting[visit]

    def begin(self, now: float) -> list[Visit]:
        """Those whose turn begins at `now`, in order."""
        began = []
        busy = sum(now - since < self._patience for since in self._holding.values())
        while self._waiting and busy < self._places:
            visit = min(self._waiting, key=self._place_in_line)
            del self._waiting[visit]
            self._turns += 1
            self._last[visit.hospital] = self._last_of_visit[visit] = self._turns
            self._holding[visit] = now
            began.append(visit)
            busy += 1
        return began


class Turns:
    """A `Rota` for threads: each session waits in one."""

    def __init__(self, places: int, patience: float) -> None:
        self._rota = Rota(places, patience)
        self._changed = threading.Condition()

    def begin(self, visit: Visit, check: Callable[[], None]) -> None:
        """Wait for a turn; `check` is called meanwhile and raises when there is nobody to wait for."""
        with self._changed:
            self._rota.wait(visit)
            try:
                while True:
                    if self._rota.begin(time.monotonic()):
                        self._changed.notify_all()
                    check()
                    if visit in self._rota.holding:
                        return
                    self._changed.wait(_LOOK)
            except BaseException:
                self._leave(visit)
                raise

    def end(self, visit: Visit) -> None:
        """Its turn is over; no harm when it has none."""
        with self._changed:
            self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        self._rota.leave(visit)
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


# ---- how many sessions -------------------------------------------------------------------------------------------------


class SessionRate:
    """At most `sessions` new sessions of each hospital within any 60 seconds, of both kinds together. Threads may share it.

    Kept in memory: a session costs work, not knowledge, so nothing is lost with a restart.
    """

    def __init__(self, sessions: int, clock: Callable[[], float] = time.time) -> None:
        self._limit, self._clock = Limit(sessions, 60.0, "a minute"), clock
        self._begun: dict[str, list[Charge]] = {}
        self._guard = threading.Lock()

    def begin(self, hospital: str) -> None:
        """A session of `hospital` begins. Raises `RefusedError`, which says when to come back; that costs nothing."""
        with self._guard:
            now = self._clock()
            begun = [charge for charge in self._begun.get(hospital, []) if charge.time + self._limit.seconds > now]
            again = free_again(self._limit, begun, 1, now)
            if again is not None:
                raise RefusedError(
                    f"{hospital} may begin {self._limit.images} sessions in {self._limit.period}",
                    f"come back at {_moment(again)}",
                )
            self._begun[hospital] = [*begun, Charge(now, 1)]


# ---- one session's gate ------------------------------------------------------------------------------------------------


class Gate:
    """What `fast.owner_session.Owner` asks before each batch of one session (`BatchGate`).

    `check` raises when there is nobody to wait for any more; the model owner keeps `pool_batches` for each hospital.
    """

    def __init__(
        self, visit: Visit, turns: Turns, usage: UsageLedger, pool_batches: int, check: Callable[[], None]
    ) -> None:
        self._visit, self._turns, self._usage, self._check = visit, turns, usage, check
        self._pool_batches, self._has_turn = pool_batches, False

    @contextlib.contextmanager
    def session(self) -> Iterator[Gate]:
        """However the session ends, its turn ends with it."""
        try:
            yield self
        finally:
            self.end()

    def _take_turn(self) -> None:
        if not self._has_turn:
            self._turns.begin(self._visit, self._check)
            self._has_turn = True

    def begin(self, records: int) -> None:
        """Wait for the turn unless it has begun, and charge. Raises `RefusedError`, `ProtocolError`, what `check` raises."""
        if self._visit.purpose != "diagnose":
            raise ProtocolError(
                "the hospital asked for a diagnosis in a session that fills its pool", "begin another session"
            )
        self._usage.require(self._visit.hospital, records)
        self._take_turn()
        self._usage.charge(self._visit.hospital, records)

    def store(self, stored: int) -> None:
        """Wait for the turn before a batch is stored. Raises `RefusedError` when `stored` are enough, and as `begin`."""
        if self._visit.purpose != "fill":
            raise ProtocolError("the hospital filled its pool in a session that diagnoses", "begin another session")
        if stored >= self._pool_batches:
            raise RefusedError(
                f"the model owner keeps {stored} batches for {self._visit.hospital}, no more than {self._pool_batches}",
                "come back when some are used",
            )
        self._take_turn()

    def end(self) -> None:
        """What was begun has been answered, or stored."""
        self._turns.end(self._visit)
        self._has_turn = False
