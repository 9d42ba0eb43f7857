"""EfficientNet-Lite0: symmetric padding gives what "same" padding gave where its weights were trained."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.inference.graph.tracing import simplify, trace
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d
from mpc_fl.learning.models.efficientnet_lite import INPUTS, efficientnet_lite0, from_published
from tests.support.published import published

CONFIG = Config().with_values(model={"architecture": "efficientnet_lite0"}, data={"channels": 3, "image_size": 64})


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_symmetric_padding_gives_what_same_padding_gives(size: int) -> None:
    reference, model = published(5), efficientnet_lite0(5).eval()
    model.load_state_dict(from_published(reference.state_dict()), strict=True)
    with torch.no_grad():
        wanted, found = reference(images(2, size)), model(images(2, size))
    assert float(wanted.std()) > 0.01
    assert torch.allclose(found, wanted, atol=1e-4)


def _published_code() -> ModuleType:
    """The published implementation in PyTorch (module efficientnet_lite_pytorch), if it is at hand."""
    place = os.environ.get("MPC_FL_LITE0_CODE", "")
    if place and place not in sys.path:
        sys.path.insert(0, place)
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip("efficientnet_lite_pytorch is not installed, nor at MPC_FL_LITE0_CODE")
    return importlib.import_module("efficientnet_lite_pytorch")


def test_the_published_implementation_gives_the_same() -> None:
    torch.manual_seed(0)
    reference = _published_code().EfficientNet.from_name("efficientnet-lite0").eval()
    model = efficientnet_lite0(1000).eval()
    model.load_state_dict(from_published(reference.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.allclose(model(images(1, 224)), reference(images(1, 224)), atol=1e-5)


def test_features_and_classifier_are_the_network() -> None:
    model = efficientnet_lite0(3).eval()
    with torch.no_grad():
        features = model.features(images(2, 64))
        assert features.shape == (2, 1280)
        assert torch.equal(model.classifier(features), model(images(2, 64)))
    assert sum(parameter.numel() for parameter in efficientnet_lite0(1000).parameters()) == 4_664_008


def test_it_is_an_architecture_whose_batchnorm_is_frozen() -> None:
    model = build_model(CONFIG, seed=1)
    assert model(images(2, 64)).shape == (2, 3)
    assert all(isinstance(layer, FrozenBatchNorm2d) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    same, other = build_model(CONFIG, seed=1), build_model(CONFIG, seed=2)
    weights = "features.stem.conv.weight"
    assert torch.equal(same.get_parameter(weights), model.get_parameter(weights))
    assert not torch.equal(other.get_parameter(weights), model.get_parameter(weights))


@pytest.mark.parametrize("size", [33, 100])
def test_sides_that_would_be_padded_otherwise_are_refused(size: int) -> None:
    with pytest.raises(ModelError, match=r"multiples of 32.*set data\.image_size=224"):
        build_model(CONFIG, input_shape=(3, size, size))


def test_every_layer_has_an_encrypted_counterpart() -> None:
    kinds = {operation.kind for operation in simplify(trace(build_model(CONFIG))).operations}
    assert kinds == {"Conv2d", "Hardtanh", "Add", "AdaptiveAvgPool2d", "Flatten", "Linear"}


def test_inputs_are_those_of_the_published_weights() -> None:
    pixels = torch.tensor([0.0, 127.0, 255.0])
    found = INPUTS.apply((pixels / 255).expand(1, 3, 1, 3))
    assert torch.allclose(found, ((pixels - 127) / 128).expand(1, 3, 1, 3), atol=1e-6)


def test_names_that_are_not_published_stay() -> None:
    tensors = {"_blocks.x._bn0.weight": torch.zeros(1), "_blocks.0._se.weight": torch.zeros(1), "_fc": torch.zeros(1)}
    assert from_published(tensors) == tensors
