"""How long others have given no sign of life, while this process was awake itself.

Who looks at a clock after it has stood still itself (its process was stopped, its machine slept) would blame all others for
that time. So silence adds up from look to look, and of the gap between two looks no more than `_LONGEST_GAP` counts: a longer
one is a standstill of this process, by which deadlines that ran out in it are moved.

While all links are made, 64 parties of one machine keep its cores busy for a minute, and a link on which a greeting still waits to
be read carries no sign. So silence may last longer at first (`AtFirst`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

LOOK = 1.0  # seconds between two looks of a process that is awake
SIGN = 5.0  # seconds without having sent anything after which a sign is given; nobody is silent before twice as long
_LONGEST_GAP = 2 * LOOK  # a busy machine lets a thread wait, too


@dataclass(frozen=True)
class AtFirst:
    """Silence may last `more` seconds longer while this process has not been awake for `until` seconds."""

    more: float = 0.0
    until: float = 0.0


class Silence:
    """Seconds of silence by name. `awake`: seconds that this process has been awake since the first look.

    Its lock is held for itself alone.
    """

    def __init__(
        self, limit: float, clock: Callable[[], float] = time.monotonic, at_first: AtFirst = AtFirst()
    ) -> None:
        """`limit`: seconds without a sign of life after which somebody counts as silent, later than `at_first`."""
        self._limit = limit
        self._at_first = at_first
        self.awake = 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._silent: dict[str, float] = {}
        self._uncounted = 0.0  # seconds awake since the last look
        self._seen: float | None = None  # when this process was last seen awake
        self._standstill = (0.0, 0.0)  # the last one: from when until when

    @property
    def limit(self) -> float:
        """Seconds without a sign of life after which somebody counts as silent now."""
        return self._limit + (self._at_first.more if self.awake < self._at_first.until else 0.0)

    def look(self, heard: Mapping[str, bool | None], behind: Collection[str] = ()) -> list[str]:
        """Who has been silent for `limit` seconds. `heard`: of everybody there, whether there was a sign since the last look, None
        of who could not be heard. Those `behind` relays may be silent for two signs longer: a relay that stops is found first.
        """
        with self._lock:
            if self._seen is None:
                self._seen = self._clock()
            self._see()
            seconds, self._uncounted = self._uncounted, 0.0
            start = {name: -2 * SIGN if name in behind else 0.0 for name in heard}
            self._silent = {
                name: start[name] if sign else self._silent.get(name, start[name]) + (0.0 if sign is None else seconds)
                for name, sign in heard.items()
            }
            return [name for name, silent in self._silent.items() if silent >= self.limit]

    def end(self) -> None:
        """Nobody looks any more."""
        with self._lock:
            self._silent, self._seen = {}, None

    def suspect(self, names: Collection[str]) -> tuple[str, float] | None:
        """Who of `names` has been silent longest, and for how many seconds, if that is more than half of the limit."""
        with self._lock:
            silent = {name: seconds for name, seconds in self._silent.items() if name in names}
            longest = max(silent, key=lambda name: silent[name], default="")
            return (longest, silent[longest]) if silent and silent[longest] > self.limit / 2 else None

    def moved(self, deadline: float) -> float:
        """A deadline of the clock, later by the last standstill of this process if it ran out in that, or as long after it."""
        with self._lock:
            self._see()
            began, ended = self._standstill
            return deadline + ended - began if began < deadline < 2 * ended - began else deadline

    def stood_still(self) -> float:
        """Seconds that this process stood still, if others may have given it up for that, as it just finds out; else 0."""
        with self._lock:
            self._see()
            (began, ended), now = self._standstill, self._clock()
            long, just_now = ended - began > self.limit - SIGN - LOOK, now - ended < 2 * SIGN
            return ended - began if long and just_now else 0.0

    def _see(self) -> None:
        if self._seen is None:
            return
        before, now = self._seen, self._clock()
        gap, self._seen = now - before, now
        began, ended = self._standstill
        if gap > _LONGEST_GAP and (gap > ended - began or now > 2 * ended - began):  # a longer one still counts
            self._standstill = (before, now)
        self.awake += min(gap, _LONGEST_GAP)
        self._uncounted += min(gap, _LONGEST_GAP)
