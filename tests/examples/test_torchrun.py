"""examples/torchrun.sh trains one model under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.config.config import party_names
from mpc_fl.config.loading import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def free_port_range(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        held: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for item in held:
                item.close()
    raise AssertionError("no free ports")


@pytest.mark.processes
@pytest.mark.slow
def test_a_federation_under_torchrun(tmp_path: Path) -> None:
    """examples/torchrun.sh for two hospitals: every process finds out which party it is, and they train one model."""
    environment = {
        **os.environ,
        "BIN": str(Path(sys.executable).parent),
        "HOSPITALS": "2",
        "FIRST_PORT": str(free_port_range(3)),
    }
    done = subprocess.run(
        ["bash", EXAMPLES / "torchrun.sh", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = load_config(tmp_path / "federation.yaml")
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in party_names(config)}
    assert len(models) == 1
    lines = [json.loads(line) for line in (tmp_path / "aggregator" / "metrics.jsonl").read_text().splitlines()]
    rounds: list[Any] = [line["round"] for line in lines]
    assert rounds == [0, 1, 2]
