"""Features of images: what they are, that each belongs to its image alone, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.data import FEATURE_CONSTANT
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.architectures import build_model, build_network
from mpc_fl.learning.models.feature_extractor import FeatureExtractor, as_records, extractor_of, without_last_layer
from mpc_fl.learning.models.model_file import describe, load_model, save_model
from mpc_fl.learning.models.stages import Stages
from mpc_fl.learning.models.weights_store import store

torch.set_num_threads(1)
LITE = {"extractor": "efficientnet_lite0", "weights": "0" * 64}
PHANTOMS = {"image_size": 64, "phantoms": {"train_patients": 12, "test_patients": 9}}


def configured(features: dict[str, Any] | None, **data: Any) -> Config:
    values = {"data": {**PHANTOMS, "features": features, **data}, "model": {"architecture": "linear"}}
    return parse_config(values, "test")


@pytest.fixture
def small_extractor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """A torchvision network with some weights, in this user's store; one output more than the head had."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = build_network("mobilenet_v3_small", 1000)
    digest = store(network.state_dict(), "mobilenet_v3_small", "drawn here")
    return configured({"extractor": "mobilenet_v3_small", "weights": digest})


def test_records_are_unit_features_of_image_and_mirror_and_a_constant() -> None:
    config = configured({"extractor": "scattering"})
    images = load_hospital(config, 0, "train")
    records = as_records(images, config)
    assert records.inputs.shape == (len(images), *config.data.input_shape)
    assert torch.equal(records.labels, images.labels) and records.names == images.names
    torch.testing.assert_close(records.inputs[:, :-1].norm(dim=1), torch.ones(len(images)))
    assert bool((records.inputs[:, -1] == FEATURE_CONSTANT).all())
    mirrored = as_records(replace(images, inputs=images.inputs.flip(-1)), config)
    torch.testing.assert_close(mirrored.inputs, records.inputs)
    plain = as_records(images, configured({"extractor": "scattering", "mirror": False}))
    assert float((plain.inputs - records.inputs).abs().max()) > 1e-3
    assert as_records(images, configured(None).with_values(model={"architecture": "small_cnn"})) is images


def test_a_record_is_a_function_of_its_image_alone(small_extractor: Config) -> None:
    """Bit for bit: else one patient more would change the records of others."""
    images = load_hospital(small_extractor, 0, "train")
    all_of_them = as_records(images, small_extractor).inputs
    for row in range(len(images)):
        alone = as_records(replace(images, inputs=images.inputs[row : row + 1]), small_extractor).inputs
        assert torch.equal(alone[0], all_of_them[row])


def test_grey_images_are_taken_for_all_channels(small_extractor: Config) -> None:
    images = load_hospital(small_extractor, 0, "test")
    coloured = replace(images, inputs=images.inputs.expand(-1, 3, -1, -1))
    assert torch.equal(as_records(coloured, small_extractor).inputs, as_records(images, small_extractor).inputs)


def test_progress_follows_every_image() -> None:
    config, seen = configured({"extractor": "scattering"}), list[tuple[int, int]]()
    images = load_hospital(config, 0, "test")
    as_records(images, config, lambda done, of: seen.append((done, of)))
    assert seen == [(done + 1, len(images)) for done in range(len(images))]


def with_stages(config: Config, *stages: str, **features: Any) -> Config:
    assert config.data.features is not None
    return config.with_values(
        data={"features": {**config.data.features.model_dump(mode="json"), "stages": list(stages), **features}}
    )


@pytest.fixture
def lite0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """EfficientNet-Lite0 with weights of no meaning, in this user's store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    network = build_model(parse_config(LITE0, "test"))
    digest = store(network.state_dict(), "efficientnet_lite0", "drawn here")
    return configured({"extractor": "efficientnet_lite0", "weights": digest})


LITE0 = {"data": {"image_size": 64, "channels": 3}, "model": {"architecture": "efficientnet_lite0"}}


def test_stages_are_averages_of_blocks_each_at_norm_1_joined_at_norm_1(lite0: Config) -> None:
    config = with_stages(lite0, "features.blocks.4", "features.blocks.10", "features.last", mirror=False)
    assert config.data.features is not None and config.data.input_shape == (40 + 112 + 1280 + 1,)
    images = load_hospital(config, 0, "test")
    records = as_records(images, config).inputs
    extractor, plain = extractor_of(config), extractor_of(with_stages(lite0, mirror=False))
    assert extractor is not None and plain is not None and extractor.scale is not None
    seen: dict[str, torch.Tensor] = {}
    network = plain.network
    for path in config.data.features.stages:
        network.get_submodule(path).register_forward_hook(
            lambda _layer, _inputs, output, path=path: seen.__setitem__(path, output)
        )
    network(extractor.scale.apply(images.inputs[:1].expand(1, 3, -1, -1)))
    parts = [nn.functional.normalize(seen[path].mean(dim=(2, 3)), dim=1) for path in config.data.features.stages]
    torch.testing.assert_close(records[:1, :-1], torch.cat(parts, dim=1) / 3**0.5, rtol=1e-4, atol=1e-5)
    alone = as_records(replace(images, inputs=images.inputs[2:3]), config).inputs
    assert torch.equal(alone[0], records[2])


def test_the_last_stage_alone_gives_what_stands_before_the_last_layer(lite0: Config) -> None:
    images = load_hospital(lite0, 0, "test")
    last = as_records(images, with_stages(lite0, "features.last")).inputs
    torch.testing.assert_close(last, as_records(images, lite0).inputs, rtol=1e-5, atol=1e-6)


def test_stages_of_torchvision_networks_are_counted_or_checked(small_extractor: Config) -> None:
    config = with_stages(small_extractor, "features.3", "features.12", count=24 + 576)
    records = as_records(load_hospital(config, 0, "test"), config).inputs
    torch.testing.assert_close(records[:, :-1].norm(dim=1), torch.ones(len(records)))
    with pytest.raises(ModelError, match="gives 600 features, 599 are configured"):
        wrong = with_stages(small_extractor, "features.3", "features.12", count=599)
        as_records(load_hospital(wrong, 0, "test"), wrong)
    with pytest.raises(ModelError, match="no block 'features.13': the nearest known name is 'features"):
        extractor_of(with_stages(small_extractor, "features.13", count=5))
    residual = with_stages(small_extractor, "layer1", "layer4", extractor="resnet50")
    assert residual.data.features is not None and residual.data.features.size == 256 + 2048


def test_blocks_with_other_outputs_than_one_map_are_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x + 2

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.flat, self.last = Pair(), nn.Flatten(0), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.pair(x)
            return self.last(self.flat(first * second)[:3])

    with pytest.raises(ModelError, match="block 'pair' of the feature extractor has 2 outputs"):
        Stages(Network(), ("pair",))
    with pytest.raises(ModelError, match="output of 'flat' in the feature extractor is no map of channels"):
        Stages(Network(), ("flat",))(torch.zeros(1, 3, 2, 2))


def test_a_model_file_says_of_which_stages_its_features_are(lite0: Config, tmp_path: Path) -> None:
    plain, staged = lite0, with_stages(lite0, "features.blocks.10", "features.last")
    assert "stages" not in describe(plain)["features"]  # as files of earlier versions
    assert describe(staged)["features"]["stages"] == ["features.blocks.10", "features.last"]
    save_model(tmp_path / "model", build_model(staged), staged)
    assert load_model(tmp_path / "model", staged) is not None
    for other in (plain, with_stages(lite0, "features.last", "features.blocks.10")):
        with pytest.raises(ModelError, match="input shape|has features"):
            load_model(tmp_path / "model", other)


def test_weights_of_another_network_are_refused(small_extractor: Config) -> None:
    assert small_extractor.data.features is not None
    weights = small_extractor.data.features.weights
    other = configured({"extractor": "resnet18", "weights": weights})
    with pytest.raises(ModelError, match="are those of 'mobilenet_v3_small', not of 'resnet18'"):
        extractor_of(other)
    absent = configured({"extractor": "resnet18", "weights": "0" * 64})
    with pytest.raises(ModelError, match="mpc-fl model"):
        extractor_of(absent)


@pytest.mark.parametrize(
    ("features", "data", "match"),
    [
        ({"extractor": "scattering", "weights": "0" * 64}, {}, "scattering has no weights"),
        ({"extractor": "resnet18"}, {}, "scattering has no weights, and every other extractor needs them"),
        ({"extractor": "unheard_of", "weights": "0" * 64}, {}, "how many features 'unheard_of' gives"),
        ({"extractor": "resnet18", "weights": "0" * 64, "count": 3}, {}, "resnet18 gives 512 features"),
        ({"extractor": "resnet18", "weights": "0" * 63}, {}, "pattern"),
        ({"extractor": "scattering", "stages": ["first"]}, {}, "scattering has no stages"),
        ({**LITE, "stages": ["features.last"] * 2}, {}, "names a block twice"),
        ({**LITE, "stages": ["features.last"], "count": 3}, {}, "these stages give 1280 features"),
        (
            {**LITE, "stages": ["features.stem"]},
            {},
            "how many features blocks features.stem of 'efficientnet_lite0' give",
        ),
        ({**LITE, "stages": ["features last"]}, {}, "pattern"),
        ({"extractor": "scattering"}, {"source": "breast_cancer", "classes": ["a", "b"]}, "those of images"),
    ],
)
def test_settings_that_cannot_be_are_refused(features: dict[str, Any], data: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configured(features, **data)
    with pytest.raises(ConfigError, match="set model.architecture to linear or mlp"):
        parse_config({"data": {"features": {"extractor": "scattering"}}}, "test")


def test_public_features_of_a_diagnosis_are_those_of_the_data() -> None:
    features, model = {"features": {"extractor": "scattering"}}, {"architecture": "linear"}
    for data, said in (({}, False), ({}, None), (features, True), (features, None)):
        parse_config({"data": data, "model": model, "inference": {"public_features": said}}, "test")
    for data, said in (({}, True), (features, False)):
        with pytest.raises(ConfigError, match="inference.public_features follows from data.features"):
            parse_config({"data": data, "model": model, "inference": {"public_features": said}}, "test")


def test_features_that_cannot_be_used_are_refused() -> None:
    images = torch.rand(1, 1, 8, 8)
    with pytest.raises(ModelError, match="gives 64 features, 3 are configured"):
        FeatureExtractor(nn.Flatten(), 3, 1, mirror=True).records(images)
    with pytest.raises(ModelError, match="takes no image of 3x8x8"):
        FeatureExtractor(nn.Conv2d(1, 3, 3), 3, 3, mirror=True).records(images)
    with pytest.raises(ModelError, match="not finite"):
        FeatureExtractor(nn.Flatten(), 64, 1, mirror=False).records(images * torch.inf)
    with pytest.raises(ModelError, match="does not end in a linear layer"):
        without_last_layer(nn.Sequential(nn.Conv2d(1, 3, 3)))
