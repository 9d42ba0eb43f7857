"""The largest federation connects within the default deadlines, all its processes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.links.settings import connect_seconds

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "connecting.py"


@pytest.mark.slow
@pytest.mark.processes
def test_sixty_four_hospitals_connect_within_the_default_deadlines() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--hospitals", "64", "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parties"] == 65


def test_the_deadline_grows_with_the_links() -> None:
    assert connect_seconds(60.0, 3) == pytest.approx(60.06)
    assert connect_seconds(60.0, 65) == pytest.approx(101.6)
