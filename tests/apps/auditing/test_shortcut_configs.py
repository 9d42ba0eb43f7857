"""The configurations of trainings in an audit of shortcuts: the run's own noise and steps, with what must differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpc_fl.apps.auditing.shortcut_configs import alone_config, left_out_config, probe_config, require_films
from mpc_fl.config.config import parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.federation.planning import mechanism_of, plan_release
from tests.support.shortcuts import small_run


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_noise_and_steps_are_those_of_the_run(mechanism: str, tmp_path: Path) -> None:
    run = small_run(mechanism)
    planned = plan_release(run, 60, [], "a hospital")
    assert planned is not None
    for configure in (probe_config, alone_config):
        own = configure(run, tmp_path)
        again = plan_release(own, 60, [], "a hospital")
        assert again is not None and again.steps == planned.steps and again.sample_rate == planned.sample_rate
        assert own.training.rounds * own.training.local_steps == 4
    probe = probe_config(run, tmp_path)
    again = plan_release(probe, 60, [], "a hospital")
    assert again is not None and again.noise_multiplier == pytest.approx(planned.noise_multiplier, rel=1e-3)
    if mechanism == "distributed":
        assert mechanism_of(probe).hospitals == 3 and probe.privacy.mechanism == "distributed"
    assert alone_config(run, tmp_path).privacy.mechanism == "local"
    assert left_out_config(run, tmp_path).federation.hospitals == 2


def test_a_probe_has_hospitals_for_classes_and_no_recipe_of_the_diagnosis(tmp_path: Path) -> None:
    run = small_run(hospitals=4).with_values(training={"class_weights": [1, 2, 3], "ema_decay": 0.5})
    probe = probe_config(run, tmp_path)
    assert probe.data.classes == ("hospital-0", "hospital-1", "hospital-2", "hospital-3")
    assert probe.training.class_weights is None and probe.training.ema_decay is None
    assert (probe.training.rounds, probe.training.local_steps, probe.strategy) == (4, 1, "fedsgd")
    assert probe.model == run.model and probe.data.phantoms.shortcut.site is None


def test_a_quorum_and_colluders_fit_who_is_left(tmp_path: Path) -> None:
    run = small_run("distributed", 5).with_values(federation={"quorum": 5}, privacy={"colluders": 3})
    left = left_out_config(run, tmp_path)
    assert (left.federation.hospitals, left.federation.quorum, left.privacy.colluders) == (4, 4, 2)
    assert left.privacy.smallest_hospital == 36  # of the run, not of phantoms that are divided by four
    with pytest.raises(ConfigError, match="none can be left out"):
        left_out_config(small_run(hospitals=2), tmp_path)


def test_runs_without_films_of_their_own_are_refused() -> None:
    require_films(small_run())
    with pytest.raises(ConfigError, match="rows of a table"):
        require_films(parse_config({"data": {"source": "breast_cancer", "classes": ["a", "b"]}}, "test"))
    with pytest.raises(ConfigError, match="the same films"):
        require_films(small_run().with_values(data={"partition": {"method": "none"}}))
    with pytest.raises(ConfigError, match="a model of its own"):
        require_films(
            small_run().with_values(model={"architecture": "small_cnn"}, training={"local_normalisation": True})
        )
