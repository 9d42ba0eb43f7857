"""Central training: the patients of all hospitals, the same recipe, what it cost, and no claim of privacy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.apps.auditing.finished_run import summary_of
from mpc_fl.apps.comparing import read_run
from mpc_fl.apps.runs.central_run import CENTRAL, central_config, together, train_central
from mpc_fl.apps.summaries import TrainingSummary
from mpc_fl.config.config import parse_config
from mpc_fl.errors import ConfigError, DataError, MpcFlError
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital, patients_per_hospital
from mpc_fl.learning.models.model_file import load_normalisation
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.support.training_in_memory import SETTINGS


def settings(**changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}


def test_the_recipe_stays_and_draws_as_many_patients_as_all_hospitals_together() -> None:
    values = settings(privacy={"mechanism": "distributed"}, training={"strategy": "fedadam", "batch_size": 8})
    config = parse_config(values, "test")
    central = central_config(config)
    assert central.privacy.mechanism == "none" and central.training.batch_size == 24
    kept = ("rounds", "local_steps", "learning_rate", "momentum")
    assert all(getattr(central.training, name) == getattr(config.training, name) for name in kept)
    assert central.data == config.data and central.model == config.model
    chosen = {"data": {"validation_fraction": 0.2}, "evaluation": {"choose": "best"}, "privacy": {"mechanism": "none"}}
    with pytest.raises(ConfigError, match="last round"):
        central_config(parse_config(chosen, "test"))


def test_records_of_all_are_there_and_patients_stay_apart() -> None:
    config = parse_config(settings(), "test")
    parts = [load_hospital(config, rank, "train") for rank in range(3)]
    whole = together(parts)
    assert len(whole) == sum(map(len, parts)) and whole.patient_count == sum(patients_per_hospital(config))
    assert torch.equal(whole.inputs[: len(parts[0])], parts[0].inputs) and len(set(whole.names)) == len(whole.names)
    assert sorted(int(row) for rows in whole.records_of_patient for row in rows) == list(range(len(whole)))
    read = Dataset(parts[0].inputs, parts[0].labels, parts[0].patients, parts[0].names, 2, {"as it is": 3})
    assert (together([read, read]).skipped, together([read, read]).treatments) == (4, {"as it is": 6})


def test_a_run_leaves_model_costs_and_report_and_says_what_it_is(tmp_path: Path) -> None:
    values = settings(
        data={**SETTINGS["data"], "normalise": "secure"}, site={"privacy_ledger": str(tmp_path / "ledgers")}
    )
    config, out = parse_config(values, "test"), tmp_path / "run"
    told = list[tuple[Any, ...]]()
    summary = train_central(config, out, "mpc-fl train --central", lambda *of: told.append(of))
    assert (CENTRAL, "training", 2, 2) in told
    read = TrainingSummary.from_json(json.loads((out / "summary.json").read_text()))
    assert read == summary and read.central and read.evaluated_round == 2
    assert read.final is not None
    assert read.final.records == sum(len(load_hospital(config, rank, "test")) for rank in range(3))
    assert all(spent.epsilon is None and spent.mechanism == "none" for spent in read.privacy)
    assert read.costs is not None and list(read.costs) == [CENTRAL]
    costs = read.costs[CENTRAL]
    assert {"data", "training", "evaluation"} <= set(costs.phases)
    assert (costs.phases["training"].processor_seconds or 0) > 0 and costs.total.bytes_sent == 0
    assert costs.total.processor_seconds == pytest.approx(
        sum(cost.processor_seconds or 0.0 for cost in costs.phases.values()), abs=1e-3
    )
    assert load_normalisation(out / "model.safetensors", config) is not None
    for rank in range(3):  # the patients' data were used without noise, and their ledgers say so for good
        ledger = PrivacyLedger(tmp_path / "ledgers" / f"hospital-{rank}-privacy.sqlite3", f"hospital-{rank}")
        assert ledger.epsilon(1e-5, "pld") == float("inf")
    page = (out / "report.html").read_text()
    assert "CENTRAL" in page and "Not shown" not in page and "What was opened" not in page
    assert (read_run(out).arrangement, "one place" in read_run(out).remarks()[1]) == ("central", True)
    with pytest.raises(DataError, match="in one place"):
        summary_of(out)
    with pytest.raises(MpcFlError, match="exists already"):
        train_central(config, out, "mpc-fl", lambda *_: None)
