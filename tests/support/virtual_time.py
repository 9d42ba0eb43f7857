"""Time that passes only while all parties of a test wait: deadlines of hours cost nothing, and no party is slow by itself.

For parties that are threads of one process with links in memory. One of them runs at a time (tracing networks cannot be done by
two), and what it computes takes no time unless the test says so. When all wait, the clock goes to the first deadline. So who is
late depends on deadlines alone, however busy the machine is.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mpc_fl.links import mailboxes

REAL_SECONDS = 240.0  # until a test that hangs fails


class Clock:
    """The clock of the threads that have entered."""

    def __init__(self) -> None:
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._now = 0.0
        self._present = 0
        self._waiting: dict[threading.Event, float] = {}

    def monotonic(self) -> float:
        return self._now

    def expect(self, count: int) -> None:
        """So many threads will enter."""
        self._present += count

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, this thread is one of those that the clock waits for."""
        with self._turn:
            yield
        with self._lock:
            self._present -= 1
            self._go_on()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Wait until the event is woken, or for so many seconds of this clock."""
        with self._lock:
            self._waiting[event] = self._now + seconds
            self._go_on()
        self._turn.release()
        woken = event.wait(REAL_SECONDS)
        self._turn.acquire()
        assert woken, "the test hangs"

    def let_pass(self, seconds: float) -> None:
        """Something takes time while a thread runs."""
        with self._lock:
            self._now += seconds

    def wake(self, event: threading.Event) -> None:
        with self._lock:
            self._waiting.pop(event, None)
            event.set()

    def _go_on(self) -> None:
        if not self._waiting or len(self._waiting) < self._present:
            return
        first = min(self._waiting.values())
        if first == math.inf:
            return
        self._now = max(self._now, first)
        for event in [event for event, deadline in self._waiting.items() if deadline <= self._now]:
            del self._waiting[event]
            event.set()


def keep_virtual_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let mailboxes that are made from here on wait by a new clock, which `time.monotonic` shows."""
    clock = Clock()

    class VirtualCondition(threading.Condition):
        def __init__(self) -> None:
            super().__init__()
            self._events: set[threading.Event] = set()

        def wait(self, timeout: float | None = None) -> bool:
            event = threading.Event()
            self._events.add(event)
            state = self._release_save()  # type: ignore[attr-defined]
            try:
                clock.wait(event, math.inf if timeout is None else timeout)
            finally:
                self._acquire_restore(state)  # type: ignore[attr-defined]
                self._events.discard(event)
            return True

        def notify_all(self) -> None:
            for event in self._events:
                clock.wake(event)

    monkeypatch.setattr(mailboxes, "threading", SimpleNamespace(Condition=VirtualCondition))
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock
