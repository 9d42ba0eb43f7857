"""What a privacy ledger leaves for a run, said before it; and hospitals with nobody to evaluate on, or too few patients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, DataError, PrivacyBudgetError
from mpc_fl.federation.ledger_forecast import NEARLY_SPENT, ledger_forecast, privacy_ledger_of
from mpc_fl.federation.noised_calibration import encode_changes, plan_calibration
from mpc_fl.federation.noised_evaluation import encode_confusion, plan_noised_evaluation
from mpc_fl.federation.planning import budget_of, plan_release
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.privacy.accounting import SubsampledGaussian

SHAPE = (1, 8, 8)


def _config(directory: Path, **privacy: object) -> Config:
    return Config().with_values(
        data={"image_size": 8},
        training={"rounds": 1, "local_steps": 2, "batch_size": 10},
        privacy={"smallest_hospital": 40, "largest_hospital": 60, "delta": 1e-3, **privacy},
        site={"privacy_ledger": str(directory)},
    )


def _spend(config: Config, noise: float) -> None:
    event = SubsampledGaussian(noise, 0.25, 2)
    privacy_ledger_of(config, "hospital-1").charge(event, run="earlier", round_number=1, budget=budget_of(config))


def test_an_empty_ledger_says_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert ledger_forecast(config, "hospital-1", 50) is None
    assert not list(tmp_path.iterdir())  # and none is made
    _spend(config, 2.0)
    assert ledger_forecast(config, "hospital-0", 50) is None  # that of another
    assert ledger_forecast(_config(tmp_path, mechanism="none"), "hospital-1", 50) is None
    with pytest.raises(ConfigError, match="site.out"):
        ledger_forecast(config.with_values(site={"privacy_ledger": None}), "hospital-1", 50)


def test_a_ledger_that_is_nearly_spent_asks_first(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _spend(config, 2.0)
    little = ledger_forecast(config, "hospital-1", 50)
    assert little is not None and not little.is_nearly_spent
    assert 0 < little.used < 2 and 1 < little.times < NEARLY_SPENT
    little.require_worth()
    _spend(config, 0.6)
    tight = _config(tmp_path, epsilon=1.02 * privacy_ledger_of(config, "hospital-1").epsilon(1e-3))
    much = ledger_forecast(tight, "hospital-1", 50)
    # What is said is the noise that the run itself would have.
    spent = privacy_ledger_of(config, "hospital-1").spent()
    planned, fresh = (plan_release(tight, 50, past, "hospital-1") for past in (spent, []))
    assert much is not None and planned is not None and fresh is not None
    assert (much.noise_multiplier, much.with_an_empty_ledger) == (planned.noise_multiplier, fresh.noise_multiplier)
    with pytest.raises(PrivacyBudgetError, match="is used, .* is left; .* times as much"):
        much.require_worth()
    assert much.to_json()["nearly_spent"] is True
    # Configured noise does not grow: nothing to ask about.
    fixed = ledger_forecast(_config(tmp_path, noise_multiplier=20.0), "hospital-1", 50)
    assert fixed is not None and fixed.times == 1


@pytest.mark.parametrize("mechanism", ["local", "none"])
def test_a_hospital_that_is_too_small_refuses_itself(tmp_path: Path, mechanism: str) -> None:
    config = _config(tmp_path, mechanism=mechanism).with_values(federation={"smallest_site": 51})
    with pytest.raises(DataError, match="hospital-1 has fewer training patients than federation.smallest_site, 51"):
        plan_release(config, 50, [], "hospital-1")
    plan_release(config, 51, [], "hospital-1")


@pytest.mark.parametrize("noise", [None, 4.0])
def test_nobody_to_evaluate_on_adds_zeros(tmp_path: Path, noise: float | None) -> None:
    classes = 3
    nobody = Dataset(torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), ())
    config = _config(tmp_path, mechanism="none" if noise is None else "local").with_values(
        data={"validation_fraction": 0.2}, evaluation={"calibrate": "temperature", "noise_multiplier": noise}
    )
    calibration = plan_calibration(config)
    assert calibration is not None
    changes = encode_changes(calibration, nobody, torch.zeros(0, classes), Seed.from_system()).inside_protocol()
    assert bool((changes == 0).all()) == (noise is None)
    evaluation = plan_noised_evaluation(config)
    if evaluation is not None:
        counts = encode_confusion(
            evaluation, nobody, torch.zeros(0, dtype=torch.int64), Seed.from_system()
        ).inside_protocol()
        assert counts.shape == (classes**2,) and bool((counts != 0).any())  # noise alone
