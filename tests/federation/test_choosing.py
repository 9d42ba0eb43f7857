"""The model of a run is that of the round with the best opened validation, calibrated, and everybody can check which it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.audit.ledger_audit import read_ledger
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.model_origin import model_origin
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.certificates import ROOT_FILE, load_root
from mpc_fl.errors import ConfigError
from mpc_fl.federation import aggregator_program, final_round
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.audit_trail import figure_digest
from mpc_fl.federation.choice import Candidate, Choice, best_round
from mpc_fl.federation.planning import plan_release, releases_beside_steps
from mpc_fl.files import read_json_lines
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.models.calibration import TEMPERATURES, candidate_offsets
from mpc_fl.learning.models.model_file import load_calibration, load_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR, hospital_names
from tests.support.training_in_memory import KILLED, Sleeper, Training

HOSPITALS = hospital_names(3)
BEST: dict[str, Any] = {
    "data": {"validation_fraction": 0.3, "phantoms": {"train_patients": 90, "test_patients": 12}},
    "training": {"rounds": 3, "learning_rate": 1.0},
    "evaluation": {"choose": "best"},
}
NOISED: dict[str, Any] = {
    **BEST,
    "privacy": {"mechanism": "local", "delta": 1e-3, "epsilon": 50.0},
    "evaluation": {"choose": "best", "noise_multiplier": 3.0, "calibrate": "both"},
}


@contextmanager
def trained(directory: Path, *sleepers: Sleeper, **changes: Any) -> Iterator[Training]:
    with pytest.MonkeyPatch.context() as patch:
        training = Training(directory, patch, **changes)
        training.run(*sleepers)
        yield training


def lines(training: Training) -> list[dict[str, Any]]:
    return read_json_lines(training.party(AGGREGATOR) / "metrics.jsonl")


def blocks(training: Training) -> list[Block]:
    directory = training.party(AGGREGATOR)
    root = load_root((directory / "identity" / ROOT_FILE).read_bytes(), "root")
    reading = read_ledger((directory / LEDGER_FILE).read_bytes(), root)
    assert not reading.findings
    return [block for block in reading.blocks if block is not None]


def models(training: Training) -> set[bytes]:
    return {(training.party(name) / "model.safetensors").read_bytes() for name in (*HOSPITALS, AGGREGATOR)}


def all_finished(training: Training) -> None:
    assert set(training.said.values()) == {"finished"}, training.said


def test_the_best_validated_round_gives_the_model(tmp_path: Path) -> None:
    with trained(tmp_path, **BEST) as training:
        all_finished(training)
        rows = {line["round"]: line for line in lines(training)}
        figures = {number: rows[number]["validation"]["accuracy"] for number in (1, 2, 3)}
        assert sorted(rows) == [0, 1, 2, 3, 4]
        # Test patients are looked at before training and for the final figure alone.
        assert [number for number, line in rows.items() if line["evaluation"] is not None] == [0, 4]
        best = best_round(figures)
        assert rows[4]["chosen"] == {"round": best, "figures": {str(n): figure for n, figure in figures.items()}}
        assert len(models(training)) == 1
        path = training.party(AGGREGATOR) / "model.safetensors"
        digest = tensor_digest(flatten_parameters(load_model(path, training.config)))
        signed = {block.about: block.values for block in blocks(training)}
        assert signed[f"round {best}"]["global model"] == digest == signed["the run is complete"]["global model"]
        for number, figure in figures.items():
            assert signed[f"round {number}"]["validation"] == figure_digest(figure)
        root = training.party(AGGREGATOR) / "identity" / ROOT_FILE
        assert model_origin(path, training.party(AGGREGATOR) / LEDGER_FILE, root).signed


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_noised_validation_and_calibration_are_charged_before_they_leave(tmp_path: Path, mechanism: str) -> None:
    privacy = {**NOISED["privacy"], "mechanism": mechanism}
    with trained(tmp_path, **{**NOISED, "privacy": privacy}) as training:
        all_finished(training)
        assert len(models(training)) == 1
        path = training.party(AGGREGATOR) / "model.safetensors"
        calibration = load_calibration(path, training.config)
        assert calibration is not None and calibration.to_json() == lines(training)[-1]["calibration"]
        assert calibration.temperature in (1.0, *TEMPERATURES)
        assert calibration.offsets == (0.0,) * 3 or list(calibration.offsets) in candidate_offsets(3).tolist()
        config = next(iter(training.placed.values()))
        for name in HOSPITALS:
            ledger = PrivacyLedger(training.party(name) / f"{name}-privacy.sqlite3", name)
            runs = Counter(record["run"].split()[-1] for record in ledger.records())
            assert (runs["evaluation"], runs["validation"], runs["calibration"]) == (2, 3, 1)
            assert ledger.epsilon(1e-3) <= config.privacy.epsilon
        openings = {opening.why: opening.privacy for block in blocks(training) for opening in block.openings}
        assert openings["round 2: noised validation"]["unit"] == "validation patient"
        assert openings["round 4: calibration"]["noise multiplier"] == 3.0


def test_a_hospital_lost_in_the_last_validation_costs_only_itself(tmp_path: Path) -> None:
    for where in ("ready validation 3", "ready calibration 4", "ready evaluation 4"):
        with trained(tmp_path / where, Sleeper("hospital-1", where, KILLED), **NOISED) as training:
            assert training.said[AGGREGATOR] == "finished" == training.said["hospital-0"] == training.said["hospital-2"]
            assert training.rounds[4] == ["hospital-0", "hospital-2"]
            assert lines(training)[-1]["evaluation"] is not None


def test_a_run_that_is_lost_in_its_last_round_goes_on_with_what_was_chosen(tmp_path: Path) -> None:
    changes = {**NOISED, "federation": {"quorum": 3}}
    for where in ("ready calibration 4", "ready evaluation 4"):
        directory = tmp_path / where
        with trained(directory, Sleeper("hospital-1", where, KILLED), **changes) as training:
            assert training.said[AGGREGATOR] != "finished"
            figures = {line["round"]: line["validation"]["accuracy"] for line in lines(training)[1:]}
        with pytest.MonkeyPatch.context() as patch:
            again = Training(directory, patch, **changes)
            again.placed = {name: of.with_values(site={"resume": True}) for name, of in again.placed.items()}
            again.run()
            all_finished(again)
            last = lines(again)[-1]
            assert last["chosen"]["round"] == best_round(figures) and sorted(again.rounds) == [0, 1, 2, 3, 4]
            assert len(models(again)) == 1


def test_an_exact_validation_that_somebody_misses_is_not_opened(tmp_path: Path) -> None:
    sleeper = Sleeper("hospital-1", "ready validation 2", KILLED)
    with trained(tmp_path, sleeper, **BEST) as training:
        assert training.said[AGGREGATOR] == "finished"
        assert lines(training)[-1]["chosen"]["figures"].keys() == {"1"} and lines(training)[-1]["chosen"]["round"] == 1


class _NotTheBest(Choice):
    def consider(self, config: Config, number: int, evaluated: Any, parameters: torch.Tensor) -> None:
        super().consider(config, number, evaluated, parameters)
        best = best_round(self.figures)
        self.candidate = Candidate(number if best != number else 1, parameters, torch.ones(3, dtype=torch.float64))


def test_an_aggregator_that_chooses_another_round_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = aggregator_program.prepare_aggregator

    def prepared(config: Config) -> Any:
        aggregator = prepare(config)
        aggregator.choice = _NotTheBest()
        return aggregator

    monkeypatch.setattr(aggregator_program, "prepare_aggregator", prepared)
    with trained(tmp_path, **BEST) as training:
        assert any("chose another round than" in said for said in training.said.values())
        assert not (training.party("hospital-0") / "model.safetensors").exists()


@pytest.mark.parametrize("lie", ["figure", "left out", "model"])
def test_an_aggregator_that_says_other_figures_or_sends_another_model_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    say, send = final_round.say, final_round.send_global

    def said(links: Any, names: Any, word: str, **values: Any) -> None:
        if word == "chosen" and lie == "figure":
            values["figures"] = {**values["figures"], "2": 1.0}
        if word == "chosen" and lie == "left out":
            values["figures"].pop("2")
        say(links, names, word, **values)

    def sent(links: Any, digests: Any, hospitals: Any, shared: torch.Tensor) -> None:
        send(links, digests, hospitals, shared + 1 if lie == "model" else shared)

    monkeypatch.setattr(final_round, "say", said)
    monkeypatch.setattr(final_round, "send_global", sent)
    with trained(tmp_path, **BEST) as training:
        words = {
            "figure": "another figure of round 2",
            "left out": "of other rounds",
            "model": "another model than all",
        }
        assert any(words[lie] in said for said in training.said.values()), training.said
        assert not (training.party("hospital-0") / "model.safetensors").exists()


def test_without_choosing_validation_is_opened_once_and_all_else_is_as_before(tmp_path: Path) -> None:
    with trained(tmp_path, **{**BEST, "evaluation": {}}) as training:
        all_finished(training)
        assert [line["round"] for line in lines(training) if "validation" in line] == [3]
        assert [line["round"] for line in lines(training)] == [0, 1, 2, 3] and len(models(training)) == 1


def test_test_patients_are_left_alone_where_it_is_said(tmp_path: Path) -> None:
    with trained(tmp_path, **{**BEST, "evaluation": {"choose": "best", "test": False}}) as training:
        all_finished(training)
        assert all(line["evaluation"] is None for line in lines(training))
        openings = [opening.why for block in blocks(training) for opening in block.openings]
        assert not any("evaluation" in why for why in openings)


def test_of_equal_figures_the_later_round_is_best() -> None:
    assert best_round({1: 0.5, 2: 0.75, 3: 0.75, 4: 0.25}) == 3


def test_what_a_run_may_release_counts_validation_and_calibration() -> None:
    config = parse_config({**NOISED, "training": {"rounds": 3}}, "test")
    beside = releases_beside_steps(config)
    spare = config.privacy.spare_rounds
    assert sum(event.steps for event in beside) == (2 + spare) + (3 + spare) + (1 + min(1, spare))
    sizes = public_sizes(config)
    planned = plan_release(config, sizes.smallest, [], "hospital-0")
    assert planned is not None and math.isfinite(planned.noise_multiplier)
    public = parse_config(
        {**NOISED, "evaluation": {"choose": "best", "calibrate": "both", "public_validation": True}}, "test"
    )
    assert releases_beside_steps(public) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"choose": "best"}}, "data.validation_fraction"),
        ({"evaluation": {"calibrate": "both"}}, "data.validation_fraction"),
        ({"evaluation": {"test": False}}, "data.validation_fraction"),
        ({"data": {"validation_fraction": 0.2}}, "exact counts of patients whom privacy.mechanism protects"),
        (
            {
                "data": {"validation_fraction": 0.2},
                "privacy": {"mechanism": "none"},
                "evaluation": {"public_validation": True},
            },
            "there is none",
        ),
        (
            {**BEST, "privacy": {"mechanism": "none"}, "training": {"rounds": 3, "local_normalisation": True}},
            "a model of its own",
        ),
        (
            {**BEST, "privacy": {"mechanism": "none"}, "evaluation": {"validate_every": 9}},
            "exceeds training.rounds",
        ),
        ({**BEST, "evaluation": {"test": False, "every": 1}}, "leave it null"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(sections, "test")


@pytest.mark.parametrize(("unit", "said"), [("patient", "validation patient"), ("image", "validation image")])
def test_the_record_of_a_calibration_says_what_privacy_is_counted_by(unit: str, said: str) -> None:
    config = parse_config(
        {
            "data": {"source": "images", "unit": unit, "validation_fraction": 0.2},
            "privacy": {"smallest_hospital": 50},
            "evaluation": {"calibrate": "temperature", "noise_multiplier": 5.0},
        },
        "x",
    )
    plan = RoundPlan(6, 0, ("hospital-0", "hospital-1"), {}, (), 1, False)
    privacy = final_round.calibration_sum(plan, plan.hospitals, config, {}).about.privacy
    assert privacy is not None and privacy["unit"] == said
