"""What stands for BatchNorm, whose batch statistics mix patients: frozen statistics, or GroupNorm.

BatchNorm cannot be trained with differential privacy. `frozen` keeps the layer with statistics measured once on public
synthetic images; under encryption they fold into the convolution. `group` is GroupNorm (Wu and He, ECCV 2018).

The layers that normalise, BatchNorm or not, may be each hospital's own (FedBN; Li et al., ICLR 2021): their state can be
taken from a network and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mpc_fl.errors import ModelError

_CALIBRATION_CHUNK = 64
_NORMALISATION = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class FrozenBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm whose statistics never change: `.train()` leaves it in evaluation mode. Weight and bias are trained."""

    def train(self, mode: bool = True) -> FrozenBatchNorm1d:
        super().train(False)
        return self


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics never change: `.train()` leaves it in evaluation mode. Weight and bias are trained."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        super().train(False)
        return self


def _replace_batchnorm(model: nn.Module, replacement: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(model, _BatchNorm):
        if not type(model).forward.__module__.startswith("torch.nn."):
            raise ModelError(
                f"{type(model).__name__} does more than BatchNorm, so nothing here can stand for it",
                "build the network with BatchNorm of torch.nn, and activations beside it",
            )
        return replacement(model)
    for name, child in list(model.named_children()):
        setattr(model, name, _replace_batchnorm(child, replacement))
    return model


def _frozen(layer: _BatchNorm) -> nn.Module:
    if isinstance(layer, (FrozenBatchNorm1d, FrozenBatchNorm2d)):
        return layer
    if isinstance(layer, nn.BatchNorm2d):
        kind: type[_BatchNorm] = FrozenBatchNorm2d
    elif isinstance(layer, nn.BatchNorm1d):
        kind = FrozenBatchNorm1d
    else:
        raise ModelError(f"{type(layer).__name__} cannot be frozen", "set model.normalisation=group")
    if not layer.track_running_stats:
        raise ModelError("a BatchNorm layer keeps no statistics that could be frozen", "set model.normalisation=group")
    frozen = kind(layer.num_features, eps=layer.eps, momentum=layer.momentum, affine=layer.affine)
    frozen.load_state_dict(layer.state_dict())
    return frozen.eval()


def _grouped(layer: _BatchNorm) -> nn.Module:
    channels = layer.num_features
    # At most 32 groups of at least 4 channels: one channel per group would be instance normalisation.
    groups = max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
    grouped = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        grouped.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return grouped


def freeze_normalisation(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by its frozen counterpart, in place, and return the network.

    Weights, biases and statistics are kept, names and order of parameters too. `.train()` does not unfreeze it.
    Raises `ModelError` for layers without running statistics.
    """
    return _replace_batchnorm(model, _frozen)


def with_group_norm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by GroupNorm with the same weight and bias, in place, and return the network."""
    return _replace_batchnorm(model, _grouped)


def calibrate_batchnorm(model: nn.Module, inputs: torch.Tensor) -> None:
    """Measure the statistics of every BatchNorm on public `inputs`, float32 (N, ...) with N >= 2, and keep them.

    The statistics are plain averages over chunks of 64 inputs. They are buffers, not parameters: no update carries
    them, so all parties must calibrate on the same public inputs. Never call this with patients' data: nothing is
    clipped and no noise is added (the federation's `calibrate_own` says when a hospital may after all). Raises
    `ModelError` for fewer than two inputs.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return
    if len(inputs) < 2:
        raise ModelError("BatchNorm cannot be calibrated on fewer than two inputs", "pass more public images")
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()  # no dropout while measuring
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.training = True
    with torch.no_grad():
        # Equal chunks, none of a single input.
        for chunk in inputs.chunk(max(1, len(inputs) // _CALIBRATION_CHUNK)):
            model(chunk)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, mode in modes.items():
        module.training = mode


def normalisation_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and layers of BatchNorm, frozen or not, InstanceNorm, GroupNorm, LayerNorm and RMSNorm."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _NORMALISATION)]


def normalisation_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and statistics of normalisation layers, by their names in the `state_dict`."""
    return {
        f"{path}.{name}" if path else name: value.detach().clone()
        for path, layer in normalisation_layers(model)
        for name, value in layer.state_dict().items()
    }


def load_normalisation_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `normalisation_state`, into a network of the same structure. Raises `ModelError` for another one."""
    names = normalisation_state(model).keys()
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in names}
    forms = {name: (value.dtype, value.shape) for name, value in own.items()}
    if forms != {name: (value.dtype, value.shape) for name, value in state.items()}:
        raise ModelError(
            "the normalisation layers do not fit the network", "use a file of the same architecture and normalisation"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
