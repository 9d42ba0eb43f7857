"""Which parameters of a network are trained: all, or few of a network that begins with weights from elsewhere.

Noise for privacy grows with the square root of the number of trained parameters, so with a good start few are better (BitFit:
Ben Zaken et al., ACL 2022; under privacy Bu et al., ICML 2024; low-rank adapters under privacy: Yu et al., ICLR 2022). What is not
trained keeps its value everywhere and is in no message.
"""

from __future__ import annotations

from torch import nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.low_rank import AdaptedLayer, adapt, takes_adapter
from mpc_fl.learning.models.parameters import layers_with_parameters


def set_trainable(model: nn.Module, which: str, seed: int = 0) -> nn.Module:
    """Let `which` parameters be trained and no others, in place; returns the network.

    `all`; `head`: the last layer; `bias`: every bias, and the last layer; `last:N`: the last N layers that have parameters
    (a convolution and its normalisation are two); `lora:R`: adapters of rank R (`low_rank`), drawn from the public `seed`,
    beside every layer that takes one, and the last layer. Raises `ModelError` for more layers than there are, or where none
    takes an adapter.
    """
    if which == "all":
        return model
    layers = layers_with_parameters(model)
    count = int(which.removeprefix("last:")) if which.startswith("last:") else 1
    if count > len(layers):
        raise ModelError(
            f"the network has {len(layers)} layers with parameters, not {count}", "lower training.trainable"
        )
    trained = {id(parameter) for _, layer in layers[-count:] for parameter in layer.parameters(recurse=False)}
    if which.startswith("lora:"):
        _adapt(model, layers[:-1], int(which.removeprefix("lora:")), seed)
        trained |= {id(parameter) for parameter in _adapters(model)}
    for name, parameter in model.named_parameters():
        is_bias = which == "bias" and name.rpartition(".")[2] == "bias"
        parameter.requires_grad_(is_bias or id(parameter) in trained)
    return model


def _adapt(model: nn.Module, layers: list[tuple[str, nn.Module]], rank: int, seed: int) -> None:
    paths = [path for path, layer in layers if takes_adapter(layer, rank)]
    if not paths:
        raise ModelError(
            f"no layer before the last one is larger than an adapter of rank {rank}",
            "lower the rank in training.trainable, or set it to head, bias, last:N or all",
        )
    adapt(model, paths, rank, seed)


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    adapted = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer)]
    return [weight for layer in adapted for half in (layer.down, layer.up) for weight in half.parameters()]
