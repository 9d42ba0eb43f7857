"""Shared settings: one torch thread per process, hypothesis without deadlines (no test depends on timing)."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).resolve().parent.parent
XRAYS = REPOSITORY.parent / "shared" / "data" / "chest_xray"


@pytest.fixture
def xrays() -> Path:
    """The real chest X-rays beside the project; tests that need them skip where they are absent."""
    if not XRAYS.is_dir():
        pytest.skip(f"the real chest X-rays are not at {XRAYS}")
    return XRAYS
