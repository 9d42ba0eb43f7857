"""Training runs with adapters of low rank, in one process: every party signs and writes one plain network, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.audit.model_origin import MODEL_FILE, model_origin
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.models.low_rank import AdaptedLayer
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.roles import AGGREGATOR
from tests.support.training_in_memory import KILLED, SETTINGS, Sleeper, Training

PARTIES = ("aggregator", "hospital-0", "hospital-1", "hospital-2")
MODEL = {"architecture": "mlp", "hidden": [12]}
LORA = {**SETTINGS["training"], "trainable": "lora:2", "learning_rate": 0.5}
PRIVATE = {"delta": 1e-3, "epsilon": 200.0}
KINDS: dict[str, dict[str, Any]] = {
    "no noise": {},
    "local noise": {"privacy": {"mechanism": "local", "noise_multiplier": 2.0, **PRIVATE}},
    "distributed noise": {
        "privacy": {"mechanism": "distributed", "noise_multiplier": 4.0, **PRIVATE},
        "training": {**LORA, "local_steps": 2, "per_sample_gradients": "hooks"},
    },
}


def assert_one_plain_network(training: Training) -> None:
    """All parties have written one file, which is the network with its adapters, and which all have signed."""
    files = [training.party(name) / MODEL_FILE for name in PARTIES]
    assert len({path.read_bytes() for path in files}) == 1
    for name, path in zip(PARTIES, files, strict=True):
        origin = model_origin(path, authority=training.party(name) / "identity" / ROOT_FILE)
        assert origin.signed, origin.words
    first, loaded = initial_model(training.config), load_model(files[0], training.config)
    assert not any(isinstance(layer, AdaptedLayer) for layer in loaded.modules())
    start = dict(first.named_parameters())
    assert not torch.equal(loaded.get_parameter("1.weight"), start["1.frozen.weight"])
    assert torch.equal(loaded.get_parameter("1.bias"), start["1.frozen.bias"])  # it has no adapter


@pytest.mark.parametrize("kind", KINDS)
def test_every_party_signs_and_writes_one_plain_network(tmp_path: Path, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch, **{"model": MODEL, "training": LORA, **KINDS[kind]})
        training.run()
        assert set(training.said.values()) == {"finished"}, training.said
        assert_one_plain_network(training)
        changed = flatten_parameters(initial_model(training.config)).numel()
        assert changed == 2 * (64 + 12) + 12 * 3 + 3


def test_a_run_that_lost_its_aggregator_goes_on_with_its_adapters(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(tmp_path, patch, model=MODEL, training=LORA)
        training.run(Sleeper(AGGREGATOR, "ledger 3", KILLED))  # where round 2 is signed
        assert "finished" not in training.said.values() and not (training.party(AGGREGATOR) / MODEL_FILE).exists()
        for name, config in training.placed.items():
            training.placed[name] = config.with_values(site={**config.site.model_dump(mode="json"), "resume": True})
        training.start_anew()
        training.run()
        assert set(training.said.values()) == {"finished"}, training.said
        assert sorted(training.rounds) == [0, 1, 2]
        assert_one_plain_network(training)
