"""Waiting to be told to stop: what a program that serves without end does on its main thread.

SIGTERM says no more than that. Whoever started the process can say why, too (`stop_because`): then sessions are told the reason.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpc_fl.errors import MpcFlError

_LOOK = 0.5  # seconds: Python runs signal handlers between two waits


_told: list[MpcFlError] = []  # why this process shall stop; there is one program in it


def stop_because(why: MpcFlError) -> None:
    """Stop this process as SIGTERM does; who waits in `until_told_to_stop` meets `why`. From any thread."""
    _told.append(why)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def until_told_to_stop() -> Iterator[Callable[[], None]]:
    """Yield a wait that returns once this process gets SIGTERM, and raises what `stop_because` was told.

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
        if _told:
            raise _told[0]

    try:
        yield stopped
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
