"""More than sixteen hospitals as processes: masks go to neighbours in a circle, and all hold the same model in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.runs.launcher import launch
from mpc_fl.config.config import parse_config
from mpc_fl.federation.planning import sum_rules
from mpc_fl.roles import hospital_names

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 102, "test_patients": 51}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 1, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "federation": {"hospitals": 17, "quorum": 16},
}


def test_seventeen_hospitals_train_together(tmp_path: Path) -> None:
    config = parse_config(SETTINGS, "test")
    bounds = sum_rules(config).bounds(17)
    assert bounds is not None and bounds.neighbours < 16
    launch(config, tmp_path, lambda *_: None)
    models = {(tmp_path / "parties" / name / "model.safetensors").read_bytes() for name in hospital_names(17)}
    assert len(models) == 1
