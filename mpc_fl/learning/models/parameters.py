"""A network's trainable parameters as one flat vector, float32 (P,), and back.

The order is that of `named_parameters`. Where normalisation layers are each hospital's own, `shared_coordinates` says which
S of the P coordinates hospitals have in common, and `join_parts` puts both together again.
"""

from __future__ import annotations

import torch
from torch import nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.batch_norm import normalisation_layers


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes, in the order of the flat vector."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def layers_with_parameters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and layers that have parameters of their own, in the order of their definition; the last gives the logits."""
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]


def flatten_parameters(model: nn.Module) -> torch.Tensor:
    """A copy of all P trainable parameters, float32 (P,)."""
    pieces = [parameter.detach().reshape(-1).to(torch.float32) for _, parameter in trainable_parameters(model)]
    return torch.cat(pieces) if pieces else torch.empty(0)


def load_flat_parameters(model: nn.Module, flat: torch.Tensor) -> None:
    """Overwrite all P trainable parameters with float32 (P,). Raises `ModelError` if the sizes differ."""
    parameters = trainable_parameters(model)
    count = sum(parameter.numel() for _, parameter in parameters)
    if flat.dim() != 1 or flat.numel() != count:
        raise ModelError(
            f"the parameters have shape {tuple(flat.shape)}, the model needs ({count},)",
            "use a model file of the same architecture and classes",
        )
    start = 0
    with torch.no_grad():
        for _, parameter in parameters:
            piece = flat[start : start + parameter.numel()]
            parameter.copy_(piece.reshape(parameter.shape))
            start += parameter.numel()


def shared_coordinates(model: nn.Module, local_normalisation: bool) -> torch.Tensor:
    """Which of the P coordinates of `flatten_parameters` all hospitals share, bool (P,).

    All of them, or with `local_normalisation` all but scale and shift of normalisation layers (BatchNorm, frozen or not,
    GroupNorm, LayerNorm). Raises `ModelError` when a network without trainable normalisation shall keep it local.
    """
    own: set[int] = set()
    if local_normalisation:
        own = {id(value) for _, layer in normalisation_layers(model) for value in layer.parameters(recurse=False)}
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    if local_normalisation and not any(id(parameter) in own for parameter in parameters):
        raise ModelError("the network has no normalisation layer to train", "set training.local_normalisation to false")
    pieces = [torch.full((parameter.numel(),), id(parameter) not in own) for parameter in parameters]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.bool)


def _statistics(model: nn.Module) -> list[torch.Tensor]:
    """Floating-point buffers that belong to a model's state; what the architecture computes anew (filters, say) does not."""
    state = model.state_dict(keep_vars=True)
    return [state[name] for name, buffer in model.named_buffers() if name in state and buffer.is_floating_point()]


def flatten_buffers(model: nn.Module) -> torch.Tensor:
    """All floating-point buffers of the state (frozen normalisation statistics) in one float32 vector."""
    pieces = [buffer.reshape(-1).float() for buffer in _statistics(model)]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def load_flat_buffers(model: nn.Module, flat: torch.Tensor) -> None:
    """Inverse of `flatten_buffers`; the caller has checked the length."""
    start = 0
    for buffer in _statistics(model):
        buffer.copy_(flat[start : start + buffer.numel()].reshape(buffer.shape))
        start += buffer.numel()


def join_parts(shared: torch.Tensor, own: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """All P parameters of a hospital, float32 (P,): the global ones where `coordinates` (bool (P,)) says so, its own
    elsewhere.

    `shared` is what the aggregator sent, float32 (S,) with S coordinates set; `own` is float32 (P,), the hospital's
    parameters after training, of which only the other P - S count. Raises `ValueError` for other sizes.
    """
    if own.shape != coordinates.shape or shared.shape != (int(coordinates.sum()),):
        raise ValueError("shared and own parameters do not make up the network")
    joined = own.clone()
    joined[coordinates] = shared
    return joined
