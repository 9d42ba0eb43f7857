"""Memory that a process holds and does not use: given back to the system before a long step that needs less."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back_free_memory() -> None:
    """Drop objects that only refer to each other, and let the system have pages on which nothing is left.

    glibc keeps them otherwise, above all large ones (`apps.runs.memory.use_large_pages`). Takes some 50 ms; with another C
    library the pages stay.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
