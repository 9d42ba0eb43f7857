"""Shared settings: one torch thread per process, hypothesis without deadlines (no test depends on timing)."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).resolve().parents[1]
XRAYS = REPOSITORY.parent / "shared" / "data" / "chest_xray"


@pytest.fixture
def xrays() -> Path:
    """The real chest X-rays beside the project; tests that need them skip where they are absent."""
    if not XRAYS.is_dir():
        pytest.skip(f"the real chest X-rays are not at {XRAYS}")
    return XRAYS
