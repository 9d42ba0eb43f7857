"""Whole runs of eighteen hospitals, whose masks go to neighbours in a circle: the same model as with masks between all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpc_fl.federation.planning import sum_rules
from mpc_fl.roles import hospital_names
from tests.support.training_in_memory import KILLED, SETTINGS, Sleeper, Training

CHANGES: dict[str, dict[str, Any]] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 36}},
    "training": {**SETTINGS["training"], "rounds": 1, "sampling_seed": 1},
    "federation": {"hospitals": 18, "quorum": 17},
}


def run_with(directory: Path, mask_neighbours: str, *sleepers: Sleeper) -> Training:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(directory, patch, **CHANGES, aggregation={"mask_neighbours": mask_neighbours})
        training.run(*sleepers)
    return training


def model_of(training: Training) -> dict[str, torch.Tensor]:
    return load_file(training.party("aggregator") / "model.safetensors")


@pytest.mark.slow
def test_a_ring_makes_the_same_model_as_masks_between_all(tmp_path: Path) -> None:
    circle, everybody = run_with(tmp_path / "circle", "auto"), run_with(tmp_path / "all", "all")
    for training, drawn in ((circle, True), (everybody, False)):
        assert set(training.said.values()) == {"finished"}, training.said
        assert (sum_rules(training.config).bounds(18) is not None) == drawn
    models = model_of(circle), model_of(everybody)
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.slow
def test_a_run_goes_on_without_a_hospital_that_is_killed(tmp_path: Path) -> None:
    training = run_with(tmp_path, "auto", Sleeper("hospital-7", "ready update 1", KILLED))
    rest = [name for name in hospital_names(18) if name != "hospital-7"]
    assert all(training.said[name] == "finished" for name in ["aggregator", *rest]), training.said
    assert training.rounds[1] == rest
