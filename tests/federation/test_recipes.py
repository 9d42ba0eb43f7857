"""Recipes of training over whole runs: what a hospital keeps of its momentum, and that all parties come to one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpc_fl.config.config import parse_config
from mpc_fl.errors import ModelError
from mpc_fl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpc_fl.federation.hospital_state import Hospital, join
from mpc_fl.files import read_json_lines
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR
from tests.support.training_in_memory import Training

CONFIG = parse_config(
    {
        "data": {"image_size": 8, "phantoms": {"train_patients": 30, "test_patients": 9}},
        "model": {"normalisation": "group"},
        "training": {"keep_momentum": True, "local_normalisation": True},
        "privacy": {"mechanism": "none"},
    },
    "test",
)


def hospital(directory: Path) -> Hospital:
    train, test = load_hospital(CONFIG, 0, "train"), load_hospital(CONFIG, 0, "test")
    return join(CONFIG, 0, train, test, PrivacyLedger(directory / "ledger", "hospital-0"))


def test_momentum_is_in_the_hospitals_checkpoint_beside_its_own_layers(tmp_path: Path) -> None:
    before = hospital(tmp_path)
    before.checkpoint(tmp_path, 0)
    before.velocity = torch.randn(len(flatten_parameters(before.model)))
    before.checkpoint(tmp_path, 1)
    after = hospital(tmp_path)
    after.resume(tmp_path, 0)
    assert after.velocity is None, "before the first round there is none"
    after.resume(tmp_path, 1)
    assert after.velocity is not None and torch.equal(after.velocity, before.velocity)
    assert after.local_training.velocity is after.velocity


@pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor([float("nan")]), None])
def test_momentum_that_cannot_be_is_refused(value: torch.Tensor | None, tmp_path: Path) -> None:
    known = hospital(tmp_path)
    size = len(flatten_parameters(known.model))
    if value is None:
        value = torch.zeros(size, dtype=torch.float64)
    known.velocity = value.expand(size).clone() if len(value) == 1 else value
    known.checkpoint(tmp_path, 1)
    with pytest.raises(ModelError, match="momentum in a checkpoint"):
        hospital(tmp_path).resume(tmp_path, 1)


def test_a_checkpoint_without_momentum_begins_at_zero(tmp_path: Path) -> None:
    known = hospital(tmp_path)
    known.checkpoint(tmp_path, 1)
    saved = load_checkpoint(tmp_path, CONFIG.run_digest(), 1)
    assert saved is not None and all(name.rpartition(".")[2] in ("weight", "bias") for name in saved.tensors)
    save_checkpoint(tmp_path, Checkpoint(1, saved.tensors, saved.facts), CONFIG.run_digest())
    known.resume(tmp_path, 1)
    assert known.velocity is None


IMAGES = {"augmentation": {"copies": 2, "flip": True, "shift": 0.1}, "class_weights": [1.0, 2.0, 1.0]}
RECIPES: dict[str, dict[str, Any]] = {
    "none": {"keep_momentum": True, "schedule": "cosine", "warm_up": 0.2, "ema_decay": 0.5, "gradient_clipping": 0.5},
    "local": {"keep_momentum": True, "schedule": "cosine", "ema_decay": 0.5},
    "distributed": {"schedule": "cosine", "warm_up": 0.3, "ema_decay": 0.5},
}


@pytest.mark.parametrize("mechanism", RECIPES)
def test_all_parties_come_to_one_model_by_any_recipe(
    mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"mechanism": mechanism, "delta": 1e-3, "epsilon": 50.0}
    training = Training(
        tmp_path,
        monkeypatch,
        training={**RECIPES[mechanism], **IMAGES, "rounds": 3, "local_steps": 2},
        model={"architecture": "small_cnn", "weight_standardisation": True},
        privacy={**privacy, "noise_multiplier": None if mechanism == "none" else 2.0},
        federation={"quorum": None},
    )
    training.run()
    assert set(training.said.values()) == {"finished"}, training.said
    files = [(training.party(name) / "model.safetensors").read_bytes() for name in training.placed]
    assert len(set(files)) == 1, "standardised weights are folded alike"
    state = load_file(training.party(AGGREGATOR) / "model.safetensors")
    norms = state["0.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(len(norms)), rtol=1e-4, atol=0)
    assert sorted(training.rounds) == [0, 1, 2, 3]
    for name in ("hospital-0", "hospital-1"):
        steps = [line["steps"] for line in read_json_lines(training.party(name) / "metrics.jsonl")]
        assert steps == [2, 2, 2]
    kept = load_checkpoint(training.party("hospital-0"), training.placed["hospital-0"].run_digest())
    assert kept is not None and ("momentum of local steps" in kept.tensors) == (mechanism != "distributed")
