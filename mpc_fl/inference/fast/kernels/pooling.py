"""Windows, maxima and sums over shares. Activations lie channels last: (N, H, W, C), uint32.

A maximum is max(a, b) = b + relu(a - b) with one narrow comparison gate, over windows first along rows, then along columns
(separable: for 3 x 3 windows 2 + 2 instead of 8 gates on an output). m candidates take ceil(log2 m) gates one after the other,
all pairs of a level side by side in one gate. Sums and differences are local. The gate's security is that of `comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mpc_fl.inference.fast.layers import AveragePool, MaxPool

_ROWS, _COLUMNS = 1, 2

# relu of k-bit shares (n,), k bits again; called once per level, in order.
NarrowReLU = Callable[[np.ndarray], np.ndarray]


def output_length(length: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Windows along one axis."""
    return (length + before + after - kernel) // stride + 1


def _shifted(
    values: np.ndarray, axis: int, kernel: int, stride: int, pads: tuple[int, int], fill: int
) -> list[np.ndarray]:
    """For each place in the window, what lies there in all windows."""
    length = output_length(values.shape[axis], kernel, stride, *pads)
    if any(pads):
        widths = [pads if index == axis else (0, 0) for index in range(values.ndim)]
        values = np.pad(values, widths, constant_values=np.uint32(fill))
    places = []
    for start in range(kernel):
        chosen = [slice(None)] * values.ndim
        chosen[axis] = slice(start, start + (length - 1) * stride + 1, stride)
        places.append(values[tuple(chosen)])
    return places


def levels_of(candidates: int) -> Iterator[int]:
    """How many pairs each level of a tournament compares."""
    while candidates > 1:
        yield candidates // 2
        candidates -= candidates // 2


def maximum(candidates: Sequence[np.ndarray], bits: int, relu: NarrowReLU) -> np.ndarray:
    """Shares modulo 2^bits of the elementwise maximum of shares of one shape. Differences must fit in `bits` bits."""
    mask = np.uint32((1 << bits) - 1)
    remaining = list(candidates)
    for pairs in levels_of(len(remaining)):
        left, right = np.stack(remaining[:pairs]), np.stack(remaining[pairs : 2 * pairs])
        left -= right
        left &= mask
        right += relu(left.reshape(-1)).reshape(left.shape)
        right &= mask
        remaining = [*right, *remaining[2 * pairs :]]
    return remaining[0]


def max_pool(layer: MaxPool, share: np.ndarray, bits: int, first: bool, relu: NarrowReLU) -> np.ndarray:
    """Shares of the pooled value (N, H', W', C). C (`first`) pads with the smallest value, S with 0."""
    smallest = (1 << bits) - (1 << bits - 2) if first else 0
    top, bottom, left, right = layer.padding
    for axis, pads in ((_ROWS, (top, bottom)), (_COLUMNS, (left, right))):
        place = axis - 1
        candidates = _shifted(share, axis, layer.kernel[place], layer.stride[place], pads, smallest)
        share = maximum(candidates, bits, relu)
    return share


def max_pool_counts(layer: MaxPool, shape: tuple[int, int, int]) -> Iterator[int]:
    """Gates of each level, for one record of shape (C, H, W)."""
    channels, rows, columns = shape
    top, bottom, left, right = layer.padding
    rows = output_length(rows, layer.kernel[0], layer.stride[0], top, bottom)
    for pairs in levels_of(layer.kernel[0]):
        yield pairs * channels * rows * columns
    columns = output_length(columns, layer.kernel[1], layer.stride[1], left, right)
    for pairs in levels_of(layer.kernel[1]):
        yield pairs * channels * rows * columns


def sum_pool(layer: AveragePool, share: np.ndarray) -> np.ndarray:
    """Shares of multiplier * sum over windows (N, H', W', C), modulo 2^32; the caller reduces to the value's width."""
    top, bottom, left, right = layer.padding
    for axis, pads in ((_ROWS, (top, bottom)), (_COLUMNS, (left, right))):
        place = axis - 1
        candidates = _shifted(share, axis, layer.kernel[place], layer.stride[place], pads, 0)
        share = candidates[0].copy()
        for candidate in candidates[1:]:
            share += candidate
    share *= np.uint32(layer.multiplier & 0xFFFFFFFF)
    return share
