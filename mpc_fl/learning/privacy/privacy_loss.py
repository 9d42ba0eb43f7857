"""Epsilon of composed subsampled Gaussians from their privacy loss distributions: an upper bound, and a tight one.

A pair of distributions P, Q has the privacy loss L = log(dP/dQ) under P. Losses of releases add up, and
delta(epsilon) = E[max(0, 1 - exp(epsilon - L))] (Sommer, Meiser, Mohammadi, PoPETs 2019). One step of a Gaussian mechanism
with noise multiplier z, whose patients are drawn with probability q, is dominated by the pair (1 - q) N(0, z^2) + q N(1, z^2)
and N(0, z^2): in this order where a patient is removed, in the other where one is added (Zhu, Dong, Wang, AISTATS 2022).
No proof says that one order is the worse after composition (Lebeda, Regehr, Kamath, Steinke 2024), so both are
composed and the larger epsilon counts.

Each step errs to the safe side.
  1. *Grid* ("connecting the dots", Doroshenko et al., PoPETs 2022). Losses are put on whole multiples of a width: the
     probability of losses between two of them is divided among both so that it keeps its size under P and under Q. What
     was there can be made from what is put there by forgetting, so the new pair dominates. A loss beyond the grid
     becomes infinite, one below it is raised to the lowest point. Probabilities are rounded up by more than their error.
  2. *Composition*, by one discrete Fourier transform for all mechanisms. It is cyclic: a sum beyond its window would appear
     too low. Chernoff's inequality bounds how probable that is; this is taken from delta.
  3. *Rounding* of the transforms: its bound in the L1 norm is taken from delta as well.

Gopi, Lee, Wutschitz (NeurIPS 2021), Opacus's `PRVAccountant`, compose one order alone and add 0.01 to epsilon. Tests hold the
result between the bounds of dp-accounting, and above the exact one where there is a formula.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from mpc_fl.errors import PrivacyBudgetError

Mechanism = tuple[float, float, int]  # noise multiplier z, sampling rate q, steps

_FINENESS = 0.035  # most of the grid's width over the deviation of one step's loss: epsilon grows by about 0.01 %
_LARGEST_GRID = 1 << 20
_TAIL = 2.0**-12  # of delta, for all that is cut off in one place
_UNIT = 2.0**-53
_EDGE_ERROR = 2.0**-45  # of a loss, from the rounding of edges
_SMALLEST_LOGARITHM = -100 * math.log(2)
_CHERNOFF = np.geomspace(0.5, 200, 16)  # exponents, over the deviation of the sum


class _Losses(NamedTuple):
    """One step: the probabilities (under P) of losses (first + i) * width, float64, and of an infinite loss."""

    first: int
    masses: np.ndarray
    infinite: float


def _normal(x: np.ndarray) -> np.ndarray:
    """Standard normal distribution function, float64, precise also far below zero."""
    return torch.special.erfc(torch.from_numpy(x * -math.sqrt(0.5))).numpy() / 2


def _between(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal probabilities between neighbouring increasing edges, and a bound on their errors."""
    low, high = edges[:-1], edges[1:]
    with np.errstate(invalid="ignore"):
        mirrored = low + high > 0  # measured from the nearer tail
    ends = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    left, right = _normal(ends[0]), _normal(ends[1])
    spread = [(1 + np.square(np.clip(end, -40, 40))) * value for end, value in zip(ends, (left, right), strict=True)]
    return np.maximum(right - left, 0.0), 8 * _UNIT * (spread[0] + spread[1])


def _position_of(loss: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """Where the mixture is exp(loss) times as dense as N(0, z^2), in units of z; minus infinity where it never is."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        small = np.log1p(np.maximum(np.expm1(np.minimum(loss, 1.0)) / rate, -1.0))
        large = loss + np.log1p(-(1 - rate) * np.exp(-np.maximum(loss, 1.0))) - math.log(rate)
    return noise * np.where(loss <= 1, small, large) + 0.5 / noise


def _loss_at(position: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """The inverse: log of the ratio of the densities of mixture and N(0, z^2), at a position in units of z."""
    exponent = position / noise - 0.5 / noise**2
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), math.log(rate) + exponent)


def _deviation(noise: float, rate: float) -> float:
    """Root mean square of one step's loss under N(0, z^2) and, weighted by q, under N(1, z^2); a scale, not a bound."""
    points = np.linspace(-9.0, 9.0, 721)
    weights = np.exp(-np.square(points) / 2)
    weights /= weights.sum()
    squares = [np.square(_loss_at(points + shift, noise, rate)) for shift in (0.0, 1 / noise)]
    return math.sqrt(float((1 - rate) * (weights @ squares[0]) + rate * (weights @ squares[1])))


@functools.lru_cache(maxsize=32)
def _one_step(noise: float, rate: float, width: float, cut: float, added: bool) -> _Losses | None:
    """Step 1: the losses of one step on the grid, its ends where less than `cut` is left. None for too many points."""
    reach = math.sqrt(-2 * math.log(cut))  # a normal variable exceeds it with probability below cut
    ends = _loss_at(np.array([-reach, reach + (0.0 if added else 1 / noise)]), noise, rate)
    low, high = (-ends[1], -ends[0]) if added else (ends[0], ends[1])
    first, last = math.floor(low / width), math.ceil(high / width)
    if last - first >= _LARGEST_GRID:
        return None
    losses = np.arange(first, last + 1) * width
    # Edges as positions, increasing: in the order of losses for a removed patient, in the other for an added one.
    edges = np.concatenate([[-np.inf], _position_of(-losses[::-1] if added else losses, noise, rate), [np.inf]])
    of_base, base_error = _between(edges)
    of_shifted, shifted_error = _between(edges - 1 / noise)
    mixed = (1 - rate) * of_base + rate * of_shifted
    mixed_error = (1 - rate) * base_error + rate * shifted_error + 4 * _UNIT * mixed
    cells = [(of_base, base_error), (mixed, mixed_error)] if added else [(mixed, mixed_error), (of_base, base_error)]
    (under_p, p_error), (under_q, q_error) = [
        (value[::-1], error[::-1]) if added else (value, error) for value, error in cells
    ]
    # The share of each inner cell that goes to its upper end, rounded up; the rest stays at its lower end.
    with np.errstate(over="ignore", invalid="ignore"):
        growth = np.exp(losses[:-1])
        wanted = under_p[1:-1] - growth * under_q[1:-1]
        slack = p_error[1:-1] + growth * (q_error[1:-1] + 4 * _UNIT * under_q[1:-1])
        up = (wanted + slack) / -math.expm1(-width)
    inner = under_p[1:-1] + p_error[1:-1]
    up = np.where(np.isfinite(up), np.clip(up, 0.0, inner), inner)
    masses = np.concatenate([inner - up, [0.0]]) + np.concatenate([[under_p[0] + p_error[0]], up])
    return _Losses(first, masses * (1 + 16 * _UNIT), float(under_p[-1] + p_error[-1]))  # more than all sums lose


def _window(steps: list[_Losses], counts: list[int], width: float, deviation: float, cut: float) -> tuple[int, int]:
    """First and last grid point of a window that the sum of all losses leaves with probability below `cut` at each end."""
    low = float(sum(count * step.first for step, count in zip(steps, counts, strict=True)))
    high = low + sum(count * (len(step.masses) - 1) for step, count in zip(steps, counts, strict=True))
    for exponent in itertools.chain(_CHERNOFF, -_CHERNOFF):
        tilt, moment = float(exponent) * width / deviation, -math.log(cut)
        for step, count in zip(steps, counts, strict=True):
            places = tilt * (step.first + np.arange(len(step.masses)))
            top = float(places.max())
            moment += count * (top + math.log(float(step.masses @ np.exp(places - top))))
        if tilt > 0:
            high = min(high, moment / tilt)
        else:
            low = max(low, moment / tilt)
    return math.floor(low) - 1, math.ceil(high) + 1


def _power(values: np.ndarray, exponent: int) -> np.ndarray:
    """By squaring: `exponent` multiplications' worth of rounding at most."""
    result = np.ones_like(values)
    while exponent:
        if exponent & 1:
            result = result * values
        exponent >>= 1
        if exponent:
            values = values * values
    return result


def _composed(
    steps: list[_Losses], counts: list[int], first: int, length: int, kind: type[np.floating]
) -> tuple[np.ndarray, float]:
    """Step 2: probabilities of the sums (first + i) * width, i < `length`, and the bound of step 3 on their total error.

    The error of a transform of N points is at most 3 log2(N) units in the L2 norm (Higham, Accuracy and Stability, ch. 24).
    """
    unit = float(np.finfo(kind).eps) / 2
    transform_error, through_powers = 3 * unit * math.log2(length), 0.0
    transforms, size = [], np.zeros(length // 2 + 1)
    for step, count in zip(steps, counts, strict=True):
        folded = np.bincount((step.first + np.arange(len(step.masses))) % length, step.masses, length)
        transforms.append(np.fft.rfft(folded.astype(kind)))
        with np.errstate(divide="ignore"):
            size += count * np.log(np.abs(transforms[-1]).astype(np.float64))
        through_powers += count * transform_error * float(np.linalg.norm(folded))
    # Most frequencies of a long composition are next to nothing: left out, at less than 2^-100 each.
    product = np.where(size > _SMALLEST_LOGARITHM, 1, 0).astype(transforms[0].dtype)
    kept = product != 0
    for transform, count in zip(transforms, counts, strict=True):
        product[kept] *= _power(transform[kept], count)
    sums = np.roll(np.fft.irfft(product, length), -(first % length))
    afterwards = (4 * unit * (sum(counts) + len(counts)) + transform_error) * float(np.linalg.norm(sums))
    return np.maximum(sums, 0.0).astype(np.float64), math.sqrt(length) * (
        through_powers + afterwards
    ) + length * 2.0**-100


def _epsilon_of_order(history: tuple[Mechanism, ...], delta: float, added: bool) -> float:
    counts = [count for _, _, count in history]
    total, cut = sum(counts), _TAIL * delta
    spread = math.sqrt(sum(count * _deviation(noise, rate) ** 2 for noise, rate, count in history))
    # Powers of two, so that one more release seldom changes the grid, and what is known of earlier ones serves again.
    width = 2.0 ** math.floor(math.log2(_FINENESS * spread / math.sqrt(total)))
    end = 2.0 ** math.floor(math.log2(cut / total))
    while True:  # until grid and window are small enough: a wider grid costs tightness alone
        steps = [_one_step(noise, rate, width, end, added) for noise, rate, _ in history]
        known = [step for step in steps if step is not None]
        if len(known) == len(steps):
            first, last = _window(known, counts, width, spread, cut)
            if last - first < _LARGEST_GRID:
                break
        width *= 2
    length = 1 << (last - first).bit_length()
    sums, rounding = _composed(known, counts, first, length, np.float64)
    if rounding > 16 * cut:
        sums, rounding = _composed(known, counts, first, length, np.longdouble)  # 80 or 128 bits, where there are some
    infinite = sum(count * step.infinite for step, count in zip(known, counts, strict=True))
    left = (delta - infinite - cut - rounding) * (1 - _TAIL)  # the rest for the rounding of the last sums
    if left < delta / 2:
        raise PrivacyBudgetError(
            f"the pld accountant is not precise enough for delta {delta:g} and {total} steps",
            "set privacy.accountant=rdp",
        )
    losses = (first + np.arange(length)) * width
    return _smallest_epsilon(losses, sums, left) + total * _EDGE_ERROR


def _smallest_epsilon(losses: np.ndarray, masses: np.ndarray, delta: float) -> float:
    """Smallest epsilon >= 0 with sum of masses * max(0, 1 - exp(epsilon - losses)) at most delta; losses increase."""
    losses, masses = np.append(0.0, losses[losses > 0]), np.append(0.0, masses[losses > 0])
    above = np.cumsum(masses[::-1])[::-1]
    # Exponentials relative to a place at or beyond epsilon: there what lies above has no more than delta in all.
    place = int(np.argmax(above <= delta)) if above[-1] <= delta else len(losses) - 1
    origin = losses[place]
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = np.cumsum((masses * np.exp(origin - losses))[::-1])[::-1]
        # So far below that place that the sum overflows, delta is not reached; and it is reached there.
        reached = np.isfinite(weighted) & (above - np.exp(losses - origin) * weighted <= delta)
    reached[place] = True
    place = int(np.argmax(reached))
    found = float(losses[place])
    if above[place] > delta and 0 < weighted[place] < math.inf:
        # Between two losses delta is linear in exp(epsilon).
        found = min(found, float(origin) + math.log(float(above[place] - delta) / float(weighted[place])))
    return max(0.0, found)


@functools.lru_cache(maxsize=1024)
def epsilon_by_losses(history: tuple[Mechanism, ...], delta: float) -> float:
    """Epsilon of the composition of `history` at `delta`, for patients added and patients removed; 0 for no steps.

    Raises `PrivacyBudgetError` where the machine's numbers cannot hold a bound: at 1e4 steps for a delta below about 1e-11.
    """
    history = tuple(mechanism for mechanism in history if mechanism[2])
    return max((_epsilon_of_order(history, delta, added) for added in (False, True)), default=0.0) if history else 0.0
