"""Costs by party and phase add up, say what is not known, and are read from what parties wrote, of any version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpc_fl.apps.costs import Cost, PartyCosts, costs_of_all, phase_of_all
from mpc_fl.apps.rows import PartyTraffic, costs_in, read_object
from mpc_fl.apps.typed_json import typed
from mpc_fl.config.deployment import CostsSection
from mpc_fl.errors import DataError
from mpc_fl.links.party_links import write_costs
from mpc_fl.links.traffic import TrafficCounter
from mpc_fl.metering import Spent

RATES = CostsSection(watts_per_core=10.0, watts_per_gpu=100.0, grid_intensity=360.0)


def counted(*spent: tuple[str, Spent]) -> TrafficCounter:
    """A counter of phases with so much spent; in each 1,000 bytes went to a peer, and 10 came."""
    counter = TrafficCounter("connect")
    for phase, of in spent:
        counter.phase = phase
        counter.of("hospital-1").bytes_sent += 1000
        counter.of("hospital-1").bytes_received += 10
        counter.spent[phase] = of
    return counter


def written(counter: TrafficCounter, directory: Path) -> PartyCosts:
    write_costs(counter, directory, RATES)
    return read_object(PartyTraffic, directory, "traffic.json").costs()


def test_estimated_energy_is_that_of_processor_seconds_and_phases_add_up(tmp_path: Path) -> None:
    rounds = [(f"round {number} training", Spent(2.0, 1.0 + number, 0.0, None)) for number in (1, 2)]
    costs = written(counted(("data", Spent(1.0, 0.5, 0.0, None)), *rounds), tmp_path)
    assert list(costs.phases) == ["data", "training"]
    assert costs.phases["training"].processor_seconds == 5.0 and costs.phases["training"].bytes_sent == 2000
    assert costs.energy == "estimated" and costs.total.gpu_seconds is None
    assert costs.total.joules == pytest.approx(10.0 * 5.5)
    assert costs.grams_co2 == pytest.approx(55.0 / 3.6e6 * 360.0)
    summed = Cost()
    for cost in costs.phases.values():
        summed += cost
    assert summed == costs.total
    assert typed(PartyCosts, json.loads(json.dumps(_plain(costs))), "x") == costs


def _plain(costs: PartyCosts) -> dict[str, object]:
    of = vars(costs) | {"total": vars(costs.total)}
    return of | {"phases": {name: vars(cost) for name, cost in costs.phases.items()}}


def test_measured_energy_stands_as_it_is_and_a_gpu_is_said_to_be_estimated(tmp_path: Path) -> None:
    costs = written(counted(("a", Spent(1.0, 0.5, 0.0, 7.0)), ("b", Spent(1.0, 0.5, 0.0, 3.0))), tmp_path)
    assert (costs.energy, costs.total.joules) == ("measured", 10.0)
    costs = written(counted(("a", Spent(1.0, 0.5, 0.0, 7.0)), ("b", Spent(1.0, 0.5, 0.25, 3.0))), tmp_path)
    assert costs.energy == "processors measured, GPU estimated"
    assert costs.total.joules == pytest.approx(10.0 + 25.0) and costs.total.gpu_seconds == 0.25
    said = json.loads((tmp_path / "traffic.json").read_text())["energy"]
    assert said["processors_measured"] is True and said["measured"] is False


def test_one_phase_that_was_not_measured_makes_an_estimate_of_all(tmp_path: Path) -> None:
    costs = written(counted(("a", Spent(1.0, 0.5, 0.0, 7.0)), ("b", Spent(1.0, 0.5, 0.0, None))), tmp_path)
    assert (costs.energy, costs.total.joules) == ("estimated", 10.0)


def test_the_whole_run_is_the_sum_of_its_parties_and_as_sure_as_the_least_sure() -> None:
    total = Cost(3.0, 2.0, None, 20.0, 100)
    one, other = PartyCosts({}, total, "measured", 1.0), PartyCosts({}, Cost(3.0, 1.0, 0.5, 5.0, 50), "estimated", 0.5)
    both = costs_of_all([one, other])
    assert (both.processor_seconds, both.gpu_seconds, both.bytes_sent, both.joules) == (3.0, 0.5, 150, 25.0)
    assert (both.energy, both.grams_co2) == ("estimated", 1.5)
    assert costs_of_all([one]).energy == "measured"
    assert costs_of_all([one, PartyCosts({}, Cost(1.0, None, None, None, 7))]).joules is None
    assert costs_of_all([]).bytes_sent is None


def test_what_an_earlier_version_did_not_record_is_not_known(tmp_path: Path) -> None:
    peers = {
        "aggregator": {"bytes_sent": 5, "bytes_received": 6, "messages_sent": 1, "waits": 0, "seconds_waited": 0.0}
    }
    old = {"phases": {"round 1 training": {"seconds": 1.5, "peers": peers}}}
    (tmp_path / "parties" / "hospital-0").mkdir(parents=True)
    file = tmp_path / "parties" / "hospital-0" / "traffic.json"
    file.write_text(json.dumps(old))
    files = {f"hospital-{rank}": f"parties/hospital-{rank}/traffic.json" for rank in range(2)}
    found = costs_in(tmp_path, files)
    assert list(found) == ["hospital-0"]  # the other was lost
    total = found["hospital-0"].total
    assert (total.seconds, total.bytes_sent, total.processor_seconds, total.joules) == (1.5, 5, None, None)
    file.write_text('{"phases": []}')
    with pytest.raises(DataError, match="traffic.json"):
        costs_in(tmp_path, files)


def test_rounds_and_images_are_counted_together() -> None:
    names = ("round 12 training", "image 3", "images 4 to 7", "batch 2", "sharing weights")
    assert [phase_of_all(name) for name in names] == ["training", "images", "images", "images", "sharing weights"]
