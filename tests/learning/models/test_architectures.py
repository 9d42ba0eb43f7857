"""The networks: size, initial weights from the seed alone, normalisation that patients cannot influence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d, calibrate_batchnorm, freeze_normalisation
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters, trainable_parameters

torch.set_num_threads(1)


def configured(architecture: str, normalisation: str = "frozen", channels: int = 1) -> Config:
    return Config().with_values(
        model={"architecture": architecture, "normalisation": normalisation}, data={"channels": channels}
    )


def images(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalisation", ["frozen", "group"])
def test_resnet18_has_exactly_the_parameters_of_the_paper(normalisation: str) -> None:
    model = build_model(configured("resnet18", normalisation), input_shape=(3, 64, 64), seed=0)
    assert flatten_parameters(model).shape == (11_178_051,)
    assert model(images(2, 3, 64)).shape == (2, 3)


@pytest.mark.parametrize("size", [8, 9, 28, 32, 33, 64, 100])
def test_small_cnn_is_small_at_every_image_size(size: int) -> None:
    for channels in (1, 3):
        model = build_model(configured("small_cnn"), input_shape=(channels, size, size), seed=0)
        assert 18_000 < len(flatten_parameters(model)) < 60_000
        assert model(images(2, channels, size)).shape == (2, 3)


@pytest.mark.parametrize("architecture", ["small_cnn", "mlp", "resnet18", "mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_weights_depend_on_the_seed_and_on_nothing_else(architecture: str) -> None:
    config = configured(architecture)
    state = torch.random.get_rng_state()
    first = flatten_parameters(build_model(config, input_shape=(3, 64, 64), seed=5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)  # move the process's generator
    assert torch.equal(flatten_parameters(build_model(config, input_shape=(3, 64, 64), seed=5)), first)
    assert not torch.equal(flatten_parameters(build_model(config, input_shape=(3, 64, 64), seed=6)), first)


def test_resnet_weights_follow_he_initialisation() -> None:
    weights = build_model(configured("resnet18"), input_shape=(3, 64, 64), seed=1).get_parameter(
        "layer4.1.conv2.weight"
    )
    assert weights.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("architecture", ["mlp", "small_cnn"])
def test_own_networks_accept_their_data(architecture: str) -> None:
    model = build_model(configured(architecture), input_shape=(1, 32, 32), seed=0)
    assert model(images(4, 1, 32)).shape == (4, 3)


def test_mlp_takes_tables() -> None:
    assert build_model(configured("mlp"), input_shape=(30,), seed=0)(torch.zeros(5, 30)).shape == (5, 3)


def test_wrong_architectures_and_shapes_are_named() -> None:
    with pytest.raises(ModelError, match="nearest known name is 'resnet18'"):
        build_model(configured("resnet_18"), input_shape=(3, 64, 64), seed=0)
    with pytest.raises(ModelError, match=r"data\.channels=3"):
        build_model(configured("resnet18"), input_shape=(1, 64, 64), seed=0)
    with pytest.raises(ModelError, match="needs images"):
        build_model(configured("small_cnn"), input_shape=(30,), seed=0)
    with pytest.raises(ModelError, match="at least 8x8"):
        build_model(configured("small_cnn"), input_shape=(1, 4, 4), seed=0)


def test_frozen_statistics_survive_training_mode() -> None:
    model = build_model(configured("small_cnn"), input_shape=(1, 32, 32), seed=0)
    calibrate_batchnorm(model, images(32, 1, 32))
    before = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    model(images(8, 1, 32, seed=1) + 3)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers and all(isinstance(layer, FrozenBatchNorm2d) and not layer.training for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def test_calibration_measures_the_mean_and_variance_of_the_first_layer() -> None:
    model = build_model(configured("small_cnn"), input_shape=(1, 32, 32), seed=0)
    inputs = images(48, 1, 32)
    calibrate_batchnorm(model, inputs)
    with torch.no_grad():
        first = model[0](inputs)  # type: ignore[index]
    norm = model[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    again = build_model(configured("small_cnn"), input_shape=(1, 32, 32), seed=0)
    calibrate_batchnorm(again, inputs)
    assert torch.equal(again[1].running_mean, norm.running_mean)  # type: ignore[index]
    with pytest.raises(ModelError, match="fewer than two"):
        calibrate_batchnorm(model, inputs[:1])


def test_freezing_keeps_parameters_names_and_outputs() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    names = [name for name, _ in trainable_parameters(network)]
    expected = network(images(2, 1, 8))
    frozen = freeze_normalisation(network)
    assert [name for name, _ in trainable_parameters(frozen)] == names
    assert torch.equal(frozen(images(2, 1, 8)), expected)


def test_group_norm_leaves_no_batch_statistics() -> None:
    model = build_model(configured("resnet18", "group"), input_shape=(3, 32, 32), seed=0)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    batch = images(3, 3, 32)
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]), rtol=1e-4, atol=1e-5)


def test_flat_parameters_round_trip() -> None:
    source = build_model(configured("small_cnn"), input_shape=(1, 32, 32), seed=1)
    target = build_model(configured("small_cnn"), input_shape=(1, 32, 32), seed=2)
    flat = flatten_parameters(source)
    load_flat_parameters(target, flat)
    assert torch.equal(flatten_parameters(target), flat)
    assert flat.dtype == torch.float32
    with pytest.raises(ModelError, match="the model needs"):
        load_flat_parameters(target, flat[1:])
