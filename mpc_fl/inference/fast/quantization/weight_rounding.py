"""Rounding the weights of a linear layer so that its results change least, not each weight by itself.

Neighbouring pixels and channels are alike, so errors of single weights need not add up: where one weight is rounded up, the
next may make up for it. With G = E[p p^T] over patches p that the layer saw in calibration, an error e of one output's
weights disturbs its results by e^T G e on average. From the Cholesky factors G = L D L^T,
    e^T G e = sum over j of d_j (e_j + sum over i > j of L_ij e_i)^2,
so weights are rounded from the last to the first, each after adding what the later ones left (Babai's nearest plane; Frantar et
al., ICLR 2023). What remains is sum(d_j) / 12 in place of trace(G) / 12 units squared. A layer with many inputs per output
is rounded to nearest. Whatever is left on average, e^T E[p], goes into the bias (Nagel et al., ICCV 2019). All this happens
before the protocol: integers are as many and as wide, and nothing more is revealed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from mpc_fl.inference.fast.quantization.float_graph import affine
from mpc_fl.inference.graph.tracing import Operation

# Inputs per output, the rows of G: for more, rounding together takes minutes and gained nothing that could be measured.
_MOST_INPUTS = 640
_MOST_FEATURES = 2048  # of a linear layer: one patch per record
_PATCHES = 4096
_DAMPING = 0.01  # of G's mean diagonal: directions that calibration did not show must not become free


class Geometry(NamedTuple):
    """How a convolution moves over its input, in elements: rows, columns."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, repr=False)
class Inputs:
    """What a linear layer reads, by its patches of D = (inputs per group) * height * width elements in each of G groups.

    `mean` float64 (G, D); `moments` float64 (G, D, D), damped, or None for many inputs; `squares` float64 (channels,), the mean
    square of each channel. `moments` are those of inputs that `factors`, (G, D), still multiply: no copy is made of what takes
    most of calibration's memory. Of the owner's data, not public.
    """

    mean: torch.Tensor
    moments: torch.Tensor | None
    squares: torch.Tensor
    factors: torch.Tensor | None = None

    @property
    def effective(self) -> float:
        """Root mean square of what multiplies the rounding errors of weights, after what `rounded` makes up for.

        At least 1 / 16 of the inputs': other images may resemble each other less.
        """
        square = float(self.squares.mean())
        factor = self.cholesky()
        if factor is None:
            left = square - float(self.mean.square().mean())
        else:
            left = float(factor.diagonal(dim1=-2, dim2=-1).square().mean())
        return math.sqrt(max(left, square / 256))

    def multiplied(self, factors: torch.Tensor) -> Inputs:
        """The same of inputs whose channels are `factors`, float64 (channels,), times as large."""
        groups, size = self.mean.shape
        shared = factors.reshape(groups, -1)
        each = shared.repeat_interleave(size // shared.shape[1], dim=1)
        before = 1 if self.factors is None else self.factors
        return Inputs(self.mean * each, self.moments, self.squares * factors**2, before * each)

    def cholesky(self) -> torch.Tensor | None:
        """Lower triangular factors of G, float64 (G, D, D), or None for many inputs."""
        if self.moments is None:
            return None
        factor = torch.linalg.cholesky(self.moments)
        return factor if self.factors is None else factor.mul_(self.factors.unsqueeze(-1))


def as_convolution(operation: Operation, channels: int) -> tuple[torch.Tensor, torch.Tensor, Geometry]:
    """Weight (O, I, height, width), bias (O,) and geometry of a linear layer of any kind on `channels` channels."""
    if operation.kind == "Affine":
        scale, shift = affine(operation, channels)
        return scale.reshape(-1, 1, 1, 1), shift, Geometry(groups=channels)
    weight = operation.tensors["weight"]
    bias = operation.tensors.get("bias", torch.zeros(len(weight)))
    if operation.kind == "Linear":
        return weight[:, :, None, None], bias, Geometry()
    return weight, bias, Geometry(*(operation.options[name] for name in Geometry._fields))


class InputsSum:
    """Collects `Inputs` of one layer from batches of what it reads. `records` are all that will be added."""

    def __init__(self, operation: Operation, records: int) -> None:
        self.operation, self.records = operation, records
        self._mean: torch.Tensor | None = None
        self._moments: torch.Tensor | None = None
        self._squares = torch.zeros((), dtype=torch.float64)
        self._patches = 0
        self._draw = torch.Generator().manual_seed(0)

    def add(self, values: torch.Tensor) -> None:
        """Values (N, C, H, W) or (N, F) that the layer reads."""
        images = values if values.dim() == 4 else values[:, :, None, None]
        weight, _, geometry = as_convolution(self.operation, images.shape[1])
        groups, share = geometry.groups, len(images) / self.records
        mean = _patches(images.mean(0, keepdim=True), weight, geometry).mean(dim=(0, 1, 2)).double()
        self._mean = share * mean.reshape(groups, -1) + (0 if self._mean is None else self._mean)
        self._squares = self._squares + share * images.double().square().mean(dim=(0, 2, 3))
        if self._mean.shape[1] > (_MOST_FEATURES if self.operation.kind == "Linear" else _MOST_INPUTS):
            return
        windows = _patches(images, weight, geometry)
        count, rows, columns = windows.shape[:3]
        wanted = min(rows * columns, -(-_PATCHES // self.records))
        for record in range(count):
            places = torch.randperm(rows * columns, generator=self._draw)[:wanted]
            chosen = windows[record, places // columns, places % columns].double()
            patches = chosen.reshape(len(places), groups, -1).transpose(0, 1)
            moments = patches.transpose(1, 2) @ patches
            self._moments = moments if self._moments is None else self._moments.add_(moments)
            self._patches += wanted

    def result(self) -> Inputs:
        """The statistics of all that was added, once."""
        assert self._mean is not None
        if self._moments is None:
            return Inputs(self._mean, None, self._squares)
        moments = self._moments.div_(self._patches)
        self._moments = None
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        diagonal += _DAMPING * diagonal.mean(dim=-1, keepdim=True) + 1e-12
        return Inputs(self._mean, moments, self._squares)


def _patches(images: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A view (N, H', W', C, height, width) of the padded images: all that a convolution multiplies with its weights."""
    (down, right), (vertical, horizontal), (rows, columns) = geometry.stride, geometry.padding, geometry.dilation
    padded = functional.pad(images, (horizontal, horizontal, vertical, vertical))
    height, width = rows * (weight.shape[2] - 1) + 1, columns * (weight.shape[3] - 1) + 1
    windows = padded.unfold(2, height, down).unfold(3, width, right)[..., ::rows, ::columns]
    return windows.permute(0, 2, 3, 1, 4, 5)


def rounded(weights: torch.Tensor, inputs: Inputs, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers near real `weights` (O, I, height, width), and what to add to the bias (O,), in units.

    int64 and float64. Integers keep within `largest` in magnitude.
    """
    groups, size = inputs.mean.shape
    real = weights.double().reshape(groups, -1, size)
    errors = torch.zeros_like(real)
    factor = inputs.cholesky()
    if factor is None:
        errors = real - real.round().clamp(-largest, largest)
    else:
        factor /= factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).clone()
        for place in range(size - 1, -1, -1):
            left = errors[..., place + 1 :] @ factor[:, place + 1 :, place : place + 1]
            nearest = (real[..., place] + left[..., 0]).round().clamp(-largest, largest)
            errors[..., place] = real[..., place] - nearest
    integers = (real - errors).round().to(torch.int64).reshape(weights.shape)
    return integers, (errors @ inputs.mean.unsqueeze(-1)).reshape(-1)
