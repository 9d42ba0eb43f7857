"""The networks that hospitals train, by name, and their initial weights.

Initial weights follow the law each architecture prescribes (He et al. 2015 for ResNet, truncated normal for
transformers, ...) and are drawn from a generator of their own, keyed by the run's public seed: all parties build the
same network, whatever else the process has drawn before.

What `model.normalisation` puts in place of BatchNorm is in `batch_norm`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mpc_fl import compatibility
from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models import efficientnet_lite, own_networks, scattering
from mpc_fl.learning.models.batch_norm import freeze_normalisation, with_group_norm

OWN_ARCHITECTURES = ("small_cnn", "mlp", "linear", "efficientnet_lite0", "scattering")
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


def linear_classifier(features: int, classes: int) -> nn.Sequential:
    """Softmax regression without offsets, weights zero: for features with a constant beside them. (N, F) to (N, classes)."""
    layer = nn.Linear(features, classes, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)


def _torchvision_models() -> ModuleType:
    """Imported when a network of torchvision's is asked for: it takes longer than all of torch."""
    compatibility.prepare()  # defines the operators that the import needs
    import torchvision.models

    return torchvision.models


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names `config.model.architecture` accepts."""
    models = _torchvision_models()
    return OWN_ARCHITECTURES + tuple(models.list_models(module=models))


def _torchvision_classifier(name: str, classes: int) -> Callable[[], nn.Module]:
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):  # one output, no auxiliary classifiers
        options.update(aux_logits=False, init_weights=True)
    return functools.partial(_torchvision_models().get_model_builder(name), **options)


def build_network(name: str, classes: int) -> nn.Module:
    """A network for images of three channels by its name, with weights of no meaning. Raises `ModelError`."""
    if name == "efficientnet_lite0":
        return efficientnet_lite.efficientnet_lite0(classes)
    if name not in architectures():
        near = difflib.get_close_matches(name, architectures(), n=1, cutoff=0.0)
        raise ModelError(f"unknown network '{name}'", f"the nearest known name is '{near[0]}'")
    return _torchvision_classifier(name, classes)()


def _constructor(config: Config, input_shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    """What makes the network, once it is certain that it can be made. Raises `ModelError`."""
    name, classes = config.model.architecture, len(config.data.classes)
    if name in ("mlp", "linear"):
        features = int(torch.Size(input_shape).numel())
        if name == "linear":
            return functools.partial(linear_classifier, features, classes)
        return functools.partial(multilayer_perceptron, features, config.model.hidden, classes)
    if len(input_shape) != 3:
        raise ModelError(
            f"model.architecture '{name}' needs images, the data have shape {tuple(input_shape)}",
            "set model.architecture=mlp for tables",
        )
    if name == "small_cnn":
        if min(input_shape[1:]) < 8:
            raise ModelError(f"small_cnn needs images of at least 8x8 pixels, not {input_shape[1:]}", "use model mlp")
        return functools.partial(small_cnn, input_shape, classes)
    if name == "scattering":
        return _scattering(input_shape, classes)
    if name not in architectures():
        near = difflib.get_close_matches(name, architectures(), n=1, cutoff=0.0)
        raise ModelError(
            f"unknown model.architecture '{name}'",
            f"the nearest known name is '{near[0]}'; a network of an installed package is named package.module:function",
        )
    if input_shape[0] != 3:
        raise ModelError(
            f"model.architecture '{name}' takes 3 channels, the data have {input_shape[0]}", "set data.channels=3"
        )
    if name == "efficientnet_lite0":
        if any(side % efficientnet_lite.SIDES_OF for side in input_shape[1:]):
            raise ModelError(
                f"{name} takes images whose sides are multiples of {efficientnet_lite.SIDES_OF}, not {input_shape[1:]}",
                "set data.image_size=224, for which its public weights were made",
            )
        return functools.partial(efficientnet_lite.efficientnet_lite0, classes)
    return _torchvision_classifier(name, classes)


def _scattering(input_shape: tuple[int, ...], classes: int) -> Callable[[], nn.Module]:
    channels, *sides = input_shape
    if channels != 1 or min(sides) < scattering.SIDE:
        raise ModelError(
            f"scattering takes grey images of at least {scattering.SIDE} x {scattering.SIDE} pixels, not {input_shape}",
            f"set data.channels=1 and data.image_size={scattering.SIDE}",
        )
    return functools.partial(scattering.scattering, classes)


def build_model(config: Config, *, input_shape: tuple[int, ...] | None = None, seed: int | None = None) -> nn.Module:
    """The configured network with float32 initial weights that depend on `seed` alone, by default `config.seed`.

    `input_shape` is one record, by default that of the configuration: (C, H, W) for images, (F,) for tables. The output is
    (N, classes) logits. BatchNorm is
    replaced as `config.model.normalisation` says; call `calibrate_batchnorm` before training a `frozen` network.
    The process's random state is neither read nor changed. Raises `ModelError` for an unknown architecture (naming the
    nearest) and for data of the wrong form.
    """
    shape = config.data.input_shape if input_shape is None else input_shape
    drawn_from = config.seed if seed is None else seed
    if own_networks.is_own_network(config):
        model = own_networks.build(config, shape, drawn_from)
    else:
        construct, generator = _constructor(config, shape), torch.Generator().manual_seed(drawn_from)
        with torch.random.fork_rng(devices=[]), _DrawFrom(generator):
            model = construct()
    if config.model.normalisation == "group":
        return with_group_norm(model).eval()
    return freeze_normalisation(model).eval()
