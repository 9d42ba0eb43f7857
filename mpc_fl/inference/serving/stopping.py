"""Waiting to be told to stop: what a program that serves without end does on its main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK = 0.5  # seconds: Python runs signal handlers between two waits


@contextmanager
def until_told_to_stop() -> Iterator[Callable[[], None]]:
    """Yield a wait that returns once this process gets SIGTERM.

    A handler that is there already (the command line's, which raises) stays, and off the main thread there is none: then the
    wait ends by an exception, or with the process.
    """
    stopping = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    ours = here and before == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda *_unused: stopping.set())

    def stopped() -> None:
        while not stopping.wait(_LOOK):
            pass

    try:
        yield stopped
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
