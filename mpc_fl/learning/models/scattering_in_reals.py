"""Scattering without complex numbers: Fourier transforms as products with matrices of cosines and sines.

The same function as `scattering.Scattering`, for formats of files that have no complex numbers or no Fourier transform. It takes
whole batches, so an image's last bits may depend on the others: training and encrypted diagnosis use the other one.

A transform is a pair of real tensors (..., n, n), its real and its imaginary part.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.scattering import (
    FIELDS,
    LEAST_DEVIATION,
    MARGIN,
    OFFSET,
    PARENTS,
    SCALES,
    SIDE,
    Scattering,
    sampled,
)

_Pair = tuple[torch.Tensor, torch.Tensor]
_PADDED = SIDE + 2 * MARGIN


def _averaging(side: int) -> torch.Tensor:
    """What averages `side` pixels to SIDE as adaptive pooling does, float32 (SIDE, side)."""
    weights = torch.zeros(SIDE, side, dtype=torch.float64)
    for place in range(SIDE):
        first, after = place * side // SIDE, -(-(place + 1) * side // SIDE)
        weights[place, first:after] = 1 / (after - first)
    return weights.float()


class ScatteringInReals(nn.Module):
    """Float32 grey images (N, 1, side, side), `side` at least 64, to features (N, 3472) like those of `Scattering`."""

    def __init__(self, scattering: Scattering, side: int) -> None:
        super().__init__()
        if side < SIDE:
            raise ModelError(f"scattering takes images of at least {SIDE} x {SIDE} pixels, not {side}", "enlarge them")
        for name, values in scattering.named_buffers():
            self.register_buffer(name, values.detach().clone())
        self.register_buffer("averaging", _averaging(side))
        self.register_buffer("parents", torch.tensor(PARENTS))
        for halvings in range(SCALES + 1):
            places = torch.arange(_PADDED >> halvings, dtype=torch.float64)
            turns = torch.outer(places, places).remainder(len(places)) * (2 * math.pi / len(places))
            self.register_buffer(f"cosines_{len(places)}", torch.cos(turns).float())
            self.register_buffer(f"sines_{len(places)}", torch.sin(turns).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, F), each of length 1 (less for an image without contrast)."""
        averaging = self.get_buffer("averaging")
        pixels = averaging @ images[:, 0] @ averaging.T
        centred = pixels - pixels.mean(dim=(1, 2), keepdim=True)
        deviation = centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=LEAST_DEVIATION)
        padded = functional.pad((centred / deviation)[:, None], [MARGIN] * 4, mode="reflect")
        transform = self._fourier(padded, torch.zeros_like(padded))  # (N, 1, P, P)
        first, second = [], []
        for scale in range(SCALES):
            once = self._magnitudes(transform, f"wavelets_{scale}_0", scale)
            first.append(self._averages(once, scale))
            for wider in range(scale + 1, SCALES):
                twice = self._magnitudes(once, f"wavelets_{wider}_{scale}", wider - scale)
                second.append(self._averages(twice, wider))
        one, two = (torch.log(torch.cat(order, dim=1).clamp(min=0) + OFFSET) for order in (first, second))
        relative = two - one.index_select(1, self.get_buffer("parents"))
        orders = [self._averages(transform, 0), one, relative]
        return torch.cat([_unit(order) for order in orders], dim=1) / math.sqrt(len(orders))

    def _fourier(self, real: torch.Tensor, imaginary: torch.Tensor, sign: float = 1.0) -> _Pair:
        """The discrete Fourier transform of both axes; with `sign` -1 its inverse."""
        size = real.shape[-1]
        cosines, sines = self.get_buffer(f"cosines_{size}"), self.get_buffer(f"sines_{size}") * sign
        real, imaginary = cosines @ real + sines @ imaginary, cosines @ imaginary - sines @ real
        real, imaginary = real @ cosines + imaginary @ sines, imaginary @ cosines - real @ sines
        return (real, imaginary) if sign > 0 else (real / size**2, imaginary / size**2)

    def _filtered(self, transform: _Pair, values: torch.Tensor, halvings: int) -> _Pair:
        """The image that has this transform times real `values`, every 2^halvings-th pixel of it."""
        real, imaginary = (sampled(part * values, halvings) for part in transform)
        return self._fourier(real, imaginary, -1.0)

    def _magnitudes(self, transform: _Pair, wavelets: str, halvings: int) -> _Pair:
        """The transform of |x * psi| for every x of (N, channels, n, n) and wavelet of (A, n, n): (N, channels A, n', n')."""
        each = (transform[0].unsqueeze(2), transform[1].unsqueeze(2))
        real, imaginary = self._filtered(each, self.get_buffer(wavelets), halvings)
        magnitudes = (real.square() + imaginary.square()).sqrt().flatten(1, 2)
        return self._fourier(magnitudes, torch.zeros_like(magnitudes))

    def _averages(self, transform: _Pair, scale: int) -> torch.Tensor:
        """Averages over FIELDS x FIELDS fields of what has this transform (N, channels, n, n), as (N, channels, fields)."""
        halvings = (transform[0].shape[-1] * (1 << SCALES) // _PADDED).bit_length() - 1
        smooth, _ = self._filtered(transform, self.get_buffer(f"low_pass_{scale}"), halvings)
        inside = smooth[:, :, 1:-1, 1:-1]
        return functional.avg_pool2d(inside, inside.shape[-1] // FIELDS).flatten(2)


def _unit(block: torch.Tensor) -> torch.Tensor:
    """All values of one order, (N, channels, fields), centred and of length 1 (0 where all are equal)."""
    return functional.normalize((block - block.mean(dim=(1, 2), keepdim=True)).flatten(1), dim=1)


def in_reals(network: nn.Module, side: int) -> nn.Module:
    """A copy of a network on images of this side in which scattering, where it has some, is without complex numbers."""
    if isinstance(network, Scattering):
        return ScatteringInReals(network, side)
    copied = copy.deepcopy(network)
    for path, layer in list(copied.named_modules()):
        if isinstance(layer, Scattering):
            copied.set_submodule(path, ScatteringInReals(layer, side))
    return copied
