"""Hospitals that can only dial out in runs among peers, over real links: their model, and what the loss of a relay costs.

Of five, hospital-1 and hospital-3 can only dial out; hospital-0 and hospital-2 relay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.estimates import relaying
from mpc_fl.apps.formats import size
from mpc_fl.apps.runs.estimate import estimate_training
from mpc_fl.config.config import parse_config
from mpc_fl.links.frames import Frame
from mpc_fl.links.routes import relayed_route
from tests.support.peer_rounds import among_peers, model_of, names, require_sound, same
from tests.support.training_in_memory import SETTINGS
from tests.support.training_over_links import TrainingOverLinks, at_relayed_frame

pytestmark = [pytest.mark.processes, pytest.mark.slow]
BEHIND, RELAYS = ["hospital-1", "hospital-3"], ["hospital-0", "hospital-2"]
USED = relayed_route(*BEHIND, RELAYS).relays[0]
FEDERATION: dict[str, Any] = {
    "coordinator": "none",
    "hospitals": 5,
    "quorum": 3,
    "dial_out_only": BEHIND,
    "relay": RELAYS,
}
FIXED = {**SETTINGS["training"], "sampling_seed": 5}


def require_same_model(run: TrainingOverLinks, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a run in which all have links with all."""
    directly = among_peers(directory, monkeypatch, training=FIXED)
    directly.run()
    require_sound(directly, names(5))
    assert same(model_of(run, "hospital-1"), model_of(directly, "hospital-1"))  # type: ignore[arg-type]


def test_hospitals_that_only_dial_out_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrainingOverLinks(tmp_path / "relayed", monkeypatch, federation=FEDERATION, training=FIXED)
    run.run()
    require_sound(run, names(5))  # type: ignore[arg-type]
    relayed = dict[str, int]()
    for name in names(5):
        phases = json.loads((run.party(name) / "traffic.json").read_text())["phases"].values()
        relayed[name] = sum(count["bytes_relayed"] for phase in phases for count in phase["peers"].values())
    assert not any(relayed[name] for name in names(5) if name not in RELAYS), relayed
    expected = estimate_training(run.config, [10] * 5).bytes_relayed
    assert 0.5 * expected < sum(relayed.values()) < 2 * expected, (relayed, expected)
    require_same_model(run, tmp_path / "directly", monkeypatch)


@pytest.mark.parametrize(("loss", "frame"), [("kill", 5), ("kill", 60), ("kill", 120), ("freeze", 60)])
def test_a_relay_that_is_lost_in_mid_run_costs_nobody_but_itself(
    loss: str, frame: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on to the end; those that it relayed for are in all rounds, and nobody says that one of them was lost."""
    run = TrainingOverLinks(tmp_path, monkeypatch, federation=FEDERATION, training=FIXED)
    run.passes_no_greeting = {*RELAYS} - {USED}  # so that chunks go through the one that is lost
    with at_relayed_frame(run, USED, frame, lambda: getattr(run, loss)(USED)) as lost:
        run.run()
    assert lost, "it was lost"
    left = [name for name in names(5) if name != USED]
    require_sound(run, left)  # type: ignore[arg-type]
    blamed = [
        line for line in run.log for name in left if f"lost {name} in phase" in line or f"{name} has given no" in line
    ]
    assert not [line for line in blamed if "stood still" not in line], blamed


LED: dict[str, Any] = {"hospitals": 4, "quorum": 3, "dial_out_only": BEHIND}


@pytest.mark.parametrize("other", ["aggregator", "hospital-2"])
def test_with_an_aggregator_another_relay_takes_over(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hospital that relays is lost as a hospital, and nobody else with it."""
    relays = ["hospital-0", other]
    assert relayed_route(*BEHIND, relays).relays[0] == "hospital-0"
    run = TrainingOverLinks(tmp_path, monkeypatch, federation={**LED, "relay": relays}, training=FIXED)
    run.passes_no_greeting = {other}
    lost = list[str]()

    def watch(party: str, _sender: str, frame: Frame) -> None:
        # Hospitals say little to each other here.
        if party == "hospital-0" and frame.tag == "global model" and not lost:
            lost.append(frame.tag)
            run.kill("hospital-0")

    run.watchers.append(watch)
    run.run()
    assert lost
    for name in BEHIND:
        assert any(line.startswith(f"what goes to {name} goes through {other} from now on") for line in run.log), (
            run.log
        )
    left = ["aggregator", *names(4)[1:]]
    assert {name: run.said[name] for name in left} == dict.fromkeys(left, "finished"), run.said
    assert not [line for line in run.log for name in BEHIND if f"lost {name} in phase" in line], run.log


def test_what_relays_pass_on_is_estimated_and_said() -> None:
    values = {**SETTINGS, "federation": FEDERATION, "runtime": {}}
    found = parse_config(values, "test")
    training = estimate_training(found, [10] * 5)
    assert training.bytes_relayed == 2 * training.bytes_sent_per_hospital // 4
    words = relaying(found, training, size)
    assert words is not None and "relays (hospital-0, hospital-2) pass on" in words and "alone" not in words
    alone = found.with_values(federation={"relay": "hospital-0"})
    assert "there is one alone" in str(relaying(alone, estimate_training(alone, [10] * 5), size))
    none = found.with_values(federation={"dial_out_only": ["hospital-1"]})
    assert relaying(none, estimate_training(none, [10] * 5), size) is None
