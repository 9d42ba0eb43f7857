"""The largest federation connects within the default deadlines, all its processes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.config.config import Config, connect_seconds

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "connecting.py"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.processes
def test_sixty_four_hospitals_connect_within_the_default_deadlines() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--hospitals", "64", "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parties"] == 65


def test_the_deadline_grows_with_the_links() -> None:
    config = Config().with_values(runtime={"connect_timeout": 30.0})
    assert connect_seconds(config.with_values(federation={"hospitals": 3})) == pytest.approx(30.12)
    assert connect_seconds(config.with_values(federation={"hospitals": 64})) == pytest.approx(71.6)
    assert connect_seconds(config.with_values(task="infer")) == pytest.approx(30.06)
