"""Runs that are given more rounds: models, metrics, ledgers and budgets go on; nothing that was released is planned anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.audit.ledger_audit import read_ledger
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.crypto.certificates import ROOT_FILE, load_root
from mpc_fl.errors import ConfigError
from mpc_fl.federation.continuation import require_room_for_mean
from mpc_fl.federation.planning import Done, releases_beside_steps
from mpc_fl.files import read_json_lines
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR
from tests.support.training_in_memory import Training

ALL = ("hospital-0", "hospital-1", "hospital-2")
FIXED: dict[str, Any] = {"rounds": 2, "sampling_seed": 7, "strategy": "fedavgm", "server_momentum": 0.5}


def ran(directory: Path, monkeypatch: pytest.MonkeyPatch, resume: bool = False, **changes: dict[str, Any]) -> Training:
    training = Training(directory, monkeypatch, site={"resume": resume}, **changes)
    training.run()
    return training


def parameters(training: Training, name: str) -> torch.Tensor:
    return flatten_parameters(load_model(training.party(name) / "model.safetensors", training.config))


def test_two_rounds_and_two_more_are_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with the server's momentum: noise is off and the sampling order fixed."""
    whole = ran(tmp_path / "whole", monkeypatch, training={**FIXED, "rounds": 4})
    ran(tmp_path / "parts", monkeypatch, training=FIXED)
    parts = ran(tmp_path / "parts", monkeypatch, resume=True, training={**FIXED, "rounds": 4})
    assert set(whole.said.values()) == set(parts.said.values()) == {"finished"}, (whole.said, parts.said)
    for name in (*ALL, AGGREGATOR):
        assert torch.equal(parameters(parts, name), parameters(whole, name))
    assert sorted(parts.rounds) == [0, 1, 2, 3, 4]
    for name in ALL:
        assert [line["round"] for line in read_json_lines(parts.party(name) / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_signed_chain_goes_on_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, monkeypatch)
    before = (tmp_path / "parties" / "hospital-1" / LEDGER_FILE).read_bytes()
    training = ran(tmp_path, monkeypatch, resume=True, training={"rounds": 3, "local_steps": 1, "batch_size": 8})
    contents = {(training.party(name) / LEDGER_FILE).read_bytes() for name in (*ALL, AGGREGATOR)}
    assert len(contents) == 1 and (content := contents.pop()).startswith(before)
    root = training.party("hospital-0") / "identity" / ROOT_FILE
    reading = read_ledger(content, load_root(root.read_bytes(), str(root)))
    assert reading.findings == () and reading.chain.ended
    kinds = [block.kind for block in reading.blocks if block is not None]
    assert kinds == ["start", "openings", "openings", "openings", "end", "resume", "openings", "end"]


@pytest.mark.parametrize(
    ("training", "said"),
    [({"rounds": 2}, "finished"), ({"rounds": 1}, "started with training.rounds 2, not 1: set it to more"),
     ({"rounds": 3, "learning_rate": 0.2}, "started with training.learning_rate 0.1, not 0.2: go on with the settings")],
    ids=["as many rounds", "fewer rounds", "another setting"],
)  # fmt: skip
def test_nothing_else_may_change(
    training: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(tmp_path, monkeypatch)
    before = {name: (tmp_path / "parties" / name / LEDGER_FILE).read_bytes() for name in (*ALL, AGGREGATOR)}
    settings = {"local_steps": 1, "batch_size": 8, **training}
    again = ran(tmp_path, monkeypatch, resume=True, training=settings)
    assert any(said in word for word in again.said.values()), again.said
    for name in (*ALL, AGGREGATOR):
        assert (tmp_path / "parties" / name / LEDGER_FILE).read_bytes() == before[name]


def epsilons(training: Training, name: str) -> list[float]:
    return [line["epsilon"] for line in read_json_lines(training.party(name) / "metrics.jsonl")]


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_what_was_calibrated_is_spent_and_the_line_says_what_to_set(
    mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy: dict[str, Any] = {"mechanism": mechanism, "spare_rounds": 1}
    more = {"rounds": 3, "local_steps": 1, "batch_size": 8}
    ran(tmp_path, monkeypatch, privacy=privacy)
    before = PrivacyLedger(tmp_path / "parties" / "hospital-0" / "hospital-0-privacy.sqlite3", "hospital-0").records()
    again = ran(tmp_path, monkeypatch, resume=True, privacy=privacy, training=more)
    line = next(word for word in again.said.values() if "calibrated to the whole budget" in word)
    assert "of 8 is spent" in line and "is left" in line and "set privacy.epsilon to " in line
    epsilon = float(line.partition("set privacy.epsilon to ")[2].split()[0])
    larger = {**privacy, "epsilon": epsilon}
    if mechanism == "distributed":
        again = ran(tmp_path, monkeypatch, resume=True, privacy=larger, training=more)
        line = next(word for word in again.said.values() if "had noise multiplier" in word)
        larger["noise_multiplier"] = float(line.partition("had noise multiplier ")[2].split(",")[0])
    again = ran(tmp_path, monkeypatch, resume=True, privacy=larger, training=more)
    assert set(again.said.values()) == {"finished"}, again.said
    for name in ALL:
        ledger = PrivacyLedger(again.party(name) / f"{name}-privacy.sqlite3", name)
        assert epsilons(again, name)[-1] == pytest.approx(ledger.epsilon(1e-4)) and ledger.epsilon(1e-4) <= epsilon
        assert [record["round"] for record in ledger.records()] == [1, 2, 3]
        spent = epsilons(again, name)
        assert spent == sorted(spent) and len(spent) == 3
    after = PrivacyLedger(tmp_path / "parties" / "hospital-0" / "hospital-0-privacy.sqlite3", "hospital-0").records()
    assert after[: len(before)] == before


def test_a_run_without_its_privacy_ledger_gets_no_more_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mechanism": "local", "noise_multiplier": 2.0}
    ran(tmp_path, monkeypatch, privacy=privacy)
    (tmp_path / "parties" / "hospital-1" / "hospital-1-privacy.sqlite3").unlink()
    more = {"rounds": 3, "local_steps": 1, "batch_size": 8}
    again = ran(tmp_path, monkeypatch, resume=True, privacy=privacy, training=more, federation={"quorum": 2})
    assert "holds less than when the last checkpoint was written" in again.said["hospital-1"]


# ---- the mean of the last models, evaluation -----------------------------------------------------------------------------


def test_the_mean_is_over_models_since_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**FIXED, "strategy": "fedavg", "server_momentum": None, "average_last": 2}
    first = ran(tmp_path, monkeypatch, training=settings)
    began = parameters(first, AGGREGATOR)
    again = ran(tmp_path, monkeypatch, resume=True, training={**settings, "rounds": 3})
    assert "set training.rounds to 4 or more" in again.said[AGGREGATOR]
    again = ran(tmp_path, monkeypatch, resume=True, training={**settings, "rounds": 4})
    assert set(again.said.values()) == {"finished"}, again.said
    assert not torch.equal(parameters(again, AGGREGATOR), began)
    for name in ALL:
        assert torch.equal(parameters(again, name), parameters(again, AGGREGATOR))


def test_room_for_the_mean_counts_steps_of_distributed_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Training(tmp_path, monkeypatch, privacy={"mechanism": "distributed"}).config
    config = config.with_values(training={"rounds": 4, "local_steps": 2, "average_last": 4})
    require_room_for_mean(config, 2)
    with pytest.raises(ConfigError, match="set training.rounds to 5 or more"):
        require_room_for_mean(config, 3)


def test_an_evaluation_at_an_earlier_end_takes_none_of_the_spare_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Training(tmp_path, monkeypatch).config
    config = config.with_values(
        training={"rounds": 4},
        privacy={"mechanism": "local", "spare_rounds": 2},
        evaluation={"noise_multiplier": 5.0},
    )
    (planned,) = releases_beside_steps(config, Done(rounds=2, charged=2, evaluations=2, ends=(2,)))
    assert planned.steps == 3  # the one after round 4, and two that may be lost


def test_hospitals_remember_after_which_rounds_the_run_was_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"mechanism": "local", "noise_multiplier": 3.0, "spare_rounds": 0}
    noised = {"noise_multiplier": 5.0}
    ran(tmp_path, monkeypatch, privacy=privacy, evaluation=noised)
    for rounds in (3, 4):
        settings = {"rounds": rounds, "local_steps": 1, "batch_size": 8}
        again = ran(tmp_path, monkeypatch, resume=True, privacy=privacy, evaluation=noised, training=settings)
        assert set(again.said.values()) == {"finished"}, again.said
    ledger = PrivacyLedger(again.party("hospital-0") / "hospital-0-privacy.sqlite3", "hospital-0")
    evaluated = [record["round"] for record in ledger.records() if record["run"].endswith("evaluation")]
    assert evaluated == [0, 2, 3, 4]
