"""The networks that hospitals train, their initial weights, and their parameters as one flat vector.

Initial weights follow the law each architecture prescribes (He et al. 2015 for ResNet, truncated normal for
transformers, ...) and are drawn from a generator of their own, keyed by the run's public seed: all parties build the
same network, whatever else the process has drawn before.

BatchNorm cannot be trained with differential privacy, because its batch statistics mix patients. Two replacements:
`frozen` keeps the layer with statistics measured once on public synthetic images (they fold into the convolution under
encryption); `group` is GroupNorm (Wu and He, ECCV 2018).

Parameters are global, or (FedBN; Li et al., ICLR 2021) those of normalisation layers are each hospital's own:
`shared_coordinates` says which coordinates of the flat vector hospitals have in common.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from mpc_fl import compatibility
from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError

compatibility.prepare()
import torchvision.models  # noqa: E402  (after the operators it needs are defined)

OWN_ARCHITECTURES = ("small_cnn", "mlp")
_CALIBRATION_CHUNK = 64
_NORMALISATION = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_RANDOM_FILLS = frozenset(
    {
        "uniform_",
        "normal_",
        "trunc_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "xavier_uniform_",
        "xavier_normal_",
        "orthogonal_",
    }
)


class _DrawFrom(TorchFunctionMode):
    """Inside this context every random fill of a tensor draws from the given generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        values = dict(kwargs or {})
        if getattr(function, "__name__", "") in _RANDOM_FILLS and values.get("generator") is None:
            values["generator"] = self._generator
        return function(*args, **values)


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


def small_cnn(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two convolutions for small images and noisy gradients: 22,499 parameters at (1, 32, 32) with 3 classes.

    Shallow and narrow, because the norm of the noise grows with the square root of the parameters and few steps fit a
    privacy budget; the linear layer sees a 4x4 grid, so it can tell where in the image something lies (with a global
    average instead, trials at epsilon 8 lost 20 points). Under encryption most comparisons are 32 x 16 x 16
    ReLUs. `input_shape` is (C, H, W) with H, W >= 8; input (N, C, H, W), output logits (N, classes).
    """
    channels, *size = input_shape
    rows, columns = (((pixels + 1) // 2) // 4 for pixels in size)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 32, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    shrink = max(1, min(rows, columns) // 4)
    if shrink > 1:
        layers.append(nn.AvgPool2d(shrink))
        rows, columns = rows // shrink, columns // shrink
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * rows * columns, classes))


def multilayer_perceptron(features: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """Fully connected layers with ReLU. Input (N, ...) with `features` values per record, output (N, classes)."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = features
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, classes))


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names `config.model.architecture` accepts."""
    return OWN_ARCHITECTURES + tuple(torchvision.models.list_models(module=torchvision.models))


def _torchvision_classifier(name: str, classes: int) -> nn.Module:
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):  # one output, no auxiliary classifiers
        options.update(aux_logits=False, init_weights=True)
    return torchvision.models.get_model_builder(name)(**options)


def _construct(config: Config, input_shape: tuple[int, ...]) -> nn.Module:
    name, classes = config.model.architecture, len(config.data.classes)
    if name == "mlp":
        return multilayer_perceptron(int(torch.Size(input_shape).numel()), config.model.hidden, classes)
    if len(input_shape) != 3:
        raise ModelError(
            f"model.architecture '{name}' needs images, the data have shape {tuple(input_shape)}",
            "set model.architecture=mlp for tables",
        )
    if name == "small_cnn":
        if min(input_shape[1:]) < 8:
            raise ModelError(f"small_cnn needs images of at least 8x8 pixels, not {input_shape[1:]}", "use model mlp")
        return small_cnn(input_shape, classes)
    if name not in architectures():
        near = difflib.get_close_matches(name, architectures(), n=1, cutoff=0.0)
        raise ModelError(f"unknown model.architecture '{name}'", f"the nearest known name is '{near[0]}'")
    if input_shape[0] != 3:
        raise ModelError(
            f"model.architecture '{name}' takes 3 channels, the data have {input_shape[0]}", "set data.channels=3"
        )
    return _torchvision_classifier(name, classes)


def build_model(config: Config, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    """The configured network with float32 initial weights that depend on `seed` alone.

    `input_shape` is one record: (C, H, W) for images, (F,) for tables. The output is (N, classes) logits. BatchNorm is
    replaced as `config.model.normalisation` says; call `calibrate_batchnorm` before training a `frozen` network.
    The process's random state is neither read nor changed. Raises `ModelError` for an unknown architecture (naming the
    nearest) and for data of the wrong form.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), _DrawFrom(generator):
        model = _construct(config, input_shape)
    if config.model.normalisation == "group":
        return with_group_norm(model).eval()
    return freeze_normalisation(model).eval()


def _replace_batchnorm(model: nn.Module, replacement: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(model, _BatchNorm):
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
    clipped and no noise is added (`strategies.calibrate_own` says when a hospital may after all). Raises
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


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes, in the order of the flat vector."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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


def _normalisation_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _NORMALISATION)]


def shared_coordinates(model: nn.Module, local_normalisation: bool) -> torch.Tensor:
    """Which of the P coordinates of `flatten_parameters` all hospitals share, bool (P,).

    All of them, or with `local_normalisation` all but scale and shift of normalisation layers (BatchNorm, frozen or not,
    GroupNorm, LayerNorm). Raises `ModelError` when a network without trainable normalisation shall keep it local.
    """
    own: set[int] = set()
    if local_normalisation:
        own = {id(value) for _, layer in _normalisation_layers(model) for value in layer.parameters(recurse=False)}
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    if local_normalisation and not any(id(parameter) in own for parameter in parameters):
        raise ModelError("the network has no normalisation layer to train", "set training.local_normalisation to false")
    pieces = [torch.full((parameter.numel(),), id(parameter) not in own) for parameter in parameters]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.bool)


def normalisation_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and statistics of normalisation layers, by their names in the `state_dict`."""
    return {
        f"{path}.{name}" if path else name: value.detach().clone()
        for path, layer in _normalisation_layers(model)
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
