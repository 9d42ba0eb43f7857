"""Shadow runs: half of each hospital's patients, drawn anew, with the run's own network; and models that remember are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpc_fl.apps.auditing.audited_config import shadow_config
from mpc_fl.apps.auditing.shadow_runs import infer_membership, of_patients
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.federation.planning import sample_rate_of
from mpc_fl.learning.data.dataset import Dataset
from tests.support.auditing import same_seeds


def run(privacy: dict[str, Any], patients: int = 60) -> Config:
    return parse_config(
        {
            "data": {"image_size": 32, "phantoms": {"train_patients": patients, "test_patients": 30}},
            "model": {"architecture": "linear"},
            "training": {"rounds": 2, "local_steps": 30, "batch_size": 200, "learning_rate": 0.5},
            "privacy": {"delta": 1e-3, **privacy},
            "federation": {"hospitals": 2},
        },
        "test",
    )


def test_the_records_of_some_patients_are_theirs_under_new_numbers() -> None:
    inputs, patients = torch.arange(6.0).reshape(6, 1), torch.tensor([0, 1, 2, 1, 0, 3])
    found = of_patients(
        Dataset(inputs, torch.arange(6), patients, tuple("abcdef")), np.array([True, False, True, True])
    )
    assert found.names == ("a", "c", "e", "f") and found.patients.tolist() == [0, 1, 0, 2]
    assert found.inputs.reshape(-1).tolist() == [0.0, 2.0, 4.0, 5.0] and found.labels.tolist() == [0, 2, 4, 5]


def test_a_shadow_run_draws_each_patient_as_often_as_the_run_does(tmp_path: Path) -> None:
    of = run({"mechanism": "local"}, 1200)
    shadow = shadow_config(of, tmp_path)
    assert sample_rate_of(shadow, 0) == pytest.approx(sample_rate_of(of, 0), rel=0.02)
    assert shadow.privacy.smallest_hospital is not None and shadow.privacy.smallest_hospital < 300
    assert shadow.training.rounds == 2 and shadow.model == of.model and shadow.privacy.mechanism == "local"
    with pytest.raises(ConfigError, match="too few"):
        shadow_config(run({"mechanism": "local"}, 40), tmp_path)


def test_a_model_that_remembers_tells_who_trained_it(monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    torch.set_num_threads(1)
    done = list[tuple[int, int]]()
    found = infer_membership(run({"mechanism": "none"}), 6, lambda one, of: done.append((one, of)))
    assert found.models == 6 and found.patients == 60 and done[-1] == (12, 12)
    assert 0.58 < found.area <= 1.0
    assert [false for false, _ in found.rates] == [0.001, 0.01, 0.1]
    assert found.rates == sorted(found.rates) and found.curve == sorted(found.curve)
    assert found.curve[0][0] == 0.0 and found.curve[-1] == (1.0, 1.0)
