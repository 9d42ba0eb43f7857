"""Whose batch is next at a model owner that serves several hospitals.

`Rota` is round-robin over hospitals: of those that wait, the one whose last turn began longest ago is next, so no number of
images or of new sessions gets a hospital more than its part. A turn is one batch, from its offline work to its answer or to
the disk; with `inference.at_once` as many batches as are answered together. A turn that outlasts `patience` (its hospital
hangs) no longer keeps others waiting; the session's own deadline ends it. A hospital may have two sessions at a time: one
diagnoses, one fills its pool (`visits`).

`Rota` is pure, the caller keeps time; `Turns` lets threads wait in one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mpc_fl.inference.serving.visits import Visit

_LOOK = 0.5  # seconds between looks at whether a waiting hospital is still there


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
