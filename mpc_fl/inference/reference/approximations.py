"""Functions that shares cannot compute exactly, as polynomials and iterations with few comparisons.

A comparison costs 216 bytes per party and element and 8 rounds, a product 16 bytes and 1 round (Knott et al., NeurIPS 2021):
so an activation spends two comparisons to find the sign and where its polynomial holds, and products for the rest.
Each docstring states the largest error at 16 fractional bits, which tests/inference/reference/test_network.py checks. All take
and return MPCTensors of one shape, or the stand-ins of `cost`; nothing is opened but values masked by the dealer's tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpc_fl.sharing.crypten_parts import crypten

# An MPCTensor, or the stand-in of `cost` that knows its shape alone.
Secret = Any


def joined(tensors: Sequence[Secret], dim: int) -> Secret:
    """Concatenation along axis `dim`, local."""
    joiner = crypten.cat if isinstance(tensors[0], crypten.CrypTensor) else type(tensors[0]).cat
    return joiner(list(tensors), dim=dim)


def _powers(x: Secret, degree: int) -> Secret:
    """x, x^2, ..., x^degree stacked along a new first axis, in ceil(log2(degree)) rounds."""
    powers = x.unsqueeze(0)
    while (known := powers.size(0)) < degree:
        low = powers[: min(known, degree - known)]
        powers = joined([powers, low * powers[known - 1 : known]], 0)
    return powers


def _even_tail(x: Secret, cutoff: int, coefficients: Sequence[float]) -> tuple[Secret, Secret, Secret]:
    """([x >= 0], relu(x), q(v)) with v = relu(cutoff - |x|) / cutoff; q has no constant term, so q = 0 beyond."""
    positive = x.ge(0)
    rectified = x * positive
    magnitude = rectified + rectified - x
    v = (-magnitude + cutoff).relu().div(cutoff)
    table = torch.tensor(coefficients).reshape(-1, *[1] * x.dim())
    return positive, rectified, (_powers(v, len(coefficients)) * table).sum(0)


# Minimax fits in v = 1 - |x| / cutoff by iteratively reweighted least squares (Lawson's algorithm).
_GELU = (0.02541, -0.52311, 4.56223, -17.44259, 35.53657, -32.52477, 10.36607)
_SILU = (0.02161, 0.45022, -1.38805, 0.17379, 6.22368, -5.48393)
_SIGMOID = (0.00336, 0.20693, -2.23378, 9.9328, -20.40158, 20.38533, -7.39279)


def gelu(x: Secret) -> Secret:
    """GELU (Hendrycks and Gimpel 2016) as relu(x) - |x| Phi(-|x|), the even second term fitted for |x| < 4.

    Two comparisons. Largest error of the fit 0.0002, with fixed-point rounding below 0.002.
    """
    _, rectified, tail = _even_tail(x, 4, _GELU)
    return rectified - tail


def silu(x: Secret) -> Secret:
    """x sigmoid(x) as relu(x) - |x| sigmoid(-|x|), fitted for |x| < 8. Two comparisons, largest error below 0.004."""
    _, rectified, tail = _even_tail(x, 8, _SILU)
    return rectified - tail


def sigmoid(x: Secret) -> Secret:
    """q(|x|) = sigmoid(-|x|) fitted for |x| < 8, then q or 1 - q by sign. Two comparisons, error below 0.002."""
    positive, _, tail = _even_tail(x, 8, _SIGMOID)
    # x + y re-encodes the operand of smaller scale in place, so the bit is used last.
    return tail * (1 - positive * 2) + positive


def hardsigmoid(x: Secret) -> Secret:
    """relu6(x + 3) / 6, exact up to rounding. Two comparisons."""
    return x.add(3).hardtanh(0, 6).div(6)


def hardswish(x: Secret) -> Secret:
    """x relu6(x + 3) / 6, exact up to rounding. Two comparisons."""
    return (x * x.add(3).hardtanh(0, 6)).div(6)


_LOWEST, _HIGHEST = -10, 15  # powers of two that x is compared with
_NEWTON_STEPS = 4


def inverse_square_root(x: Secret) -> Secret:
    """1 / sqrt(x) for x in [2^-10, 2^16]: a first guess from 26 public breakpoints, four Newton steps.

    CrypTen's `inv_sqrt` starts from an exponential and does not converge far from 1. Here the guess comes from
    comparing x with 2^-10, ..., 2^15 at once: between two of them x varies by 2, the guess is the inverse root of the
    geometric mean, and y <- y (3 - x y y) / 2 (Newton) takes the relative error from 0.19 to below 1e-6. What remains
    is fixed-point rounding, at 16 bits a relative error of 0.7% at 2^-10, 0.1% at 2^-7, 0.01% at 1, 0.1% at 2^11.
    Below the range results are finite and too small, above 2^17 they are worthless. Shape as the input.
    """
    exponents = torch.arange(_LOWEST, _HIGHEST + 1, dtype=torch.float64)
    guesses = torch.cat([exponents[:1] - 1, exponents]).add(0.5).mul(-0.5).exp2()
    encoder = crypten.encoder.FixedPointEncoder()
    steps = (guesses.diff() * encoder.scale).round().long()
    above = (x.unsqueeze(-1) - exponents.exp2().float()).ge(0)
    # The bits times integers are the guess in fixed point: local, nothing to truncate.
    y = (above * steps).sum(-1)
    y.encoder = encoder
    y = y + float(guesses[0])
    for _ in range(_NEWTON_STEPS):
        # (x y) y and not x (y y): for large x the square of y has no digits left.
        y = (y * (3 - (x * y) * y)).div(2)
    return y
