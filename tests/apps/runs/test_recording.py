"""Recording of messages: off by default, refused where they may be about patients, and made by each party of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.auditing.recorded_views import PValues, add_tests_of_records, received_by, require_record
from mpc_fl.apps.runs.party_process import require_may_record, run_party
from mpc_fl.config.config import parse_config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError
from mpc_fl.roles import AGGREGATOR

RECORDS = {"runtime": {"record_messages": True}}
REAL: list[dict[str, Any]] = [
    {"data": {"source": "images"}, "site": {"data": "/data/films"}, "privacy": {"smallest_hospital": 50}},
    {"task": "infer", "site": {"images": "/data/films"}},
]


def test_nothing_is_recorded_unless_it_is_said() -> None:
    assert parse_config({}, "test").runtime.record_messages is False
    require_may_record(parse_config(RECORDS, "test"))
    for values in REAL:
        require_may_record(parse_config(values, "test"))


@pytest.mark.parametrize("values", REAL, ids=["train", "infer"])
def test_messages_about_patients_are_recorded_only_where_the_site_has_allowed_it(values: dict[str, Any]) -> None:
    config = parse_config({**values, **RECORDS}, "test")
    with pytest.raises(ConfigError, match="real patients"):
        run_party("hospital-0", config, lambda *_: None)  # before anything else
    require_may_record(config.with_values(site={"record_patients": True}))


@pytest.mark.parametrize("task", ["serve", "simulate"])
def test_a_service_and_a_simulation_are_not_recorded(task: str) -> None:
    with pytest.raises(ConfigError, match="no service and no simulation"):
        require_may_record(parse_config({**RECORDS, "task": task}, "test"))


def test_no_file_allows_it_and_none_that_is_written_does(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("site: {record_patients: true}\n")
    with pytest.raises(ConfigError, match="on the command line"):
        load_config(path)
    path.write_text(parse_config({"site": {"record_patients": True}}, "test").to_yaml())
    assert not load_config(path).site.record_patients
    path.write_text("name: own\n")
    assert load_config(path, ["site.record_patients=true"]).site.record_patients


@pytest.mark.processes
@pytest.mark.slow
def test_each_party_of_a_run_records_what_it_receives_and_the_tests_pass(tmp_path: Path) -> None:
    settings = [
        "data.image_size=8",
        "data.phantoms.train_patients=60",
        "data.phantoms.test_patients=12",
        "model.architecture=mlp",
        "model.hidden=[16]",
        "training.rounds=2",
        "training.local_steps=1",
        "training.batch_size=8",
        "runtime.record_messages=true",
    ]
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text("name: recorded\n")
    words = ["train", str(config), "--out", str(run), *(part for of in settings for part in ("--set", of))]
    ended = subprocess.run([sys.executable, "-m", "mpc_fl", *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    parties = require_record(run)
    assert [path.name for path in parties] == [AGGREGATOR, "hospital-0", "hospital-1", "hospital-2"]
    received, not_kept = received_by(parties)
    told = {(of.receiver, of.sender, of.what): of.messages for of in received}
    assert told[AGGREGATOR, "hospital-1", "summand of a sum"] == 4 and not_kept == 0
    assert told["hospital-2", AGGREGATOR, "global model"] == 2
    assert not any("hospital" in of.sender for of in received if of.receiver != AGGREGATOR)
    assert "not known here" not in {of.form for of in received}
    tests = PValues()
    add_tests_of_records(parties, tests)
    assert tests.count > 100 and not [made for made in tests.judged(1e-6) if made.rejected]
