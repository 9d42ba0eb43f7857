"""An aggregator that deviates in the round that chooses and calibrates, and what a hospital enters of that round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.federation import final_round, secure_evaluation
from mpc_fl.learning.models.calibration import TEMPERATURES, Calibration, Grid, candidate_offsets
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import hospital_names
from tests.support.training_in_memory import Training

HOSPITALS = hospital_names(3)
CALIBRATED: dict[str, Any] = {
    "data": {"validation_fraction": 0.3, "phantoms": {"train_patients": 90, "test_patients": 12}},
    "training": {"rounds": 1, "learning_rate": 1.0},
    "evaluation": {"calibrate": "temperature"},
}


def _run(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Training:
    training = Training(directory, monkeypatch, **{**CALIBRATED, **changes})
    training.run()
    return training


@pytest.mark.parametrize(
    ("calibrate", "sent", "words"),
    [
        ("temperature", [1e6, 0, 0, 0], "no point of the public grid"),
        ("temperature", [1, 1e6, 0, 0], "no point of the public grid"),
        ("temperature", [1, 1, 0, 0], "no point of the public grid"),
        ("offsets", [2, 0, 0, 0], "no point of the public grid"),
        ("offsets", [1, -1e6, 0, 0], "no point of the public grid"),
        ("both", [1, 1, 1, 0], "no point of the public grid"),
        ("both", [float("nan"), 0, 0, 0], "cannot be"),
        ("both", [1, 0, float("inf"), 0], "cannot be"),
        ("both", [0, 0, 0, 0], "cannot be"),
        ("both", [-1, 0, 0, 0], "cannot be"),
    ],
)
def test_a_calibration_that_nothing_fits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: str, sent: list[float], words: str
) -> None:
    """All hospitals get the same, so no digest differs: an offset of a million would call every image healthy."""

    def lies(links: Any, digests: Any, hospitals: Any, _fitted: Calibration) -> None:
        values = torch.tensor(sent, dtype=torch.float64)
        digests.take(calibration=values)
        for name in hospitals:
            links.send_tensor(name, "calibration", values)

    monkeypatch.setattr(final_round, "send_calibration", lies)
    training = _run(tmp_path, monkeypatch, evaluation={"calibrate": calibrate})
    assert any(words in said for said in training.said.values()), training.said
    assert not any((training.party(name) / "model.safetensors").exists() for name in HOSPITALS)


def test_each_hospital_another_calibration_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lies(links: Any, digests: Any, hospitals: Any, _fitted: Calibration) -> None:
        for number, name in enumerate(hospitals):
            values = torch.tensor([TEMPERATURES[number], 0, 0, 0], dtype=torch.float64)
            digests.take(calibration=values)
            links.send_tensor(name, "calibration", values)

    monkeypatch.setattr(final_round, "send_calibration", lies)
    training = _run(tmp_path, monkeypatch)
    assert "finished" not in training.said.values()
    assert not any((training.party(name) / "model.safetensors").exists() for name in HOSPITALS)


def test_a_calibration_without_its_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lies(aggregator: Any, domain: Any, _rules: Any, plan: Any, _planned: Any) -> Any:
        final_round.say(domain.links, plan.hospitals, "as it is")
        return plan.hospitals, Calibration(TEMPERATURES[0], (0.0, 0.0, 0.0))

    monkeypatch.setattr(final_round, "_fitted", lies)
    training = _run(tmp_path, monkeypatch)
    assert any("no sum was made to fit it" in said for said in training.said.values()), training.said
    assert not any((training.party(name) / "model.safetensors").exists() for name in HOSPITALS)


def test_the_grid_has_all_that_can_be_fitted_and_nothing_else() -> None:
    for classes in (2, 3):
        points = candidate_offsets(classes).tolist()
        for fitted in ("temperature", "offsets", "both"):
            grid = Grid(classes, fitted)
            for temperature in (1.0, *TEMPERATURES):
                for offsets in ([0.0] * classes, *points):
                    fits = (fitted != "offsets" or temperature == 1) and (fitted != "temperature" or not any(offsets))
                    assert grid.has(Calibration(temperature, tuple(offsets))) is fits
            assert not grid.has(Calibration.none(classes + 1)) and not grid.has(Calibration(1.5, (0.0,) * classes))


def test_exact_sums_of_validation_patients_are_in_the_ledger_before_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a hospital of which nothing had left before: one that comes to the last round alone."""
    entered: list[bool] = []

    def watched(contribute: Any) -> Any:
        def sends(domain: Any, rules: Any, agreed: Any, value: Any, release: Any) -> Any:
            if agreed.label[0] in ("calibration", "validation"):
                name = domain.links.name
                ledger = PrivacyLedger(tmp_path / f"{name}-{len(entered)}.sqlite3", name)  # of other patients: empty
                release.func.__self__.path = ledger.path
                release.func.__self__._read_to = None
                release()
                entered.append(ledger.epsilon(1e-3) == float("inf"))
            return contribute(domain, rules, agreed, value, release)

        return sends

    for module in (final_round, secure_evaluation):
        monkeypatch.setattr(module, "contribute", watched(module.contribute))
    training = _run(tmp_path / "run", monkeypatch)
    assert set(training.said.values()) == {"finished"}, training.said
    assert entered == [True] * 6
