"""examples/secure_mean.py: three processes, one mean, opened to one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.processes
def test_only_north_learns_the_mean() -> None:
    command = [sys.executable, EXAMPLES / "secure_mean.py"]
    # Buffered, so that each process writes its line in one piece.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    mean = (13.9 * 120 + 14.4 * 45 + 12.8 * 300) / (120 + 45 + 300)
    assert sorted(done.stdout.splitlines()) == [
        f"north: the mean over all patients is {mean:.3f}",
        "south: learns nothing",
        "west: learns nothing",
    ]
