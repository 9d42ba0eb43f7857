"""Simulated rounds beside those of real parties: the same model, the same openings, the same accounting, masks in place.

Hospitals are in groups in this process, the real parties threads over links in memory; `test_ray_workers` has real processes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpc_fl.apps.simulation import simulation
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.refusals import require_simulable
from mpc_fl.apps.simulation.simulation import simulate
from mpc_fl.apps.summaries import TrainingSummary
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.files import read_json_lines
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR, hospital_names
from tests.support.groups_here import GroupsHere, placed_here
from tests.support.training_in_memory import SETTINGS, Training

HOSPITALS = hospital_names(3)
REPEATABLE = {"training": {"sampling_seed": 3, "momentum": 0.9, "local_steps": 2}}
LOCAL = {"mechanism": "local", "delta": 1e-4}


@pytest.fixture(autouse=True)
def log_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's log is that of its process, which the tests share."""
    monkeypatch.setattr(simulation, "set_up_log", lambda path: None)


def simulated(directory: Path, *, groups: int = 2, **changes: dict[str, Any]) -> tuple[Path, TrainingSummary]:
    """A run of the settings that `Training` has, simulated; where it lies, and its summary."""
    out, values = directory / "simulated", {**SETTINGS}
    values = {name: {**values.get(name, {}), **changes.get(name, {})} for name in {*values, *changes}}
    config = parse_config({**values, "task": "simulate"}, "test")
    (directory / "ledgers").mkdir()
    summary = simulate(config, out, "mpc-fl simulate", lambda *_: None, placed_here(directory / "ledgers", groups))
    return out, summary


def real(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> Training:
    training = Training(directory / "real", monkeypatch, **changes)
    training.run()
    assert set(training.said.values()) == {"finished"}, training.said
    return training


def require_same_model(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def openings(path: Path) -> list[tuple[Any, ...]]:
    """What was opened, why, to whom and among whom; transcripts hold keys, so they differ from run to run."""
    return [
        tuple(line[key] for key in ("what", "why", "shape", "to", "among", "privacy")) for line in read_json_lines(path)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {**REPEATABLE, "federation": {"quorum": None}},
        {**REPEATABLE, "federation": {"quorum": 2}},
        {
            "training": {"sampling_seed": 3, "strategy": "fedadam", "server_learning_rate": 0.01, "average_last": 2},
            "data": {"normalise": "secure", "validation_fraction": 0.3},
        },
        {"training": {"sampling_seed": 3, "strategy": "fedsgd", "local_steps": 1}, "evaluation": {"every": 1}},
        {
            "training": {"sampling_seed": 3},
            "data": {"validation_fraction": 0.3},
            "evaluation": {"choose": "best", "calibrate": "both"},
        },
    ],
    ids=[
        "fedavg",
        "with closing masks",
        "fedadam with secure statistics and validation",
        "fedsgd",
        "chosen and calibrated",
    ],
)
def test_without_noise_the_model_is_that_of_real_parties_bit_for_bit(
    changes: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, summary = simulated(tmp_path, **changes)
    training = real(tmp_path, monkeypatch, **changes)
    require_same_model(out, training.party(AGGREGATOR))
    assert openings(out / "openings.jsonl") == openings(training.party(AGGREGATOR) / "openings.jsonl")
    for theirs, own in zip(
        read_json_lines(training.party(AGGREGATOR) / "metrics.jsonl"),
        read_json_lines(out / "metrics.jsonl"),
        strict=True,
    ):
        assert {**theirs, "seconds": 0} == {**own, "seconds": 0}
    for name in HOSPITALS:
        lines = [read_json_lines(of / "metrics.jsonl") for of in (training.party(name), out / "parties" / name)]
        assert len(lines[0]) >= 2 and [{**line, "seconds": 0} for line in lines[0]] == [
            {**line, "seconds": 0} for line in lines[1]
        ]
    assert summary.simulated and summary.took_part == {
        str(number): HOSPITALS for number in range(training.config.last_round + 1)
    }


@pytest.mark.parametrize(
    "privacy", [LOCAL, {"mechanism": "distributed", "delta": 1e-4}], ids=["local noise", "distributed noise"]
)
def test_every_hospital_is_charged_as_a_real_one(
    privacy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"privacy": privacy, "training": {"local_steps": 2}}
    out, summary = simulated(tmp_path, **changes)
    training = real(tmp_path, monkeypatch, **changes)

    def charged(directory: Path, name: str) -> list[tuple[Any, ...]]:
        records = PrivacyLedger(directory / f"{name}-privacy.sqlite3", name).records()
        return [
            (line["round"], line["released"], line["noise_multiplier"], line["sample_rate"], line["steps"])
            for line in records
        ]

    for name in HOSPITALS:
        expected = charged(training.party(name), name)
        assert len(expected) == 2 and all(released for _, released, *_ in expected)
        assert charged(out / "parties" / name, name) == expected
        real_lines = read_json_lines(training.party(name) / "metrics.jsonl")
        assert read_json_lines(out / "parties" / name / "metrics.jsonl")[-1]["epsilon"] == real_lines[-1]["epsilon"]
    assert {spent.epsilon for spent in summary.privacy} == {real_lines[-1]["epsilon"]}


def test_what_leaves_a_group_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a hospital's patients is 10; what its group of one gives of it is any 64-bit word."""
    left = list[int]()
    total = HospitalGroup.total

    def watched(group: HospitalGroup) -> Any:
        added = total(group)
        if added.words.numel() == 1:
            left.append(int(added.words))
        return added

    watched.__name__ = "total"
    monkeypatch.setattr(HospitalGroup, "total", watched)
    simulated(tmp_path, groups=3, federation={"quorum": None})
    assert len(left) == 3 and sum(left) % (1 << 64) == SETTINGS["data"]["phantoms"]["train_patients"]
    assert all(abs(word) > 1 << 32 for word in left)  # each fails once in 2^31 runs


def test_summands_of_hospitals_with_different_models_do_not_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each masks under what it itself holds, as real hospitals do: the sum then is noise and cannot be a number of patients."""
    take = HospitalGroup.take_model

    def other_for_one(group: HospitalGroup, given: Any) -> None:
        take(group, given)
        if 1 in group.ranks:
            hospital = group.hospitals[1].hospital
            hospital.digests.take(parameters=given.parameters + 1)

    other_for_one.__name__ = "take_model"
    monkeypatch.setattr(HospitalGroup, "take_model", other_for_one)
    with pytest.raises(Exception, match="the opened number of patients cannot be"):
        simulated(tmp_path, federation={"quorum": None})


def test_more_hospitals_than_share_masks_with_all_have_a_circle_of_masks(tmp_path: Path) -> None:
    """Twenty hospitals: the sum opens, so all masks of the circle cancel, and keys are asked for where masks close it."""
    phantoms, asked = {"train_patients": 120, "test_patients": 60}, list[str]()

    @contextlib.contextmanager
    def watched(config: Config, values: dict[str, Any]) -> Iterator[GroupsHere]:
        with placed_here(tmp_path, 3)(config, values) as groups:
            yield groups
            asked.extend(groups.asked)

    values = {**SETTINGS, "data": {**SETTINGS["data"], "phantoms": phantoms}, "task": "simulate"}
    values["federation"] = {"hospitals": 20, "quorum": 18}
    summary = simulate(parse_config(values, "test"), tmp_path / "out", "", lambda *_: None, watched)
    assert summary.final is not None and summary.final.records >= 60
    assert asked.count("keys") == asked.count("begin_sum") == 1 + 2 + 2  # patients, two rounds, two evaluations


REFUSED = {
    "federation": {"coordinator": "none", "quorum": 3},
    "aggregation": {"norm_check": True},
    "runtime": {"restarts": 1},
    "site": {"resume": True},
}


@pytest.mark.parametrize("section", REFUSED)
def test_what_a_simulation_does_not_have_is_refused_in_one_line(section: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^a simulation has no ") as refused:
        simulated(tmp_path, **{section: REFUSED[section]})
    assert "\n" not in str(refused.value) and not (tmp_path / "simulated").exists()


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"site": {"privacy_ledger": "ledgers"}}, "site.privacy_ledger"),
        ({"site": {"watch": ["tensorboard"]}}, "site.watch"),
        ({"site": {"training_processes": 2}}, "site.training_processes"),
        ({"site": {"device": "cuda"}}, "site.device"),
        ({"site": {"data_of": "hospital"}}, "site.data_of hospital"),
        ({"site": {"train_alone": True}}, "site.train_alone"),
        ({"evaluation": {"groups": {"sex": ["f"]}}}, "evaluation.groups"),
        ({"federation": {"evaluate_incomplete": True}}, "federation.evaluate_incomplete"),
    ],
)
def test_every_setting_without_effect_is_named(values: dict[str, Any], what: str) -> None:
    private = {"privacy": {"mechanism": "none"}}
    with pytest.raises(ConfigError, match=f"^a simulation has no {what}"):
        require_simulable(parse_config({**private, **values, "task": "simulate"}, "test"))


def test_only_a_simulation_has_more_than_64_hospitals() -> None:
    many = {"federation": {"hospitals": 65}}
    assert parse_config({**many, "task": "simulate"}, "test").federation.hospitals == 65
    for task in ("train", "serve"):
        with pytest.raises(ConfigError, match="at most 64 hospitals, .* mpc-fl simulate takes more"):
            parse_config({**many, "task": task}, "test")
    assert parse_config({**many, "task": "infer"}, "test").task == "infer"  # with a model that was simulated


def test_the_report_and_the_card_say_that_nobody_signed(tmp_path: Path) -> None:
    out, _ = simulated(tmp_path)
    report = (out / "report.html").read_text()
    assert "Simulated training" in report and "SIMULATED: hospitals of one researcher" in report
    assert "no ledger beside this model" in (out / "model_card.md").read_text()
    assert json.loads((out / "summary.json").read_text())["simulated"] is True
    assert not list(out.rglob("*.crt")) and not list(out.rglob("*.partial"))
