"""With what a run may go on: more rounds, and what is promised of them; whatever else has changed is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.continuing import MAY_CHANGE, changed_settings, has_more_rounds, require_same_run
from mpc_fl.errors import ConfigError

BEGAN = Config().with_values(training={"rounds": 5})
KEPT = json.loads(json.dumps(BEGAN.settings_of_run()))  # as a checkpoint has it


def test_a_run_goes_on_unchanged_wherever_its_parties_are_and_whatever_they_are_called() -> None:
    places: dict[str, Any] = {"addresses": {"aggregator": "host:1"}, "session": "s", "round_timeout": 5.0}
    places["names"] = {"hospital-0": "charite"}
    moved = BEGAN.with_values(federation=places, runtime={"threads": 2}, site={"resume": True})
    assert changed_settings(KEPT, moved) == {} and not has_more_rounds(KEPT, moved)
    require_same_run(KEPT, moved, "the run")


@given(rounds=st.integers(1, 20), epsilon=st.sampled_from([8.0, 9.0]), noise=st.sampled_from([None, 1.5]))
def test_rounds_grow_and_only_then_may_the_promise_change(rounds: int, epsilon: float, noise: float | None) -> None:
    config = BEGAN.with_values(training={"rounds": rounds}, privacy={"epsilon": epsilon, "noise_multiplier": noise})
    if rounds > 5 or (rounds == 5 and epsilon == 8.0 and noise is None):
        require_same_run(KEPT, config, "the run")
        assert has_more_rounds(KEPT, config) == (rounds > 5)
    else:
        with pytest.raises(
            ConfigError, match="started with training.rounds 5" if rounds < 5 else "started with privacy"
        ):
            require_same_run(KEPT, config, "the run")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("training", "average_last", 2), ("privacy", "spare_rounds", 3), ("privacy", "delta", 1e-5), ("evaluation", "every", 1),
     ("model", "hidden", [4]), ("federation", "quorum", 2), ("data", "image_size", 16)],
)  # fmt: skip
def test_all_else_is_named_also_with_more_rounds(section: str, key: str, value: Any) -> None:
    assert f"{section}.{key}" not in MAY_CHANGE
    config = BEGAN.with_values(training={"rounds": 8}).with_values(**{section: {key: value}})
    with pytest.raises(ConfigError, match=rf"^the run was started with {section}\.{key} .*, not ") as refused:
        require_same_run(KEPT, config, "the run")
    assert "\n" not in str(refused.value)


def test_a_setting_that_there_was_not_yet_had_its_default() -> None:
    earlier = json.loads(json.dumps(KEPT))
    del earlier["training"]["proximal"]
    require_same_run(earlier, BEGAN, "the run")
    with pytest.raises(ConfigError, match=r"training.strategy null.*training.proximal 0.0, not 0.1"):
        require_same_run(earlier, BEGAN.with_values(training={"strategy": "fedprox", "proximal": 0.1}), "the run")


def test_a_run_that_chose_or_calibrated_its_model_gets_no_more_rounds() -> None:
    values = {"data": {"validation_fraction": 0.2}, "privacy": {"mechanism": "none"}, "evaluation": {"choose": "best"}}
    began = parse_config({**values, "training": {"rounds": 3}}, "x")
    require_same_run(began.settings_of_run(), began, "the run r")
    with pytest.raises(ConfigError, match="choice or calibration of its model"):
        require_same_run(began.settings_of_run(), began.with_values(training={"rounds": 4}), "the run r")
