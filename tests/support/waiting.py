"""Waiting in tests for what another process does, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(found: Callable[[], bool], seconds: float, what: str) -> None:
    """Return once `found` holds; fail, saying `what` was awaited, when it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
