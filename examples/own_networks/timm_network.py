"""A small ResNet of timm as a network for hospitals: `model.architecture: timm_network:resnet`."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def resnet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One basic block in each of four stages, 8 to 64 channels wide: about 80,000 parameters. Input (N, channels, H, W)."""
    return ResNet(
        BasicBlock, [1, 1, 1, 1], num_classes=classes, in_chans=input_shape[0], stem_width=8, channels=(8, 16, 32, 64)
    )
