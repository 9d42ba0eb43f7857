"""A training run leaves what each party spent with that party alone, and what it is told by needs no agreement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpc_fl.apps.costs import costs_of_all
from mpc_fl.apps.runs.training_summary import costs_of_parties
from mpc_fl.config.config import parse_config, party_names
from tests.support.training_in_memory import Training


@pytest.mark.parametrize("coordinator", ["aggregator", pytest.param("none", marks=pytest.mark.slow)])
def test_each_party_has_its_own_costs_and_nobody_elses(
    coordinator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Training(tmp_path, monkeypatch, federation={"coordinator": coordinator, "quorum": 3})
    run.placed["hospital-1"] = run.placed["hospital-1"].with_values(site={"costs": {"watts_per_core": 99.0}})
    run.run()
    names = party_names(run.config)
    assert run.said == dict.fromkeys(names, "finished")
    telling = sorted(path for path in tmp_path.rglob("*.json*") if b"processor_seconds" in path.read_bytes())
    assert telling == sorted(run.party(name) / "traffic.json" for name in names)
    found = costs_of_parties(tmp_path, names)
    assert found is not None and set(found) == set(names)
    for name, costs in found.items():
        assert {"data", "training"} <= set(costs.phases) or name == "aggregator"
        assert costs.total.processor_seconds == pytest.approx(
            sum(cost.processor_seconds or 0.0 for cost in costs.phases.values()), abs=1e-3
        )
        assert costs.total.joules == pytest.approx(sum(cost.joules or 0.0 for cost in costs.phases.values()), abs=1e-3)
        assert costs.total.bytes_sent > 0
        energy = json.loads((run.party(name) / "traffic.json").read_text())["energy"]
        assert energy["watts_per_core"] == (99.0 if name == "hospital-1" else 12.0)
        if costs.energy == "estimated":
            expected = energy["watts_per_core"] * (costs.total.processor_seconds or 0.0)
            assert costs.total.joules == pytest.approx(expected, rel=1e-3, abs=0.5)
    both = costs_of_all(found.values())
    assert both.bytes_sent == sum(costs.total.bytes_sent for costs in found.values())


def test_parties_need_not_agree_on_watts_and_grids() -> None:
    one, other = (
        parse_config({}, "x"),
        parse_config({"site": {"costs": {"watts_per_core": 3.5, "grid_intensity": 0}}}, "x"),
    )
    assert one.digest() == other.digest() and one.settings_of_run() == other.settings_of_run()
    assert other.site.costs.watts_per_core == 3.5 and one.site.costs.grid_intensity == 475.0
