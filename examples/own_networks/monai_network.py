"""A small ResNet of MONAI as a network for hospitals: `model.architecture: monai_network:resnet`."""

from __future__ import annotations

from monai.networks.nets import ResNet
from torch import nn


def resnet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One basic block in each of four stages, 8 to 64 channels wide: about 80,000 parameters. Input (N, channels, H, W)."""
    return ResNet(
        "basic", [1, 1, 1, 1], [8, 16, 32, 64], spatial_dims=2, n_input_channels=input_shape[0], num_classes=classes
    )
