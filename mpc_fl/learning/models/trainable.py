"""Which parameters of a network are trained: all, or few of a network that begins with weights from elsewhere.

Noise for privacy grows with the square root of the number of trained parameters, so with a good start few are better (BitFit:
Ben Zaken et al., ACL 2022; under privacy Bu et al., ICML 2024). What is not trained keeps its value everywhere and is in no
message.
"""

from __future__ import annotations

from torch import nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.parameters import layers_with_parameters


def set_trainable(model: nn.Module, which: str) -> nn.Module:
    """Let `which` parameters be trained and no others, in place; returns the network.

    `all`; `head`: the last layer; `bias`: every bias, and the last layer; `last:N`: the last N layers that have parameters
    (a convolution and its normalisation are two). Raises `ModelError` for more layers than there are.
    """
    if which == "all":
        return model
    layers = [layer for _, layer in layers_with_parameters(model)]
    count = 1 if which in ("head", "bias") else int(which.removeprefix("last:"))
    if count > len(layers):
        raise ModelError(
            f"the network has {len(layers)} layers with parameters, not {count}", "lower training.trainable"
        )
    trained = {id(parameter) for layer in layers[-count:] for parameter in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        is_bias = which == "bias" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(is_bias or id(parameter) in trained)
    return model
