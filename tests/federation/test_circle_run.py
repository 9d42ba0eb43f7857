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
    "data": {"image_size": 8, "phantoms": {"train_patients": 108, "test_patients": 54}},
    "training": {**SETTINGS["training"], "rounds": 1, "sampling_seed": 1},
    "federation": {"hospitals": 18, "quorum": 17},
}


def run_with(
    directory: Path, mask_neighbours: str, *sleepers: Sleeper, rounds: int = 1, seconds: float = 0
) -> Training:
    """A run in which two hospitals take so many seconds for an update."""
    changes = {**CHANGES, "training": {**CHANGES["training"], "rounds": rounds}}
    with pytest.MonkeyPatch.context() as patch:
        training = Training(directory, patch, **changes, aggregation={"mask_neighbours": mask_neighbours})
        training.run(*sleepers, training=dict.fromkeys(("hospital-0", "hospital-2"), seconds) if seconds else None)
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
@pytest.mark.parametrize("before", ["ready update 1", "confirm update 1", "keys update 1"])
def test_a_run_goes_on_without_a_hospital_that_is_killed(before: str, tmp_path: Path) -> None:
    """Before its summand it is left out; when it should have signed the sum is made anew; later its summand is in the sum."""
    training = run_with(tmp_path, "auto", Sleeper("hospital-7", before, KILLED))
    everybody = hospital_names(18)
    rest = [name for name in everybody if name != "hospital-7"]
    assert all(training.said[name] == "finished" for name in ["aggregator", *rest]), training.said
    assert training.rounds[1] == (everybody if before == "keys update 1" else rest)


@pytest.mark.slow
def test_a_hospital_that_wakes_takes_part_again(tmp_path: Path) -> None:
    """Sums over seventeen of eighteen, over all seventeen while it is away, and over eighteen again: three circles."""
    training = run_with(tmp_path, "auto", Sleeper("hospital-7", "ready update 1", 30.0), rounds=5, seconds=15.0)
    everybody = hospital_names(18)
    rest = [name for name in everybody if name != "hospital-7"]
    assert set(training.said.values()) == {"finished"}, training.said
    assert training.rounds[1] == rest and training.rounds[5] == everybody
    assert "this hospital was left out of 'round 1: mean update': it was late" in training.log
    files = {(training.party(name) / "model.safetensors").read_bytes() for name in everybody}
    assert len(files) == 1


@pytest.mark.slow
def test_a_run_that_lost_its_aggregator_goes_on_to_the_same_model(tmp_path: Path) -> None:
    whole = run_with(tmp_path / "whole", "auto", rounds=2)
    changes = {**CHANGES, "training": {**CHANGES["training"], "rounds": 2}}
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path / "resumed", patch, **changes)
        training.run(Sleeper("aggregator", "ledger 3", KILLED))  # where round 2 is signed
        assert "finished" not in training.said.values()
        for name, config in training.placed.items():
            training.placed[name] = config.with_values(site={**config.site.model_dump(mode="json"), "resume": True})
        training.start_anew()
        training.run()
    assert set(training.said.values()) == {"finished"}, training.said
    models = model_of(whole), model_of(training)
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
