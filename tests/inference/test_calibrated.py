"""A calibrated model decides as it was calibrated, under either engine, and its probabilities are those of its temperature."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ModelError, ProtocolError
from mpc_fl.inference.inputs import calibration_of_model, send_calibration
from mpc_fl.inference.results import Diagnosis
from mpc_fl.inference.serving.visits import service_digest
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.class_offsets import last_layer, with_offsets
from mpc_fl.learning.models.model_file import load_calibration, load_model, save_model
from mpc_fl.links.links import Links
from mpc_fl.roles import HOSPITAL, MODEL_OWNER
from tests.support.harness import run_parties_in_memory

FITTED = Calibration(2.0, (0.0, 3.0, -3.0))


def configured(reveal: str = "logits", calibrate: str = "both", **model: Any) -> Config:
    return parse_config(
        {
            "task": "infer",
            "data": {"image_size": 8, "validation_fraction": 0.2},
            "model": {"architecture": "mlp", "hidden": [4], **model},
            "privacy": {"mechanism": "none"},
            "evaluation": {"calibrate": calibrate},
            "inference": {"engine": "fast", "reveal": reveal},
        },
        "test",
    )


@pytest.mark.parametrize("architecture", ["mlp", "linear", "small_cnn"])
def test_offsets_stand_in_the_bias_of_the_last_layer(architecture: str) -> None:
    config, images = configured(architecture=architecture), torch.rand(5, 1, 8, 8)
    model = build_model(config)
    with torch.no_grad():
        before = model(images)
        after = with_offsets(model, config, FITTED)(images)
    torch.testing.assert_close(after, before + torch.tensor(FITTED.offsets))
    assert last_layer(model).bias is not None
    other = build_model(config)
    assert with_offsets(other, configured(calibrate="temperature", architecture=architecture), FITTED) is other
    with torch.no_grad():
        torch.testing.assert_close(other(images), before)


def test_a_network_whose_last_layer_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match="is not linear"):
        last_layer(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv2d(1, 1, 1)))


def test_the_model_file_holds_the_calibration(tmp_path: Path) -> None:
    config, path = configured(), tmp_path / "model.safetensors"
    save_model(path, build_model(config), config, None, FITTED)
    assert load_calibration(path, config) == FITTED
    load_model(path, config)
    for other in (configured(calibrate="none"), config.with_values(data={"classes": ["a", "b"]})):
        with pytest.raises(ModelError):
            load_model(path, other)
    plain = tmp_path / "plain.safetensors"
    save_model(plain, build_model(config), configured(calibrate="none"))
    with pytest.raises(ModelError, match="has no calibration, evaluation.calibrate is 'both'"):
        load_model(plain, config)
    with pytest.raises(ModelError, match="pass it on"):
        save_model(plain, build_model(config), config)


@pytest.mark.parametrize(("reveal", "told"), [("logits", FITTED), ("label", None)])
def test_the_hospital_is_told_where_logits_are_opened(reveal: str, told: Calibration | None) -> None:
    config = configured(reveal)

    def program(links: Links) -> Calibration | None:
        if links.name == MODEL_OWNER:
            send_calibration(config, links, HOSPITAL, FITTED)
            return None
        return calibration_of_model(config, links)

    assert run_parties_in_memory(program, [HOSPITAL, MODEL_OWNER])[HOSPITAL] == told


def test_a_calibration_that_cannot_be_is_refused_before_an_image_is_asked_about() -> None:
    config = configured()

    def program(links: Links) -> Calibration | None:
        if links.name == MODEL_OWNER:
            links.send_tensor(HOSPITAL, "calibration", torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
            return None
        with pytest.raises(ProtocolError, match="temperature above zero"):
            calibration_of_model(config, links)
        return None

    run_parties_in_memory(program, [HOSPITAL, MODEL_OWNER])


def test_probabilities_are_of_the_temperature_and_decisions_of_the_offsets() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0])
    opened = logits + torch.tensor(FITTED.offsets)
    found = dataclasses.replace(Diagnosis.of(opened, 0.1), calibration=FITTED)
    assert found.predicted == 1 == int(FITTED.decided(logits))
    assert found.probabilities is not None
    torch.testing.assert_close(found.probabilities, torch.softmax(logits.double() / 2, dim=0))


def test_who_asks_a_calibrated_service_must_know_it() -> None:
    assert service_digest(configured()) != service_digest(configured(calibrate="none"))


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "reveal"), [("fast", "label"), ("fast", "logits"), ("reference", "logits")])
def test_diagnoses_of_a_calibrated_model(tmp_path: Path, engine: str, reveal: str) -> None:
    from mpc_fl.apps.runs.local_runs import infer

    config, path = configured(reveal, architecture="small_cnn"), tmp_path / "model.safetensors"
    config = config.with_values(inference={"engine": engine, "limit": 3, "plaintext_reference": True})
    save_model(path, build_model(config), config, None, FITTED)
    config = config.with_values(site={"model": str(path)})
    summary = infer(config, tmp_path / "run", "test", lambda *_: None)
    assert summary.comparison is not None and summary.comparison.classes_agree
    assert summary.results is not None and {result.predicted for result in summary.results} == {1}  # 3 logits ahead
    for result in summary.results:
        if reveal == "logits":
            assert result.logits is not None and result.probabilities is not None
            own = torch.tensor(result.logits, dtype=torch.float64) - torch.tensor(FITTED.offsets)
            torch.testing.assert_close(
                torch.tensor(result.probabilities, dtype=torch.float64), torch.softmax(own / 2, 0), atol=1e-5, rtol=0
            )
            assert max(result.probabilities) < 0.9
