"""EfficientNet-Lite0: a public backbone of 1280 features for images of 224 x 224 pixels, in layers that encryption knows.

EfficientNet (Tan and Le, ICML 2019) without squeeze-and-excite and with ReLU6 for swish, as its authors published it with
ImageNet weights ("EfficientNet-Lite", 2020). Those weights expect (x - 127) / 128 of pixels 0 .. 255: `INPUTS`.

Padding. They were trained in TensorFlow, whose "same" padding of an even image at stride 2 has one row and column more after
the image than before it: (k - 3) / 2 before and (k - 1) / 2 after for a kernel of k x k. Layers here pad both sides by
(k - 1) / 2, as encrypted convolutions do, and their kernels have one row more above and one column more on the left. With
zeros there (`with_zero_border`) both give the same. So sides of images must be multiples of 32. Where training changes the
layer, these are weights like others.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.learning.data.normalisation import Normalisation

FEATURES = 1280
SIDES_OF = 32  # sides of images are multiples of it
INPUTS = Normalisation((127 / 255,) * 3, (128 / 255,) * 3)

_EPSILON = 1e-3  # of BatchNorm, as published


class _Stage(NamedTuple):
    """So many blocks; the first has the stride and changes the channels. Hidden ones are `expansion` times the input's."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STEM = 32
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm, with "same" padding of sides that the stride divides."""
    size = kernel + (stride == 2)  # the padding is that of `kernel`
    layer = nn.Conv2d(inputs, outputs, size, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=layer, norm=nn.BatchNorm2d(outputs, eps=_EPSILON)))


def _activated(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return _convolution(inputs, outputs, kernel, stride, groups).append(nn.ReLU6())


class InvertedResidual(nn.Module):
    """1 x 1 convolution to more channels, one for each of these alone, 1 x 1 to few (Sandler et al., CVPR 2018).

    The input is added where shapes allow it. (N, I, H, W) to (N, O, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = _activated(inputs, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = _activated(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _convolution(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's value."""
        projected = self.project(self.depthwise(self.expand(x)))
        return x + projected if self.adds else projected


class EfficientNetLite0(nn.Module):
    """Float32 images (N, 3, H, W), H and W multiples of 32, to logits (N, classes).

    `features` gives (N, 1280), the averages of ReLU6 over the last pixels; `classifier` is the linear layer on them. There is no
    dropout: a head is trained on features that are computed once.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        blocks, channels = [], _STEM
        for stage in _STAGES:
            for place in range(stage.blocks):
                stride = stage.stride if place == 0 else 1
                blocks.append(InvertedResidual(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
        self.features = nn.Sequential(
            OrderedDict(
                stem=_activated(3, _STEM, kernel=3, stride=2),
                blocks=nn.Sequential(*blocks),
                last=_activated(channels, FEATURES),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes)."""
        return self.classifier(self.features(x))


def efficientnet_lite0(classes: int) -> EfficientNetLite0:
    """EfficientNet-Lite0 with initial weights by He et al. (ICCV 2015), drawn as `architectures.build_model` says."""
    model = EfficientNetLite0(classes)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return model


def with_zero_border(weight: torch.Tensor) -> torch.Tensor:
    """A kernel (O, I, k, k) for one row and column less of padding, as (O, I, k + 1, k + 1): zeros above and on the left."""
    return functional.pad(weight, (1, 0, 1, 0))


_PUBLISHED_PARTS = {
    "_conv_stem": "features.stem.conv",
    "_bn0": "features.stem.norm",
    "_conv_head": "features.last.conv",
    "_bn1": "features.last.norm",
    "_fc": "classifier",
}
_PUBLISHED_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}
_PUBLISHED_BLOCK = re.compile(r"_blocks\.(\d{1,3})\.(_\w+)\.(\w+)", re.ASCII)


def _own_name(name: str) -> str:
    """The name here of a published tensor; the same where it has none."""
    block = _PUBLISHED_BLOCK.fullmatch(name)
    if block and block[2] in _PUBLISHED_BLOCK_PARTS:
        return f"features.blocks.{block[1]}.{_PUBLISHED_BLOCK_PARTS[block[2]]}.{block[3]}"
    part, _, rest = name.partition(".")
    return f"{_PUBLISHED_PARTS[part]}.{rest}" if part in _PUBLISHED_PARTS and rest else name


def from_published(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of the published PyTorch weights (`_conv_stem.weight`, ...) as this network has them.

    Kernels of layers with stride 2 get their zero border. Tensors of other names stay what they are.
    """
    strided = {"features.stem.conv.weight"} | {f"features.blocks.{block}.depthwise.conv.weight" for block in _strided()}
    renamed = {}
    for name, tensor in tensors.items():
        own = _own_name(name)
        bordered = own != name and own in strided and tensor.dim() == 4
        renamed[own] = with_zero_border(tensor) if bordered else tensor
    return renamed


def _strided() -> list[int]:
    """Numbers of the blocks with stride 2."""
    firsts = [sum(stage.blocks for stage in _STAGES[:place]) for place in range(len(_STAGES))]
    return [first for first, stage in zip(firsts, _STAGES, strict=True) if stage.stride == 2]
