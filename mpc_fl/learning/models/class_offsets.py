"""The class offsets of a calibrated model, in the bias of its last layer: so it decides by its logits alone.

Under encryption that costs nothing, and the label alone can be opened.
"""

from __future__ import annotations

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.parameters import layers_with_parameters


def with_offsets(model: nn.Module, config: Config, calibration: Calibration | None) -> nn.Module:
    """The network with the offsets added to the bias of its last layer, in place, where `evaluation.calibrate` fits them.

    Returns it; a layer without bias has one then, whatever the offsets. Raises `ModelError` like `last_layer`.
    """
    if calibration is None or config.evaluation.calibrate not in ("offsets", "both"):
        return model
    layer, offsets = last_layer(model), torch.tensor(calibration.offsets)
    own = torch.zeros_like(offsets) if layer.bias is None else layer.bias.detach()
    layer.bias = nn.Parameter(own + offsets, requires_grad=False)
    return model


def last_layer(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits. Raises `ModelError` where that is no linear one."""
    path, layer = layers_with_parameters(model)[-1]
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"the last layer '{path}' is not linear, so class offsets cannot be added to what it gives",
            "set evaluation.calibrate to temperature or none",
        )
    return layer
