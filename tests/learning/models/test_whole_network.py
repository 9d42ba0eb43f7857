"""The whole network gives the answers of its parts, as training and diagnosis use them, and NaN where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ModelError
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model, build_network
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.weights_store import store
from mpc_fl.learning.models.whole_network import TrainedModel, WholeNetwork

torch.set_num_threads(1)
CALIBRATED = {"calibrate": "both"}
FITTED = Calibration(1.5, (0.0, -1.0, 0.5))


def saved(
    directory: Path, config: Config, normalisation: Normalisation | None = None, calibrated: bool = False
) -> Path:
    """A model file with weights drawn here."""
    model, draw = build_model(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    path = directory / "model.safetensors"
    save_model(path, model, config, normalisation, FITTED if calibrated else None)
    return path


def images_of(**data: Any) -> Config:
    values = {"data": {"validation_fraction": 0.2, "normalise": "secure", **data}, "evaluation": CALIBRATED}
    return parse_config({**values, "privacy": {"mechanism": "none"}}, "test")


def test_images_are_scaled_and_logits_calibrated_as_in_a_diagnosis(tmp_path: Path) -> None:
    config = images_of(image_size=16)
    model = TrainedModel.read(saved(tmp_path, config, Normalisation((0.4,), (0.2,)), True), config)
    images = public_phantoms(3, config)
    logits, probabilities = WholeNetwork(model)(images)
    for answers in (model.answers(images), (logits, probabilities)):
        plain = model.network((images - 0.4) / 0.2)
        torch.testing.assert_close(answers[0], plain + torch.tensor(FITTED.offsets), rtol=0, atol=1e-5)
        for moved, found in zip(*answers, strict=True):
            diagnosed = Diagnosis(moved, 0.0, int(moved.argmax()), calibration=FITTED).probabilities
            assert diagnosed is not None
            torch.testing.assert_close(found, diagnosed.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("extractor", ["scattering", "efficientnet_lite0", "staged"])
def test_features_are_part_of_it(extractor: str, mirror: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    features: dict[str, Any] = {"extractor": "scattering", "mirror": mirror}
    if extractor != "scattering":
        digest = store(build_network("efficientnet_lite0", 1000).state_dict(), "efficientnet_lite0", "drawn here")
        features = {"extractor": "efficientnet_lite0", "weights": digest, "mirror": mirror}
        features |= {"stages": ["features.blocks.4", "features.last"]} if extractor == "staged" else {}
    values = {
        "data": {"image_size": 64, "features": features, "normalise": "secure"},
        "model": {"architecture": "linear"},
        "privacy": {"mechanism": "none"},
    }
    config = parse_config(values, "test")
    count = config.data.input_shape[0]
    normalisation = Normalisation((0.01,) * (count - 1) + (0.0,), (1.0,) * count, to_norm_1=True)
    model = TrainedModel.read(saved(tmp_path, config, normalisation), config)
    images = public_phantoms(2, config)
    for found, expected in zip(WholeNetwork(model)(images), model.answers(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_input_that_a_reader_would_refuse_has_no_answer(tmp_path: Path) -> None:
    config = Config().with_values(data={"image_size": 16})
    network = WholeNetwork(TrainedModel.read(saved(tmp_path, config), config))
    images = public_phantoms(3, config)
    images[1] *= 255
    for answers in network(images):
        assert torch.isnan(answers).any(dim=1).tolist() == [False, True, False]
        assert torch.isnan(answers[1]).all()


def test_it_leaves_the_model_as_it_is_and_has_nothing_to_train(tmp_path: Path) -> None:
    config = Config().with_values(data={"image_size": 64}, model={"architecture": "scattering"})
    model = TrainedModel.read(saved(tmp_path, config), config)
    before = [type(layer) for layer in model.network.modules()]
    network = WholeNetwork(model)
    assert [type(layer) for layer in model.network.modules()] == before
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training


def test_features_need_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    features = {"extractor": "efficientnet_lite0", "weights": "0" * 64}
    values = {"data": {"image_size": 64, "features": features}, "model": {"architecture": "linear"}}
    config = parse_config(values, "test")
    with pytest.raises(ModelError, match="mpc-fl model"):
        TrainedModel.read(saved(tmp_path, config), config)
