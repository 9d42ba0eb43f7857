"""A hospital's own model is trained and compared at home: nothing of it is sent, opened or charged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.apps.rows import OwnModel
from mpc_fl.apps.typed_json import typed
from mpc_fl.config.config import parse_config
from mpc_fl.federation.own_model import OWN_MODEL_FILE, alone_config, compare, compare_own_model, train_alone
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.federation.test_group_evaluation import configured, prepared
from tests.support.training_in_memory import SETTINGS, Training


@pytest.mark.parametrize(
    "values",
    [
        {"privacy": {"mechanism": "distributed"}, "training": {"strategy": "fedadam", "server_learning_rate": 0.03}},
        {"evaluation": {"choose": "best", "noise_multiplier": 3.0}, "data": {"validation_fraction": 0.2}},
        {"evaluation": {"noise_multiplier": 3.0, "groups": {"site": True}}},
        {"federation": {"coordinator": "none", "hospitals": 5, "founders": 4, "admission": "quorum", "quorum": 4}},
        {
            "privacy": {"mechanism": "none"},
            "training": {"local_normalisation": True},
            "model": {"architecture": "resnet18"},
        },
        {"training": {"strategy": "fedsgd", "local_steps": 1}},
    ],
)
def test_every_run_says_how_a_hospital_trains_alone(values: dict[str, Any]) -> None:
    config = parse_config(values, "test")
    alone = alone_config(config)
    assert alone.privacy.mechanism == "none" and alone.strategy == "fedavg" and not alone.training.local_normalisation
    kept = ("rounds", "local_steps", "batch_size", "learning_rate", "momentum", "trainable")
    assert all(getattr(alone.training, name) == getattr(config.training, name) for name in kept)
    assert alone.model == config.model and alone.data == config.data


def test_it_learns_from_its_own_patients_and_both_are_counted_record_by_record(tmp_path: Path) -> None:
    training = {"rounds": 6, "local_steps": 5, "batch_size": 30, "learning_rate": 0.1, "sampling_seed": 1}
    config = configured(training=training, model={"architecture": "linear"})
    hospital = prepared(config, tmp_path)["hospital-0"]
    before, told = flatten_parameters(hospital.model).clone(), list[tuple[str, int, int]]()
    alone = train_alone(hospital, lambda *of: told.append(of))
    assert told == [("own model", number, 6) for number in range(1, 7)]
    assert torch.equal(flatten_parameters(hospital.model), before)
    found = compare(hospital, alone)
    rights = [
        predict(model, hospital.test.inputs).argmax(dim=1) == hospital.test.labels for model in (hospital.model, alone)
    ]
    assert found.federated.accuracy == pytest.approx(rights[0].double().mean())
    assert found.alone.accuracy == pytest.approx(rights[1].double().mean())
    assert found.federated_alone_right == int((rights[0] & ~rights[1]).sum())
    assert found.own_alone_right - found.federated_alone_right == int(rights[1].sum()) - int(rights[0].sum())

    def loss(model: torch.nn.Module) -> float:
        return float(torch.nn.functional.cross_entropy(predict(model, hospital.train.inputs), hospital.train.labels))

    assert loss(alone) < loss(hospital.model) - 0.01
    read = typed(OwnModel, json.loads(json.dumps(found.to_json())), OWN_MODEL_FILE)
    assert read.alone.records == len(hospital.test)


def test_who_does_not_ask_or_has_no_tests_trains_nothing(tmp_path: Path) -> None:
    hospital = prepared(configured(site={"out": str(tmp_path)}), tmp_path)["hospital-0"]

    def told(*_: Any) -> None:
        raise AssertionError("nothing is trained")

    compare_own_model(hospital, told)
    hospital.config = hospital.config.with_values(site={"train_alone": True})
    rows = torch.zeros(0, dtype=torch.int64)
    hospital.test = type(hospital.test)(hospital.test.inputs[:0], rows, rows, ())
    compare_own_model(hospital, told)
    assert not list(tmp_path.rglob(OWN_MODEL_FILE))


@pytest.mark.parametrize("coordinator", ["aggregator", pytest.param("none", marks=pytest.mark.slow)])
def test_only_who_asks_has_it_and_no_message_nor_charge_is_of_it(
    coordinator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"mechanism": "local", "delta": 1e-3, "epsilon": 60.0}
    run = Training(tmp_path, monkeypatch, privacy=privacy, federation={"coordinator": coordinator, "quorum": 3})
    run.placed["hospital-1"] = run.placed["hospital-1"].with_values(site={"train_alone": True})
    run.run()
    assert set(run.said.values()) == {"finished"}
    assert [path.parent.name for path in tmp_path.rglob(OWN_MODEL_FILE)] == ["hospital-1"]
    charged = PrivacyLedger(run.party("hospital-1") / "hospital-1-privacy.sqlite3", "hospital-1").records()
    assert len(charged) == SETTINGS["training"]["rounds"]
    tags = {
        name: [tag for sender, tag in run.sent if sender == name] for name in ("hospital-0", "hospital-1", "hospital-2")
    }
    if coordinator == "aggregator":
        assert sorted(tags["hospital-1"]) == sorted(tags["hospital-0"]) == sorted(tags["hospital-2"])
