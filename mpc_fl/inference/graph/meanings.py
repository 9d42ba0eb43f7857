"""What the layers and functions of torch mean under encryption: which `kind` with which public options and weights.

Two tables, `MODULES` for torch.nn layers and `FUNCTIONS` for their functional forms. An entry returns a `Meaning`, or
a string that says which option has no encrypted counterpart. The functions behind the entries take their arguments under
torch's names and in torch's order, all of them, so that a call in a network can be bound to them as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BatchSize:
    """Entry `dimension` of a secret tensor's shape, as in `x.view(x.size(0), -1)`; only entry 0 can be used."""

    dimension: int


@dataclass(frozen=True, eq=False)
class Meaning:
    """`tensors` are the private weights by name (None where the layer has none), `options` the public rest."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor | None] = field(default_factory=dict)


Verdict = Meaning | str

# By meaning, not by name. Empty: nothing comes near.
_NEAREST = {
    "Tanh": "Hardtanh",
    "Softsign": "Hardtanh",
    "Tanhshrink": "Hardtanh",
    "Hardshrink": "Hardtanh",
    "Softshrink": "Hardtanh",
    "LogSigmoid": "Sigmoid",
    "LeakyReLU": "ReLU",
    "PReLU": "ReLU",
    "RReLU": "ReLU",
    "Threshold": "ReLU",
    "Softplus": "ReLU",
    "ELU": "GELU",
    "SELU": "GELU",
    "CELU": "GELU",
    "Mish": "SiLU",
    "GLU": "Sigmoid",
    "Softmax": "Sigmoid",
    "LogSoftmax": "Sigmoid",
    "Softmin": "Sigmoid",
    "Softmax2d": "Sigmoid",
    "InstanceNorm2d": "GroupNorm",
    "LocalResponseNorm": "GroupNorm",
    "SyncBatchNorm": "BatchNorm2d",
    "BatchNorm3d": "BatchNorm2d",
    "RMSNorm": "LayerNorm",
    "LPPool2d": "AvgPool2d",
    "AvgPool1d": "AvgPool2d",
    "AvgPool3d": "AvgPool2d",
    "FractionalMaxPool2d": "MaxPool2d",
    "MaxPool1d": "MaxPool2d",
    "MaxPool3d": "MaxPool2d",
    "Conv1d": "Conv2d",
    "Conv3d": "Conv2d",
    "ConvTranspose2d": "Conv2d",
    "Bilinear": "Linear",
    "Matmul": "Linear",
    "Max": "AdaptiveMaxPool2d",
    "Amax": "AdaptiveMaxPool2d",
    "Sub": "add",
    "Truediv": "mul",
    "Div": "mul",
    "Chunk": "cat",
    "Split": "cat",
    "Getitem": "cat",
    "Stack": "cat",
    "View": "torch.flatten(x, 1)",
    "Reshape": "torch.flatten(x, 1)",
    "Squeeze": "torch.flatten(x, 1)",
}
_NEAREST_FOLDED = {name.lower().replace("_", ""): near for name, near in _NEAREST.items()}


# What to do about steps that nothing comes near and that nobody can leave out.
ADVICE = {
    "scattering_features": "for encrypted diagnosis train another model.architecture, efficientnet_lite0 for example"
}


def nearest_supported(kind: str) -> str:
    """The supported layer closest in meaning to `kind`, a torch.nn class or function name; '' if none comes near."""
    own = {layer.__name__.lower(): layer.__name__ for layer in MODULES}
    name = kind.lower().replace("_", "")
    return _NEAREST_FOLDED.get(name) or own.get(name, "")


def _pair(value: int | tuple[Any, ...] | list[Any]) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[1]) if len(value) == 2 else (value[0], value[0])
    return (value, value)


def _conv2d(
    input: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Verdict:
    if not isinstance(weight, torch.Tensor):
        return "a weight that depends on the input"
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[-2:], strict=True)]
        if any(total % 2 for total in totals):
            return "padding 'same' that is larger on one side"
        padding = tuple(total // 2 for total in totals)
    options = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return Meaning("Conv2d", options, {"weight": weight, "bias": bias})


def _linear(input: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Verdict:
    if not isinstance(weight, torch.Tensor):
        return "a weight that depends on the input"
    return Meaning("Linear", {}, {"weight": weight, "bias": bias})


def _batch_norm(
    input: Any,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    dimensions: int = 4,
) -> Verdict:
    if training or running_mean is None or running_var is None:
        return "statistics of the batch"
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    shape = (-1,) if dimensions == 2 else (-1, 1, 1)
    tensors = {"weight": scale.float().reshape(shape), "bias": shift.float().reshape(shape)}
    return Meaning("Affine", {"dimensions": dimensions}, tensors)


def _batch_norm_module(layer: Any) -> Verdict:
    dimensions = 2 if isinstance(layer, nn.BatchNorm1d) else 4
    statistics = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return _batch_norm(None, *statistics, eps=layer.eps, dimensions=dimensions)


def _max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Verdict:
    if return_indices:
        return "indices"
    stride = kernel_size if stride is None or stride == [] else stride
    options = {"kernel_size": _pair(kernel_size), "stride": _pair(stride), "padding": _pair(padding)}
    return Meaning("MaxPool2d", {**options, "dilation": _pair(dilation), "ceil_mode": ceil_mode})


def _avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Verdict:
    if divisor_override is not None:
        return "divisor_override"
    stride = kernel_size if stride is None or stride == [] else stride
    options = {"kernel_size": _pair(kernel_size), "stride": _pair(stride), "padding": _pair(padding)}
    return Meaning("AvgPool2d", {**options, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad})


def _adaptive(kind: str) -> Callable[..., Verdict]:
    def meaning(input: Any, output_size: Any, return_indices: bool = False) -> Verdict:
        return "indices" if return_indices else Meaning(kind, {"output_size": _pair(output_size)})

    return meaning


def _layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Verdict:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return Meaning("LayerNorm", {"shape": shape, "eps": eps}, {"weight": weight, "bias": bias})


def _group_norm(
    input: Any,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Verdict:
    return Meaning("GroupNorm", {"groups": num_groups, "eps": eps}, {"weight": weight, "bias": bias})


def _reshape(input: Any, shape: Any) -> Verdict:
    sizes = tuple(shape)
    for place, size in enumerate(sizes):
        batch = place == 0 and isinstance(size, BatchSize) and size.dimension == 0
        if not batch and (isinstance(size, BatchSize) or not isinstance(size, int)):
            return "a size that depends on the input's shape"
    return Meaning("Reshape", {"shape": tuple(0 if isinstance(size, BatchSize) else size for size in sizes)})


def _sum_of(input: Any, other: Any, alpha: float = 1) -> Verdict:
    return "alpha other than 1" if alpha != 1 else _pointwise("Add", "bias", input, other)


def _product_of(input: Any, other: Any) -> Verdict:
    return _pointwise("Mul", "weight", input, other)


def _pointwise(kind: str, role: str, left: Any, right: Any) -> Verdict:
    """A tensor that no secret entered is a weight of the model (a layer scale, say) and stays private."""
    for public in (left, right):
        if isinstance(public, (int, float)):
            return Meaning("Affine", {}, {role: torch.tensor([float(public)])})
        if isinstance(public, torch.Tensor):
            return Meaning("Affine", {}, {role: public.float()})
    return Meaning(kind)


def _cat(tensors: Any, dim: int = 0) -> Verdict:
    if any(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return "a constant among the tensors"
    return Meaning("Concat", {"dim": dim})


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Verdict:
    return Meaning("Hardtanh", {"min_val": min_val, "max_val": max_val})


def _mean(input: Any, dim: Any = None, keepdim: bool = False) -> Verdict:
    if dim is None:
        return "a mean over the batch"
    return Meaning("Mean", {"dim": (dim,) if isinstance(dim, int) else tuple(dim), "keepdim": keepdim})


def _plain(kind: str) -> Callable[..., Verdict]:
    return lambda *_, **__: Meaning(kind)


def _conv2d_module(layer: Any) -> Verdict:
    if layer.padding_mode != "zeros":
        return f"padding_mode '{layer.padding_mode}'"
    return _conv2d(None, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


MODULES: dict[type[nn.Module], Callable[[Any], Verdict]] = {
    nn.Conv2d: _conv2d_module,
    nn.Linear: lambda m: _linear(None, m.weight, m.bias),
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.LayerNorm: lambda m: _layer_norm(None, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: lambda m: _group_norm(None, m.num_groups, m.weight, m.bias, m.eps),
    nn.ReLU: _plain("ReLU"),
    nn.ReLU6: lambda m: _hardtanh(None, 0.0, 6.0),
    nn.Hardtanh: lambda m: _hardtanh(None, m.min_val, m.max_val),
    nn.Hardsigmoid: _plain("Hardsigmoid"),
    nn.Hardswish: _plain("Hardswish"),
    nn.Sigmoid: _plain("Sigmoid"),
    nn.SiLU: _plain("SiLU"),
    nn.GELU: _plain("GELU"),
    nn.Softmax: _plain("Softmax"),
    nn.LogSoftmax: _plain("Softmax"),
    nn.Dropout: _plain("Identity"),
    nn.Dropout1d: _plain("Identity"),
    nn.Dropout2d: _plain("Identity"),
    nn.AlphaDropout: _plain("Identity"),
    nn.Identity: _plain("Identity"),
    nn.Flatten: lambda m: Meaning("Flatten", {"start_dim": m.start_dim, "end_dim": m.end_dim}),
    nn.MaxPool2d: lambda m: _max_pool2d(
        None, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m: _avg_pool2d(
        None, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda m: _adaptive("AdaptiveAvgPool2d")(None, m.output_size),
    nn.AdaptiveMaxPool2d: lambda m: _adaptive("AdaptiveMaxPool2d")(None, m.output_size, m.return_indices),
}

# Names in the order torch takes them; a last name with a star collects the remaining positional arguments.
FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Verdict]]] = {
    "conv2d": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _conv2d),
    "linear": (("input", "weight", "bias"), _linear),
    "batch_norm": (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
    "layer_norm": (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    "group_norm": (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    "relu": (("input", "inplace"), _plain("ReLU")),
    "relu6": (("input", "inplace"), lambda **_: _hardtanh(None, 0.0, 6.0)),
    "hardtanh": (("input", "min_val", "max_val", "inplace"), _hardtanh),
    "hardsigmoid": (("input", "inplace"), _plain("Hardsigmoid")),
    "hardswish": (("input", "inplace"), _plain("Hardswish")),
    "sigmoid": (("input",), _plain("Sigmoid")),
    "silu": (("input", "inplace"), _plain("SiLU")),
    "gelu": (("input", "approximate"), _plain("GELU")),
    "softmax": (("input", "dim", "_stacklevel", "dtype"), _plain("Softmax")),
    "log_softmax": (("input", "dim", "_stacklevel", "dtype"), _plain("Softmax")),
    "dropout": (("input", "p", "training", "inplace"), _plain("Identity")),
    "dropout2d": (("input", "p", "training", "inplace"), _plain("Identity")),
    "stochastic_depth": (("input", "p", "mode", "training"), _plain("Identity")),
    "contiguous": (("input",), _plain("Identity")),
    "clone": (("input",), _plain("Identity")),
    "max_pool2d": (
        ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        _max_pool2d,
    ),
    "avg_pool2d": (
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        _avg_pool2d,
    ),
    "adaptive_avg_pool2d": (("input", "output_size"), _adaptive("AdaptiveAvgPool2d")),
    "adaptive_max_pool2d": (("input", "output_size", "return_indices"), _adaptive("AdaptiveMaxPool2d")),
    "mean": (("input", "dim", "keepdim"), _mean),
    "flatten": (
        ("input", "start_dim", "end_dim"),
        lambda input, start_dim=0, end_dim=-1: Meaning("Flatten", {"start_dim": start_dim, "end_dim": end_dim}),
    ),
    "view": (("input", "*shape"), _reshape),
    "reshape": (("input", "*shape"), _reshape),
    "permute": (("input", "*dims"), lambda input, dims: Meaning("Permute", {"dims": tuple(dims)})),
    "cat": (("tensors", "dim"), _cat),
    "concat": (("tensors", "dim"), _cat),
    "add": (("input", "other", "alpha"), _sum_of),
    "mul": (("input", "other"), _product_of),
}
