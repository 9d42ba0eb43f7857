"""Layers on secret-shared tensors: crypten.nn modules where CrypTen has them, and what it lacks.

A comparison costs 216 bytes per party and element and 8 rounds, a multiplication 16 bytes and 1 round (Knott et al.,
NeurIPS 2021), so everything here spends few comparisons. What is public (kernel sizes, windows, breakpoints,
polynomial coefficients) is applied to shares locally. Every `forward` takes and returns MPCTensors; the shapes are
those of the torch layer of the same name.

Approximations and their largest errors at 16 fractional bits, tested in tests/inference/reference/test_network.py:

- GELU: relu(x) minus a polynomial of degree 7 in |x| below 4, error 0.002
- SiLU: relu(x) minus a polynomial of degree 6 in |x| below 8, error 0.004
- Sigmoid: the sign of x and a polynomial of degree 7 in |x| below 8, error 0.002
- LayerNorm, GroupNorm: Newton's inverse square root, error 0.005 for standard deviations from 0.05 to 16
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpc_fl.errors import ModelError
from mpc_fl.inference.graph.tracing import Operation
from mpc_fl.inference.reference.approximations import (
    Secret,
    gelu,
    hardsigmoid,
    hardswish,
    inverse_square_root,
    joined,
    sigmoid,
    silu,
)
from mpc_fl.sharing.crypten_parts import crypten

# For each output position of a pooling, the input positions its window covers.
Windows = list[list[int]]


def pairwise_max(a: Secret, b: Secret) -> Secret:
    """a + relu(b - a): one comparison, and no arg-max."""
    return a + (b - a).relu()


def _pool_windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Windows:
    """Windows of a pooling along one axis, without the padding. Rounding as in torch's pooling_output_shape."""
    span = dilation * (kernel - 1) + 1
    room = size + 2 * padding - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window would start in the padding
    starts = [place * stride - padding for place in range(count)]
    windows = [[p for p in range(start, start + span, dilation) if 0 <= p < size] for start in starts]
    if not windows or not all(windows):
        raise ModelError(f"a pooling window of {kernel} covers none of {size} pixels", "use larger images")
    return windows


def _adaptive_windows(size: int, outputs: int) -> Windows:
    """Window i covers floor(i n / m) to ceil((i + 1) n / m), as in torch."""
    return [list(range(i * size // outputs, -(-(i + 1) * size // outputs))) for i in range(outputs)]


def _max_along(x: Secret, axis: int, windows: Windows) -> Secret:
    """Largest value in each window along `axis`, by a tree of pairwise maxima.

    A window cut by the border repeats its last element, which leaves the maximum exact; padding with a very negative
    number instead would use up headroom. All pairs of one tree level are compared at once, in the same rounds.
    """
    longest = max(len(window) for window in windows)
    places = [torch.tensor([window[min(step, len(window) - 1)] for window in windows]) for step in range(longest)]
    candidates = [x.index_select(axis, place) for place in places]
    while len(candidates) > 1:
        half = len(candidates) // 2
        odd = candidates[2 * half :]
        left, right = joined(candidates[:half], 0), joined(candidates[half : 2 * half], 0)
        rows = candidates[0].size(0)
        larger = pairwise_max(left, right)
        candidates = [larger[part * rows : (part + 1) * rows] for part in range(half)] + odd
    return candidates[0]


def _sum_along(x: Secret, axis: int, windows: Windows) -> Secret:
    return joined([x.index_select(axis, torch.tensor(window)).sum(axis, keepdim=True) for window in windows], axis)


class MaxPool(crypten.nn.Module):
    """Largest value per window, first along columns of pixels, then along rows: for 3x3 four comparisons, not eight.

    `rows` and `columns` give the windows along an axis of n pixels. Input (N, C, H, W).
    """

    def __init__(self, rows: Callable[[int], Windows], columns: Callable[[int], Windows]) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Secret) -> Secret:
        x = _max_along(x, 2, self.rows(x.size(2)))
        return _max_along(x, 3, self.columns(x.size(3)))


class WindowMean(crypten.nn.Module):
    """Mean over each window. Sums are local; one division by the public window sizes truncates once.

    `rows` and `columns` give the windows along an axis of n pixels. Input (N, C, H, W).
    """

    def __init__(self, rows: Callable[[int], Windows], columns: Callable[[int], Windows]) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Secret) -> Secret:
        rows, columns = self.rows(x.size(2)), self.columns(x.size(3))
        heights, widths = torch.tensor([len(w) for w in rows]), torch.tensor([len(w) for w in columns])
        sums = _sum_along(_sum_along(x, 2, rows), 3, columns)
        divisors = heights[:, None] * widths[None, :]
        return sums.div(divisors)


class Local(crypten.nn.Module):
    """A layer that only moves elements or sums them: each party does it alone."""

    def __init__(self, function: Callable[[Secret], Secret]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Secret) -> Secret:
        return self.function(x)


class Join(crypten.nn.Module):
    """Concatenation of any number of inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Secret) -> Secret:
        return joined(inputs, self.dim)


class Sum(crypten.nn.Module):
    """x + y, local."""

    def forward(self, x: Secret, y: Secret) -> Secret:
        return x + y


class Product(crypten.nn.Module):
    """x * y, both secret, with broadcasting."""

    def forward(self, x: Secret, y: Secret) -> Secret:
        return x * y


class Affine(crypten.nn.Module):
    """weight * x + bias per channel, both secret: a BatchNorm that no convolution could take in."""

    def __init__(self, dimensions: int | None) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, x: Secret) -> Secret:
        _require_dimensions(x, self.dimensions)
        if hasattr(self, "weight"):
            x = x * self.weight
        return x + self.bias if hasattr(self, "bias") else x


def _require_dimensions(x: Secret, dimensions: int | None) -> None:
    if dimensions is not None and x.dim() != dimensions:
        raise ModelError(f"BatchNorm on {x.dim()} dimensions", "only (N, F) and (N, C, H, W) inputs are supported")


class Linear(crypten.nn.Linear):
    """x W^T + b; with a folded BatchNorm1d only for inputs (N, F)."""

    dimensions: int | None = None

    def forward(self, x: Secret) -> Secret:
        _require_dimensions(x, self.dimensions)
        return super().forward(x)


def _standardised(x: Secret, eps: float) -> Secret:
    """(x - mean) / sqrt(variance + eps) over the last axis, for standard deviations from 0.008 to 64.

    Largest error seen at 16 fractional bits: 0.005 from 0.05 to 16, 0.02 from 0.03 to 64.
    """
    size = x.size(-1)
    # Four times the deviation keeps four more bits of a small variance, and cancels in the quotient.
    centred = (x - x.sum(-1, keepdim=True).div(size)) * 4
    variance = centred.square().sum(-1, keepdim=True).div(size)
    return centred * inverse_square_root(variance + 16 * eps)


class LayerNorm(Affine):
    """LayerNorm (Ba et al. 2016) over the last `shape` axes, then weight and bias.

    26 comparisons per standardised row, not per element; for standard deviations from 0.008 to 64.
    """

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        super().__init__(None)
        self.shape, self.eps = shape, eps

    def forward(self, x: Secret) -> Secret:
        sizes = tuple(x.size())
        if sizes[-len(self.shape) :] != self.shape:
            raise ModelError(f"LayerNorm over {self.shape} on a tensor of shape {sizes}", "check the image size")
        rows = x.reshape((*sizes[: -len(self.shape)], math.prod(self.shape)))
        return super().forward(_standardised(rows, self.eps).reshape(sizes))


class GroupNorm(crypten.nn.Module):
    """GroupNorm (Wu and He, ECCV 2018) over channels in groups, then weight and bias per channel.

    26 comparisons per group and image, not per element; for standard deviations from 0.008 to 64.
    """

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, x: Secret) -> Secret:
        sizes = tuple(x.size())
        per_channel = (-1, *[1] * (len(sizes) - 2))
        x = _standardised(x.reshape((sizes[0], self.groups, -1)), self.eps).reshape(sizes)
        if hasattr(self, "weight"):
            x = x * self.weight.reshape(per_channel)
        return x + self.bias.reshape(per_channel) if hasattr(self, "bias") else x


def _windows_of(kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Callable[[int], Windows]:
    return lambda size: _pool_windows(size, kernel, stride, padding, dilation, ceil_mode)


def _adaptive_windows_of(outputs: int | None) -> Callable[[int], Windows]:
    return lambda size: _adaptive_windows(size, size if outputs is None else outputs)


def _max_pool(o: Mapping[str, Any]) -> MaxPool:
    per_axis = zip(o["kernel_size"], o["stride"], o["padding"], o["dilation"], strict=True)
    rows, columns = [_windows_of(*axis, o["ceil_mode"]) for axis in per_axis]
    return MaxPool(rows, columns)


def _avg_pool(o: Mapping[str, Any]) -> crypten.nn.Module:
    kernel, stride, padding = o["kernel_size"], o["stride"], o["padding"]
    if not o["ceil_mode"] and (o["count_include_pad"] or padding == (0, 0)):
        return crypten.nn.AvgPool2d(kernel, stride=stride, padding=padding)
    if o["ceil_mode"] and o["count_include_pad"] and padding != (0, 0):
        raise ModelError("AvgPool2d with ceil_mode that counts the padding", "set count_include_pad=False")
    per_axis = zip(kernel, stride, padding, strict=True)
    rows, columns = [_windows_of(*axis, 1, o["ceil_mode"]) for axis in per_axis]
    return WindowMean(rows, columns)


def _adaptive_pool(kind: Callable[..., crypten.nn.Module], o: Mapping[str, Any]) -> crypten.nn.Module:
    rows, columns = [_adaptive_windows_of(size) for size in o["output_size"]]
    return kind(rows, columns)


def _reshape(shape: tuple[int, ...]) -> Callable[[Secret], Secret]:
    return lambda x: x.reshape((x.size(0), *shape[1:]) if shape[0] == 0 else shape)


def _conv2d(operation: Operation) -> crypten.nn.Module:
    weight, o = operation.tensors["weight"], operation.options
    channels = weight.shape[1] * o["groups"]
    return crypten.nn.Conv2d(
        channels,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=o["stride"],
        padding=o["padding"],
        dilation=o["dilation"],
        groups=o["groups"],
        bias="bias" in operation.tensors,
    )


def _linear(operation: Operation) -> Linear:
    weight = operation.tensors["weight"]
    layer = Linear(weight.shape[1], weight.shape[0], bias="bias" in operation.tensors)
    layer.dimensions = operation.options.get("dimensions")
    return layer


_BUILDERS: dict[str, Callable[[Operation], crypten.nn.Module]] = {
    "Conv2d": _conv2d,
    "Linear": _linear,
    "Affine": lambda op: Affine(op.options.get("dimensions")),
    "LayerNorm": lambda op: LayerNorm(op.options["shape"], op.options["eps"]),
    "GroupNorm": lambda op: GroupNorm(op.options["groups"], op.options["eps"]),
    "ReLU": lambda op: crypten.nn.ReLU(),
    "Hardtanh": lambda op: crypten.nn.Hardtanh(op.options["min_val"], op.options["max_val"]),
    "GELU": lambda op: Local(gelu),
    "SiLU": lambda op: Local(silu),
    "Sigmoid": lambda op: Local(sigmoid),
    "Hardsigmoid": lambda op: Local(hardsigmoid),
    "Hardswish": lambda op: Local(hardswish),
    "MaxPool2d": lambda op: _max_pool(op.options),
    "AdaptiveMaxPool2d": lambda op: _adaptive_pool(MaxPool, op.options),
    "AvgPool2d": lambda op: _avg_pool(op.options),
    "AdaptiveAvgPool2d": lambda op: _adaptive_pool(WindowMean, op.options),
    "Mean": lambda op: Local(lambda x: x.mean(op.options["dim"], keepdim=op.options["keepdim"])),
    "Flatten": lambda op: Local(lambda x: x.flatten(**op.options)),
    "Reshape": lambda op: Local(_reshape(op.options["shape"])),
    "Permute": lambda op: Local(lambda x: x.permute(op.options["dims"])),
    "Concat": lambda op: Join(op.options["dim"]),
    "Add": lambda op: Sum(),
    "Mul": lambda op: Product(),
}


def crypten_module(operation: Operation) -> crypten.nn.Module:
    """The crypten.nn module of one operation, not yet encrypted, with float32 weights of the operation's shapes.

    Weights on the meta device, where only shapes are known, become zeros.
    """
    # CrypTen draws initial weights that we replace; on the meta device that costs nothing and draws nothing.
    with torch.device("meta"):
        module = _BUILDERS[operation.kind](operation)
    for name, tensor in operation.tensors.items():
        value = torch.zeros(tensor.shape) if tensor.is_meta else tensor.detach().to(torch.float32, copy=True)
        if name in dict(module.named_parameters()):
            module.set_parameter(name, value)
        else:
            module.register_parameter(name, value)
    return module.eval()
