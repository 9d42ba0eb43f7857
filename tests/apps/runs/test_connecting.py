"""The largest federation connects within the default deadlines, all its processes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.config.config import Config, connect_seconds, party_names
from mpc_fl.links.party_links import timeouts_of

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


def test_so_long_may_a_hospital_be_silent_that_greets_the_others() -> None:
    """65 parties on two cores were silent for 20 s while greetings took 42 s: each took the next one for stopped."""
    many = Config().with_values(federation={"hospitals": 64})
    for name in party_names(many)[:2]:
        timeouts = timeouts_of(many, name)
        assert (timeouts.silence, timeouts.silence_at_first) == (20.0, pytest.approx(41.6))
    assert timeouts_of(Config(), "hospital-0").silence_at_first == pytest.approx(0.12)
