"""A search and the run after it fit one budget, whatever the trials are, and what ledgers hold already counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.federation.planning import plan_release, releases_beside_steps
from mpc_fl.federation.search_budget import noise_of_last, noise_of_trials, steps_of
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of

DELTA = 1e-3


def configured(mechanism: str = "local", **sections: Any) -> Config:
    values: dict[str, Any] = {
        "data": {"image_size": 8, "validation_fraction": 0.2, "phantoms": {"train_patients": 90, "test_patients": 30}},
        "model": {"architecture": "mlp", "hidden": [2]},
        "training": {"rounds": 3, "local_steps": 4, "batch_size": 8},
        "privacy": {"mechanism": mechanism, "delta": DELTA, "epsilon": 10.0},
        "evaluation": {"noise_multiplier": 8.0, "choose": "best", "calibrate": "both"},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return parse_config(values, "test")


def trials(mechanism: str) -> list[Config]:
    return [
        configured(mechanism, training={"rounds": rounds, "batch_size": batch}, evaluation={"test": False})
        for rounds, batch in ((2, 8), (4, 8), (3, 16))
    ]


def all_of(config: Config, noise: float) -> list[SubsampledGaussian]:
    return [steps_of(config)(noise), *releases_beside_steps(config)]


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
@pytest.mark.parametrize("share", [None, 0.4])
def test_trials_and_the_last_run_fit_the_budget(mechanism: str, share: float | None) -> None:
    tried, last = trials(mechanism), configured(mechanism)
    spent = [[], [SubsampledGaussian(5.0, 0.5, 3)]]
    noise = noise_of_trials(tried, [last], spent, share)
    released = [event for config in tried for event in all_of(config, noise)]
    after = [[*before, *released] for before in spent]
    worst = max(epsilon_of(events, DELTA) for events in after)
    assert worst <= 10.0 * (1.0 if share is None else share)
    if share is not None:
        assert worst > 10.0 * share * 0.98  # no more noise than needed
    last_noise = noise_of_last(last, after)
    total = max(epsilon_of([*events, *all_of(last, last_noise)], DELTA) for events in after)
    assert 9.8 < total <= 10.0
    # What a hospital plans of the last run with its ledger is accepted.
    chosen = last.with_values(privacy={"noise_multiplier": last_noise})
    for events in after:
        assert plan_release(chosen, public_sizes(chosen).smallest, events, "hospital-0") is not None
    if share is None:
        assert last_noise <= noise * 1.05  # divided equally: it was reckoned with as the dearest trial


def test_more_trials_and_a_smaller_share_need_more_noise() -> None:
    tried, last = trials("local"), configured()
    few, many = (noise_of_trials(tried[:count], [last], [[]], 0.5) for count in (1, 3))
    assert few < many < noise_of_trials(tried, [last], [[]], 0.3)


def test_a_search_that_fits_with_no_noise_is_refused() -> None:
    tried = [config.with_values(evaluation={"noise_multiplier": 0.2}) for config in trials("local")]
    with pytest.raises(PrivacyBudgetError, match="no noise multiplier"):
        noise_of_trials(tried, [configured()], [[]], 0.5)


def test_steps_are_those_that_a_run_plans() -> None:
    for mechanism in ("local", "distributed"):
        config = configured(mechanism, privacy={"noise_multiplier": 30.0, "epsilon": 100.0})
        planned = plan_release(config, public_sizes(config).smallest, [], "hospital-0")
        assert planned is not None
        found = steps_of(config)(30.0)
        assert replace(planned, total_variation=0.0) == replace(found, total_variation=0.0)
        assert found.total_variation >= planned.total_variation * (1 - 1e-12)
