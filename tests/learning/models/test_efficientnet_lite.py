"""EfficientNet-Lite0: symmetric padding gives what "same" padding gave where its weights were trained."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.inference.graph.tracing import simplify, trace
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d
from mpc_fl.learning.models.efficientnet_lite import INPUTS, efficientnet_lite0, from_published

CONFIG = Config().with_values(model={"architecture": "efficientnet_lite0"}, data={"channels": 3, "image_size": 64})


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


class SameConvolution(nn.Module):
    """TensorFlow's "same" padding, as its documentation gives it: half before, the rest after."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs // groups, kernel, kernel) / kernel)
        self.stride, self.groups = stride, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before_and_after = []
        for size in reversed(x.shape[2:]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.weight.shape[2] - size, 0)
            before_and_after += [total // 2, total - total // 2]
        return functional.conv2d(
            functional.pad(x, before_and_after), self.weight, stride=self.stride, groups=self.groups
        )


class PublishedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConvolution(inputs, hidden, 1), nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = SameConvolution(hidden, hidden, kernel, stride, hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv, self._bn2 = SameConvolution(hidden, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


# Inputs, outputs, kernel, stride, expansion of every block, written out from the paper's table.
BLOCKS = (
    *((32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 24, 3, 1, 6), (24, 40, 5, 2, 6), (40, 40, 5, 1, 6)),
    *((40, 80, 3, 2, 6), (80, 80, 3, 1, 6), (80, 80, 3, 1, 6), (80, 112, 5, 1, 6), (112, 112, 5, 1, 6)),
    *((112, 112, 5, 1, 6), (112, 192, 5, 2, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6)),
    (192, 320, 3, 1, 6),
)


class Published(nn.Module):
    """The network as it was published, with the published names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConvolution(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(PublishedBlock(*block) for block in BLOCKS)
        self._conv_head, self._bn1 = SameConvolution(320, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3)))


def published(classes: int = 5) -> Published:
    torch.manual_seed(3)
    model = Published(classes)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2.0)
    model.train()
    with torch.no_grad():
        for _ in range(20):  # statistics that keep the signal alive through fifty layers
            model(images(4, 64))
    return model.eval()


@pytest.mark.parametrize("size", [32, 64, 96])
def test_symmetric_padding_gives_what_same_padding_gives(size: int) -> None:
    reference, model = published(), efficientnet_lite0(5).eval()
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
