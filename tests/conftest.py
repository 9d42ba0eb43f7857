"""Shared settings: one torch thread per process, hypothesis without deadlines (no test depends on timing)."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).resolve().parents[1]
XRAYS = REPOSITORY.parent / "shared" / "data" / "chest_xray"


@pytest.fixture(autouse=True)
def _log_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that sets up a party's log in its own process leaves no handler, level or hook to the tests after it.

    The level is set by `setLevel`: an assignment would leave what other loggers remember of it.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.fixture
def xrays() -> Path:
    """The real chest X-rays beside the project; tests that need them skip where they are absent."""
    if not XRAYS.is_dir():
        pytest.skip(f"the real chest X-rays are not at {XRAYS}")
    return XRAYS
